//! The guardian: a separate tiny process that thaws what the agent froze when the agent no longer can.
//!
//! **Contract.** The agent arms it with the open mount points *before* freezing, tells it before each freeze (`take`) and after
//! each thaw (`release`), and disarms it. When the deadline passes, or the agent is gone in whatever way (its end of the
//! socket closes, which the kernel does on kill -9 too), the guardian thaws whatever is taken, again and again until each
//! filesystem answers that it is not frozen: a freeze can still be under way in the kernel when its caller is killed. It
//! never thaws what the agent did not take, so another program's freeze is left alone.
//!
//! **Order.** Arm → take → freeze → … → thaw → release → disarm. Without an answer to the arming nothing may be frozen.
//!
//! **Guests** ([`crate::guests`]) have a guardian each, armed with the connection to the guest's agent; one that never answers is then
//! nobody else's trouble.
//!
//! **If the guardian dies**, the next `take` fails and the freeze is given up; [`GuardianHandle::arm`] starts a new one.
//!
//! **What is left to the unit**: systemd must not kill the guardian with the agent (`KillMode=mixed` kills it last), and
//! `ExecStopPost=` runs [`crate::freeze::thaw_all`] for the case that both were killed.

mod guest;
pub mod process;
mod protocol;

pub use protocol::ARMED_MAX;

use crate::error::Coded;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use protocol::{
    ARM, ARM_GUEST, BUSY, DISARM, DONE, EXPIRED, PING, Packet, RELEASE, Received, TAKE, receive, send,
};
use std::{
    fs::File,
    io::{self, IoSlice},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// How long an answer may take that needs no filesystem.
const ANSWER: Duration = Duration::from_secs(2);
/// How long the guardian may take to make sure that all is thawed.
const ANSWER_DISARM: Duration = Duration::from_secs(10);
/// Stale answers (of requests given up) that are skipped.
const STALE_MAX: usize = 64;

/// Why there is no guardian to rely on. Whatever the reason, nothing is frozen then.
#[derive(Debug, thiserror::Error)]
pub enum GuardianError {
    /// The program cannot be started.
    #[error("cannot start the guardian {program}")]
    Start {
        /// What was started.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not answer, or its socket is broken.
    #[error("the guardian does not answer")]
    Silent(#[source] io::Error),
    /// It still has to do with an earlier freeze.
    #[error("the guardian still waits for the end of an earlier freeze")]
    Busy,
    /// More filesystems than one arming takes.
    #[error("{count} filesystems are too many to freeze together (at most {ARMED_MAX})")]
    TooMany {
        /// How many.
        count: usize,
    },
}

impl Coded for GuardianError {
    fn code(&self) -> u16 {
        match self {
            Self::Start { .. } => 1425,
            Self::Silent(_) => 1426,
            Self::Busy => 1427,
            Self::TooMany { .. } => 1428,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::Start { .. } => {
                "Reinstall the package, or set guardian-path to where highwater-guardian is.".into()
            }
            Self::Silent(_) => {
                "Nothing is frozen without it; it is started anew for the next point. If this repeats, report it.".into()
            }
            Self::Busy => "Look for a filesystem that hangs (`dmesg`); the next point is tried as usual.".into(),
            Self::TooMany { .. } => "Protect fewer disks with this agent.".into(),
        }
    }
}

/// How to start it.
#[derive(Clone, Debug, Default)]
pub struct GuardianOptions {
    /// The program; `None`: `highwater-guardian` beside the agent's own executable.
    pub program: Option<PathBuf>,
    /// Where it records what it had to do; should lie on a tmpfs. `None`: nowhere.
    pub log: Option<PathBuf>,
}

/// The outcome of a disarming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disarmed {
    /// The deadline passed before: what was read under the freeze is not consistent.
    pub expired: bool,
    /// How many filesystems the guardian found frozen and thawed.
    pub thawed: u32,
}

/// The agent's end. Cheap to clone; all clones speak to one guardian. Calls block, boundedly.
#[derive(Clone, Debug)]
pub struct GuardianHandle {
    shared: Arc<Mutex<Link>>,
}

#[derive(Debug)]
struct Link {
    options: GuardianOptions,
    alive: Option<Live>,
    seq: u32,
}

#[derive(Debug)]
struct Live {
    socket: UnixDatagram,
    child: Child,
}

impl GuardianHandle {
    /// Starts a guardian and waits for its first answer.
    ///
    /// # Errors
    /// It cannot be started or does not answer.
    pub fn spawn(options: GuardianOptions) -> Result<Self, GuardianError> {
        let mut link = Link { options, alive: None, seq: 0 };
        link.ensure()?;
        Ok(Self { shared: Arc::new(Mutex::new(link)) })
    }

    /// Whether it is there and answers; starts another one if not.
    ///
    /// # Errors
    /// There is none, and none can be started.
    pub fn check(&self) -> Result<(), GuardianError> {
        self.lock().ensure()
    }

    /// The process id of the present guardian.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.lock().alive.as_ref().map(|live| live.child.id())
    }

    /// Arms it with these filesystems, in freeze order.
    ///
    /// # Errors
    /// No answer, or it is busy. Then nothing may be frozen.
    pub fn arm(&self, files: &[File], deadline: Duration) -> Result<(), GuardianError> {
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        self.arm_with(ARM, &fds, deadline)
    }

    /// Arms it with a guest, by the connection to its agent; its index is 0.
    ///
    /// # Errors
    /// As [`Self::arm`].
    pub fn arm_guest(&self, connection: &UnixStream, deadline: Duration) -> Result<(), GuardianError> {
        self.arm_with(ARM_GUEST, &[connection.as_raw_fd()], deadline)
    }

    fn arm_with(&self, word: u32, fds: &[RawFd], deadline: Duration) -> Result<(), GuardianError> {
        if fds.len() > ARMED_MAX {
            return Err(GuardianError::TooMany { count: fds.len() });
        }
        let mut link = self.lock();
        link.ensure()?;
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        match link.ask(word, deadline_ms, count, fds, ANSWER)?.word {
            DONE => Ok(()),
            BUSY => Err(GuardianError::Busy),
            _ => Err(link.lost(io::Error::other("the guardian refused to be armed"))),
        }
    }

    /// The filesystem with this index is about to be frozen.
    ///
    /// # Errors
    /// The guardian is gone: do not freeze.
    pub fn take(&self, index: usize) -> Result<(), GuardianError> {
        self.lock().tell(TAKE, index)
    }

    /// The filesystem with this index is thawed, or was not frozen by the agent.
    ///
    /// # Errors
    /// The guardian is gone.
    pub fn release(&self, index: usize) -> Result<(), GuardianError> {
        self.lock().tell(RELEASE, index)
    }

    /// Ends the arming: when this returns, everything taken and not released has been seen not to be frozen. No freeze
    /// may be under way any more.
    ///
    /// # Errors
    /// No answer in time; if it lives, it goes on thawing.
    pub fn disarm(&self) -> Result<Disarmed, GuardianError> {
        let mut link = self.lock();
        if link.alive.is_none() {
            return Err(GuardianError::Silent(io::ErrorKind::NotConnected.into()));
        }
        let answer = link.ask(DISARM, 0, 0, &[], ANSWER_DISARM)?;
        Ok(Disarmed { expired: answer.word == EXPIRED, thawed: answer.a })
    }

    fn lock(&self) -> MutexGuard<'_, Link> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn ensure(&mut self) -> Result<(), GuardianError> {
        if let Some(live) = &mut self.alive {
            let runs = matches!(live.child.try_wait(), Ok(None));
            if runs && self.ask(PING, 0, 0, &[], ANSWER).is_ok() {
                return Ok(());
            }
        }
        self.alive = None;
        self.alive = Some(self.start()?);
        self.ask(PING, 0, 0, &[], ANSWER).map(|_| ())
    }

    fn start(&self) -> Result<Live, GuardianError> {
        let program = match &self.options.program {
            Some(program) => program.clone(),
            None => std::env::current_exe()
                .map_err(|source| GuardianError::Start { program: "highwater-guardian".into(), source })?
                .with_file_name("highwater-guardian"),
        };
        let fail = |source: io::Error| GuardianError::Start { program: program.clone(), source };
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|errno| fail(errno.into()))?;
        let mut command = Command::new(&program);
        if let Some(log) = &self.options.log {
            command.arg("--log").arg(log);
        }
        let child = command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(fail)?;
        let socket = UnixDatagram::from(ours);
        Ok(Live { socket, child })
    }

    fn tell(&mut self, word: u32, index: usize) -> Result<(), GuardianError> {
        let Some(live) = &self.alive else {
            return Err(GuardianError::Silent(io::ErrorKind::NotConnected.into()));
        };
        let packet = Packet { word, seq: 0, a: u32::try_from(index).unwrap_or(u32::MAX), b: 0 };
        send(live.socket.as_raw_fd(), packet).map_err(GuardianError::Silent)
    }

    fn ask(
        &mut self,
        word: u32,
        a: u32,
        b: u32,
        fds: &[RawFd],
        patience: Duration,
    ) -> Result<Packet, GuardianError> {
        self.seq = self.seq.wrapping_add(1);
        let request = Packet { word, seq: self.seq, a, b };
        let Some(live) = &self.alive else {
            return Err(GuardianError::Silent(io::ErrorKind::NotConnected.into()));
        };
        live.exchange(request, fds, patience).map_err(GuardianError::Silent)
    }

    /// Ends a guardian that does not keep to the protocol; closing its socket makes it thaw and leave.
    fn lost(&mut self, source: io::Error) -> GuardianError {
        self.alive = None;
        GuardianError::Silent(source)
    }
}

impl Live {
    fn exchange(&self, request: Packet, fds: &[RawFd], patience: Duration) -> io::Result<Packet> {
        self.socket.set_read_timeout(Some(patience))?;
        self.socket.set_write_timeout(Some(patience))?;
        let bytes = request.encode();
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let vector = [IoSlice::new(&bytes)];
        sendmsg::<()>(self.socket.as_raw_fd(), &vector, control, MsgFlags::MSG_NOSIGNAL, None)?;
        let mut none = [-1; ARMED_MAX];
        for _ in 0..STALE_MAX {
            match receive(self.socket.as_raw_fd(), &mut none)? {
                Received::Packet(Some(answer), _) if answer.seq == request.seq => return Ok(answer),
                Received::Packet(..) => {}
                Received::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Err(io::Error::other("the guardian answers something else"))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // Closing the socket (all other references are gone) makes the guardian thaw and leave; a guardian that does not
        // within this time is left to itself, and reaped by init later.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        for _ in 0..50 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
