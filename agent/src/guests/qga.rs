//! A conversation with the guest agent of one guest (`qemu-ga`), by the socket that QEMU has for it.
//!
//! **Limits.** Each call has a moment by which it is over, whatever the guest does. An answer is [`answer::LINE_BYTES_MAX`] long at most, and
//! of what comes before it so much is thrown away ([`NOISE_BYTES_MAX`]), then the conversation is given up.
//!
//! **One at a time.** QEMU serves one client of the socket. A second one can connect (once: the kernel queues it) and is not heard
//! before the first one leaves; libvirt, for the guests that it manages, never does.
//!
//! **Order.** The guest does one command after the other, and goes on with them when the client has gone. So a thaw that was sent
//! behind a freeze ends that freeze, however late; and an answer to a thaw is an answer about everything sent before it.

use super::answer::{self, Answer, Line, Lines, SENTINEL};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Of what is no answer, in one call.
pub const NOISE_BYTES_MAX: usize = 1 << 20;
const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";
const STATUS: &str = "guest-fsfreeze-status";

/// Why a guest's agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum QgaError {
    /// The socket is not there, or not one.
    #[error("cannot connect to {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others are connected, and one more waits.
    #[error("{0} is in use by another program")]
    Busy(String),
    /// Nothing came in time.
    #[error("no answer to {0} in time")]
    Silent(&'static str),
    /// QEMU closed the connection, or it broke.
    #[error("the connection broke off")]
    Broken(#[source] io::Error),
    /// The agent says no.
    #[error("{command}: {why}")]
    Refused {
        /// To what.
        command: &'static str,
        /// Its words.
        why: String,
    },
    /// What it says is not understood.
    #[error("the answer to {0} is not understood")]
    Garbage(&'static str),
    /// It cannot freeze, or not thaw, which is worse.
    #[error("its agent does not offer freezing and thawing")]
    Unable,
    /// Somebody else has.
    #[error("its filesystems are frozen by another program")]
    AlreadyFrozen,
}

/// See the module.
#[derive(Debug)]
pub struct Qga {
    stream: UnixStream,
    lines: Lines,
    /// Read, and not yet looked at: 4 KiB at most.
    read: VecDeque<u8>,
}

impl Qga {
    /// Connects, and waits until the agent has answered to a number that it cannot know from before.
    ///
    /// # Errors
    /// Nobody answers by then.
    pub fn connect(path: &Path, until: Instant) -> Result<Self, QgaError> {
        let stream = open(path)?;
        let mut qga = Self { stream, lines: Lines::default(), read: VecDeque::new() };
        qga.greet(until)?;
        Ok(qga)
    }

    /// The socket, for the guardian.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether it offers to freeze and to thaw, and nothing is frozen.
    ///
    /// # Errors
    /// It does not, or something is; or no answer.
    pub fn ready(&mut self, until: Instant) -> Result<(), QgaError> {
        let info = self.call("guest-info", until)?;
        if !answer::offers(&info, &[FREEZE, THAW, STATUS]) {
            return Err(QgaError::Unable);
        }
        match self.call(STATUS, until)?.as_str() {
            Some("thawed") => Ok(()),
            Some("frozen") => Err(QgaError::AlreadyFrozen),
            _ => Err(QgaError::Garbage(STATUS)),
        }
    }

    /// Freezes all filesystems of the guest; answers how many.
    ///
    /// # Errors
    /// Whatever it is, they may be frozen, or become so: thaw.
    pub fn freeze(&mut self, until: Instant) -> Result<u64, QgaError> {
        self.count(FREEZE, until)
    }

    /// Thaws them; answers how many were frozen until now.
    ///
    /// # Errors
    /// They may still be frozen.
    pub fn thaw(&mut self, until: Instant) -> Result<u64, QgaError> {
        // After a freeze that was not answered in time, its answer still comes: skipped by the greeting's number.
        self.greet(until)?;
        self.count(THAW, until)
    }

    fn count(&mut self, command: &'static str, until: Instant) -> Result<u64, QgaError> {
        self.call(command, until)?.as_u64().ok_or(QgaError::Garbage(command))
    }

    fn greet(&mut self, until: Instant) -> Result<(), QgaError> {
        const COMMAND: &str = "guest-sync-delimited";
        let id = number();
        let greeting = json!({ "execute": COMMAND, "arguments": { "id": id } });
        let mut bytes = vec![SENTINEL];
        bytes.extend_from_slice(format!("{greeting}\n").as_bytes());
        self.send(&bytes, COMMAND, until)?;
        let mut noise = 0;
        loop {
            let line = self.line(COMMAND, until, &mut noise)?;
            if line.delimited && line.answer() == Answer::Return(id.into()) {
                return Ok(());
            }
            if noise > NOISE_BYTES_MAX {
                return Err(QgaError::Garbage(COMMAND));
            }
        }
    }

    fn call(&mut self, command: &'static str, until: Instant) -> Result<Value, QgaError> {
        self.send(format!("{}\n", json!({ "execute": command })).as_bytes(), command, until)?;
        match self.line(command, until, &mut 0)?.answer() {
            Answer::Return(value) => Ok(value),
            Answer::Error(why) => Err(QgaError::Refused { command, why }),
            Answer::Garbage => Err(QgaError::Garbage(command)),
        }
    }

    fn send(&mut self, bytes: &[u8], command: &'static str, until: Instant) -> Result<(), QgaError> {
        let left = left(until).ok_or(QgaError::Silent(command))?;
        self.stream.set_write_timeout(Some(left)).map_err(QgaError::Broken)?;
        self.stream.write_all(bytes).map_err(|error| failed(error, command))
    }

    /// The next line.
    fn line(&mut self, command: &'static str, until: Instant, noise: &mut usize) -> Result<Line, QgaError> {
        loop {
            while let Some(byte) = self.read.pop_front() {
                if let Some(line) = self.lines.push(byte) {
                    return Ok(line);
                }
            }
            if *noise > NOISE_BYTES_MAX {
                return Err(QgaError::Garbage(command));
            }
            let left = left(until).ok_or(QgaError::Silent(command))?;
            self.stream.set_read_timeout(Some(left)).map_err(QgaError::Broken)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(QgaError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => {
                    *noise += got;
                    self.read.extend(&buffer[..got]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error, command)),
            }
        }
    }
}

fn failed(error: io::Error, command: &'static str) -> QgaError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QgaError::Silent(command),
        _ => QgaError::Broken(error),
    }
}

fn left(until: Instant) -> Option<Duration> {
    Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

/// Connects without waiting for a place in the queue of the socket.
fn open(path: &Path) -> Result<UnixStream, QgaError> {
    let shown = || path.display().to_string();
    let fail = |errno: Errno| match errno {
        Errno::EAGAIN => QgaError::Busy(shown()),
        _ => QgaError::Connect { path: shown(), source: errno.into() },
    };
    let address = UnixAddr::new(path).map_err(fail)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(fail)?;
    connect(fd.as_raw_fd(), &address).map_err(fail)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false).map_err(QgaError::Broken)?;
    Ok(stream)
}

/// Not the one of any greeting before, of this process or another.
fn number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // What every JSON reader holds exactly: 53 bits.
    (now.as_nanos() as u64).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) & ((1 << 53) - 1)
}
