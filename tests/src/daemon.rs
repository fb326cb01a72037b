//! Our daemons as real processes: started, watched, killed, and held to what they log.
//!
//! A daemon that logs a warning or an error that the test did not announce fails the test, as does one that ended by
//! itself unasked.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::census::ENVIRONMENT;

/// Longer than the daemons give themselves.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// A program of this project, built beside the tests.
pub fn program(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/debug/deps/test-… or target/debug/program
    let found = test.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is not built: use cargo xtask test, or cargo build --workspace --bins")
    })
}

/// A port on 127.0.0.1 that is free now. Another process could take it first: bind to port 0 where one can.
///
/// None that the kernel gives out by itself, and none twice: between this and its use another would take it.
pub fn free_port() -> Result<u16> {
    const FIRST: u16 = 21_000;
    const COUNT: u16 = 11_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let begin = (std::process::id() % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let port = FIRST + (begin + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port is free")
}

/// A daemon under test. Dropped: killed, and its log judged.
pub struct Daemon {
    name: String,
    child: Option<Child>,
    log: PathBuf,
    allowed: Vec<String>,
    judged: bool,
}

impl Daemon {
    /// Starts a command; both its streams go to `<dir>/<name>.log`, behind what a predecessor of that name left.
    ///
    /// It is killed by the kernel if the test's thread dies without a destructor.
    pub fn spawn(name: &str, dir: &Path, mut command: Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).env("NO_COLOR", "1");
        command.env(ENVIRONMENT, "1");
        // SAFETY: prctl is async-signal-safe and touches only the new process.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Daemon { name: name.to_owned(), child: Some(child), log, allowed: Vec::new(), judged: false })
    }

    /// Announces that lines with this text may be warnings or errors.
    pub fn allow(&mut self, text: &str) -> &mut Self {
        self.allowed.push(text.to_owned());
        self
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(match &mut self.child {
            Some(child) => child.try_wait()?.is_none(),
            None => false,
        })
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until its log has this text.
    pub fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !self.log().contains(text) {
            if !self.is_running()? {
                bail!("{} ended before it logged `{text}`:\n{}", self.name, self.tail());
            }
            if Instant::now() > deadline {
                bail!("{} did not log `{text}` within {timeout:?}:\n{}", self.name, self.tail());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Kills it with no chance to do anything.
    pub fn kill_9(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid().with_context(|| format!("{} does not run", self.name))?;
        kill(Pid::from_raw(i32::try_from(pid)?), signal)?;
        Ok(())
    }

    /// Asks it to stop, waits, and judges its log and its exit.
    pub fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let status = self.wait(STOP_TIMEOUT)?;
        if !status.success() {
            bail!("{} stopped with {status}:\n{}", self.name, self.tail());
        }
        self.judged = true;
        self.judge()
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        let child = self.child.as_mut().with_context(|| format!("{} does not run", self.name))?;
        loop {
            if let Some(status) = child.try_wait()? {
                self.child = None;
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {timeout:?}:\n{}", self.name, self.tail());
            }
            thread::sleep(POLL);
        }
    }

    /// Fails on the first warning or error that was not announced.
    pub fn judge(&self) -> Result<()> {
        let log = self.log();
        let bad = complaints(&log, &self.allowed);
        if bad.is_empty() {
            return Ok(());
        }
        bail!("{} logged what the test did not expect:\n{}", self.name, bad.join("\n"))
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        self.kill_9().ok();
        if thread::panicking() {
            eprintln!("harness: the end of {}'s log:\n{}", self.name, self.tail());
            return;
        }
        if self.judged {
            return;
        }
        if let Some(status) = ended {
            panic!("{} ended by itself ({status}):\n{}", self.name, self.tail());
        }
        if let Err(error) = self.judge() {
            panic!("{error}");
        }
    }
}

/// Lines of a log that complain, and have none of these texts.
pub fn complaints<'a, S: AsRef<str>>(log: &'a str, allowed: &[S]) -> Vec<&'a str> {
    let is_allowed = |line: &str| allowed.iter().any(|text| line.contains(text.as_ref()));
    log.lines().filter(|line| is_complaint(line) && !is_allowed(line)).collect()
}

/// A line of level WARN or ERROR, as text or JSON, or a panic.
fn is_complaint(line: &str) -> bool {
    let as_json = [r#""level":"WARN""#, r#""level":"ERROR""#].iter().any(|level| line.contains(level));
    // The level is the first or second word: a time may stand before it.
    let as_text = line.split_whitespace().take(2).any(|word| word == "WARN" || word == "ERROR");
    as_json || as_text || (line.starts_with("thread '") && line.contains("panicked at"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, Result<Daemon>) {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let daemon = Daemon::spawn("sh", dir.path(), command);
        (dir, daemon)
    }

    #[test]
    fn complaints_are_recognized_by_level() {
        assert!(is_complaint("2026-01-01T00:00:00Z  WARN agent: slow"));
        assert!(is_complaint("ERROR agent: gone"));
        assert!(is_complaint(r#"{"timestamp":"x","level":"ERROR","fields":{}}"#));
        assert!(is_complaint("thread 'main' panicked at src/main.rs:1:1:"));
        assert!(!is_complaint("2026-01-01T00:00:00Z  INFO agent: no WARN here"));
    }

    #[test]
    fn a_warning_fails_the_test_unless_announced() {
        let (_dir, daemon) = shell("echo ' WARN a: disk is slow'; echo ready; sleep 60");
        let mut daemon = daemon.unwrap();
        daemon.wait_for("ready", Duration::from_secs(10)).unwrap();
        assert!(daemon.judge().unwrap_err().to_string().contains("disk is slow"));
        daemon.allow("disk is slow");
        daemon.judge().unwrap();
    }

    #[test]
    fn one_that_ends_is_noticed_while_waiting() {
        let (_dir, daemon) = shell("echo bye; exit 3");
        let mut daemon = daemon.unwrap();
        let error = daemon.wait_for("never", Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("bye"), "{error}");
        assert_eq!(daemon.wait(Duration::from_secs(1)).unwrap().code(), Some(3));
    }

    #[test]
    #[should_panic(expected = "ended by itself")]
    fn one_that_ended_unasked_fails_the_test() {
        let (_dir, daemon) = shell("exit 0");
        let mut daemon = daemon.unwrap();
        while daemon.is_running().unwrap() {
            thread::sleep(POLL);
        }
        // `is_running` has collected it; the destructor must still tell.
        drop(daemon);
    }

    #[test]
    fn stopping_asks_first() {
        let (_dir, daemon) =
            shell("trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.05; done");
        let mut daemon = daemon.unwrap();
        daemon.wait_for("ready", Duration::from_secs(10)).unwrap();
        daemon.stop().unwrap();
    }

    #[test]
    fn killing_leaves_no_process() {
        let (_dir, daemon) = shell("sleep 60");
        let mut daemon = daemon.unwrap();
        let pid = daemon.pid().unwrap();
        daemon.kill_9().unwrap();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
