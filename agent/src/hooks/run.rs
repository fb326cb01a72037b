//! One call of a hook.

use super::{Hook, HookLimits};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    fmt,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Of what a call prints, so many bytes are kept: the last ones.
pub const OUTPUT_BYTES_MAX: usize = 4096;
/// Between two looks whether it has ended, while it prints nothing.
const LOOK: Duration = Duration::from_millis(5);
/// From the polite signal to the other.
const GRACE: Duration = Duration::from_secs(1);
/// A pipe holds no more, as long as nobody makes it larger.
const PIPE_BYTES: usize = 64 << 10;
const TAKEN_BYTES: usize = 1024;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a hook is called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Stand still.
    Freeze,
    /// Go on.
    Thaw,
}

impl Call {
    /// The argument.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
        }
    }
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With success.
    Done,
    /// With this exit code.
    Failed(i32),
    /// By this signal.
    Killed(i32),
    /// It took too long, and was ended.
    TimedOut,
    /// Nobody waited for it any more, and it was ended.
    Unwanted,
    /// It could not be started, or waited for.
    NotRun(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => write!(f, "done"),
            Self::Failed(code) => write!(f, "failed with exit code {code}"),
            Self::Killed(signal) => write!(f, "was ended by signal {signal}"),
            Self::TimedOut => write!(f, "took too long and was ended"),
            Self::Unwanted => write!(f, "was ended, since nobody waited for it any more"),
            Self::NotRun(why) => write!(f, "could not be run: {why}"),
        }
    }
}

/// A call that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// The hook's name.
    pub hook: String,
    /// What it was called with.
    pub call: Call,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
    /// The end of what it printed, as text.
    pub output: String,
}

/// Calls a hook and waits for its end, or ends it: when it has taken too long, or as soon as it is `unwanted`.
pub(super) fn run(hook: &Hook, call: Call, limits: HookLimits, unwanted: Option<&AtomicBool>) -> Ran {
    let began = Instant::now();
    let mut output = vec![];
    let outcome = match start(hook, call, limits) {
        Ok((child, pipe)) => wait(child, pipe, began + limits.call, unwanted, &mut output),
        Err(error) => Outcome::NotRun(error.to_string()),
    };
    let output = String::from_utf8_lossy(&output).trim_end().to_owned();
    Ran { hook: hook.name.clone(), call, outcome, took: began.elapsed(), output }
}

fn start(hook: &Hook, call: Call, limits: HookLimits) -> io::Result<(Child, File)> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let second: OwnedFd = theirs.try_clone()?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    // Under systemd, what a dead agent was calling ends with it (`KillMode=mixed`): no `freeze` ends behind the `thaw` of whoever comes next.
    let child = Command::new(&hook.path)
        .arg(call.as_str())
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .env("HIGHWATER_HOLD_S", limits.hold.as_secs().max(1).to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(theirs)
        .stderr(second)
        // So that all of it can be ended.
        .process_group(0)
        .spawn()?;
    Ok((child, File::from(ours)))
}

fn wait(
    mut child: Child,
    mut pipe: File,
    until: Instant,
    unwanted: Option<&AtomicBool>,
    output: &mut Vec<u8>,
) -> Outcome {
    let mut open = true;
    let is_unwanted = || unwanted.is_some_and(|unwanted| unwanted.load(Ordering::Acquire));
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                take_rest(&mut pipe, output);
                return ended(status);
            }
            Ok(None) if Instant::now() >= until || is_unwanted() => {
                end(&mut child);
                take_rest(&mut pipe, output);
                return if Instant::now() >= until { Outcome::TimedOut } else { Outcome::Unwanted };
            }
            Ok(None) => {}
            Err(error) => {
                end(&mut child);
                return Outcome::NotRun(error.to_string());
            }
        }
        if open {
            let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            let look = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            if poll(&mut polled, look).unwrap_or(0) > 0 {
                open = take(&mut pipe, output).is_some();
            }
        } else {
            std::thread::sleep(LOOK);
        }
    }
}

/// Takes what was printed before it ended. What it left behind may hold the pipe open for long, and print for ever.
fn take_rest(pipe: &mut File, output: &mut Vec<u8>) {
    for _ in 0..PIPE_BYTES / TAKEN_BYTES {
        if take(pipe, output) != Some(true) {
            return;
        }
    }
}

/// Takes what has been printed. `Some(true)`: there may be more now; `None`: there will be no more.
fn take(pipe: &mut File, output: &mut Vec<u8>) -> Option<bool> {
    let mut buffer = [0; TAKEN_BYTES];
    match pipe.read(&mut buffer) {
        Ok(0) => None,
        Ok(count) => {
            output.extend_from_slice(&buffer[..count]);
            let over = output.len().saturating_sub(OUTPUT_BYTES_MAX);
            output.drain(..over);
            Some(true)
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Some(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(false),
        Err(_) => None,
    }
}

fn ended(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(0), _) => Outcome::Done,
        (Some(code), _) => Outcome::Failed(code),
        (None, Some(signal)) => Outcome::Killed(signal),
        (None, None) => Outcome::NotRun("it ended in no known way".into()),
    }
}

/// Ends it and whatever it started, politely first.
fn end(child: &mut Child) {
    let Ok(group) = i32::try_from(child.id()).map(Pid::from_raw) else { return };
    let _ = killpg(group, Signal::SIGTERM);
    let until = Instant::now() + GRACE;
    while Instant::now() < until && !matches!(child.try_wait(), Ok(Some(_))) {
        std::thread::sleep(LOOK);
    }
    // Also what outlives its leader; the group is not used by others as long as one of it lives.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
}
