//! Guests of this KVM host, protected from here: their disks are block devices of the host, and their filesystems are frozen through the
//! QEMU guest agent. Nothing of Highwater runs in them.
//!
//! **Contract.** [`Guests::freeze`] freezes those guests that answer, at once and each within its own limit, and answers within the longest
//! of these whatever guests do. A guest that does not answer, refuses, or hangs holds up no other and no point: it is among
//! [`FrozenGuests::failed`], and the point is no more than crash-consistent for its disks. Dropped, all are thawed.
//!
//! **A freeze ends.** Each guest has a thread, which thaws however it is left, and a guardian process of its own, which is armed before the
//! freeze and thaws when the deadline passes or the agent is gone. If both are killed, [`thaw_left`] finds who was frozen in a record in the
//! run directory. What a guest does with a thaw that reached it is its own affair.
//!
//! **Proof.** A guest stood still from its answer to the freeze until the thaw only if the thaw is answered with as many filesystems as the
//! freeze was, in time, and not by the guardian ([`Stood`]). A guest that lies about that harms its own disks' points, and no others.
//!
//! **Caches of the host.** QEMU may write through the page cache of the host (`cache=writeback`, `unsafe`). After the freeze the guest's disks are
//! therefore written out here (`fsync` of the device): what the guest wrote before has then passed the block layer, whatever the mode.

pub mod answer;
pub mod discover;
pub mod libvirt;
mod one;
pub mod process;
pub mod qga;
mod record;

pub use record::thaw_left;

use crate::{
    device::DevNumber,
    error::Coded,
    guardian::{GuardianError, GuardianHandle, GuardianOptions},
};
use one::{Frozen, Job};
use qga::QgaError;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

/// The most guests of one host: each has a thread for the time of a freeze, and a small process.
pub const GUESTS_MAX: usize = 256;
/// Whoever does not greet back by then does not freeze either.
const GREETING: Duration = Duration::from_secs(2);
/// How long a thaw is waited for; the guardian goes on after that.
const THAW: Duration = Duration::from_secs(2);

/// A guest, as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestOptions {
    /// Its name, which is libvirt's or QEMU's where it is to be found by that.
    pub name: String,
    /// The socket of its agent; looked for if `None`.
    pub socket: Option<PathBuf>,
    /// Its disks, as devices of this host; looked for if empty.
    pub disks: Vec<PathBuf>,
    /// How long its freeze may take.
    pub freeze_timeout: Duration,
    /// Its own hooks (`qemu-ga -F`) make its applications stand still.
    pub application: bool,
}

/// Why a guest is not frozen, or was not until the end.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It is not there, or has no agent's socket.
    #[error("guest {name}: {why}")]
    NotFound {
        /// Which.
        name: String,
        /// What is missing.
        why: String,
    },
    /// Nothing came of asking its agent.
    #[error("guest {name} cannot be frozen")]
    Agent {
        /// Which.
        name: String,
        /// What came of it.
        #[source]
        source: QgaError,
    },
    /// No guardian, no freeze.
    #[error("guest {name} was not frozen")]
    Guardian {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: GuardianError,
    },
    /// It took longer than it may.
    #[error("guest {name} was not frozen within {limit:?}; it is being thawed")]
    Slow {
        /// Which.
        name: String,
        /// Its limit.
        limit: Duration,
    },
    /// It did not answer the last thaw yet.
    #[error("guest {name} is not frozen: its last thaw is not confirmed yet")]
    Busy {
        /// Which.
        name: String,
    },
    /// It was thawed before its time, or nobody knows.
    #[error("guest {name} did not stay frozen: {why}")]
    Thawed {
        /// Which.
        name: String,
        /// How that is known.
        why: String,
    },
    /// Something of this host.
    #[error("guest {name} was not frozen: {what}")]
    Host {
        /// Which.
        name: String,
        /// What failed.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Coded for GuestError {
    fn code(&self) -> u16 {
        match self {
            Self::NotFound { .. } => 1448,
            Self::Agent { source: QgaError::Refused { .. } | QgaError::Garbage(_), .. } => 1446,
            Self::Agent { source: QgaError::Unable | QgaError::AlreadyFrozen, .. } => 1446,
            Self::Agent { .. } | Self::Slow { .. } => 1445,
            Self::Busy { .. } | Self::Thawed { .. } => 1447,
            Self::Guardian { source, .. } => source.code(),
            Self::Host { .. } => 1448,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::NotFound { .. } => "See what `highwater-agent discover` finds, and name the guest, or its agent-socket and disks, \
                                      accordingly."
                .into(),
            Self::Agent { source: QgaError::Busy(_) | QgaError::Silent("guest-sync-delimited"), .. } => {
                "Look whether qemu-guest-agent runs in the guest, and whether another program (libvirt, for the guests that it \
                 manages) is connected to this socket: it serves one. Give Highwater a channel of its own; see \
                 OPERATIONS.md, \"Guests of a KVM host\"."
                    .into()
            }
            Self::Agent { source: QgaError::Unable | QgaError::Refused { .. }, .. } => {
                "Allow the guest-fsfreeze commands in the guest agent's configuration, and look in its log.".into()
            }
            Self::Agent { source: QgaError::AlreadyFrozen, .. } => {
                "Wait for the other program, or thaw the guest with `virsh domfsthaw` or in the guest.".into()
            }
            Self::Agent { .. } => "Look at qemu-guest-agent in the guest; the next point is tried as usual.".into(),
            Self::Slow { .. } => "Raise the guest's freeze-timeout if it needs longer; the next point is tried as usual.".into(),
            Self::Busy { .. } | Self::Thawed { .. } => {
                "Look whether the guest hangs, and who else freezes or thaws it; the next point is tried as usual.".into()
            }
            Self::Guardian { source, .. } => source.action(),
            Self::Host { .. } => "Correct the cause; the next point is tried as usual.".into(),
        }
    }
}

/// What is known of the guests between points.
pub struct Guests {
    all: Vec<Guest>,
    run_dir: PathBuf,
}

struct Guest {
    options: GuestOptions,
    guardian: GuardianOptions,
    /// Started when it is first needed.
    handle: Option<GuardianHandle>,
    /// Its thread is at work.
    busy: Arc<AtomicBool>,
}

impl Guests {
    /// Nothing is started yet.
    #[must_use]
    pub fn new(all: Vec<GuestOptions>, guardian: &GuardianOptions, run_dir: PathBuf) -> Self {
        let all = (all.into_iter())
            .map(|options| Guest { options, guardian: guardian.clone(), handle: None, busy: Arc::default() })
            .collect();
        Self { all, run_dir }
    }

    /// Whether there are any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Freezes them. `deadline`: how long they may stand still after that, before their guardians thaw them. `most`: how long all of them are waited for,
    /// if not as long as each may take.
    pub fn freeze(&mut self, deadline: Duration, most: Option<Duration>) -> FrozenGuests {
        let mut result = FrozenGuests { waiting: vec![], frozen: vec![], failed: vec![] };
        let began = Instant::now();
        let found = discover::Lookup::default();
        for (slot, guest) in self.all.iter_mut().enumerate() {
            match guest.begin((slot, &self.run_dir), &found, deadline, most) {
                Ok(waiting) => result.waiting.push(waiting),
                Err((error, disks)) => {
                    let name = guest.options.name.clone();
                    result.failed.push(Failed { name, error, disks });
                }
            }
        }
        result.gather(began);
        result
    }
}

impl Guest {
    fn begin(
        &mut self,
        (slot, run_dir): (usize, &std::path::Path),
        found: &discover::Lookup,
        deadline: Duration,
        most: Option<Duration>,
    ) -> Result<Waiting, (GuestError, Vec<DevNumber>)> {
        let name = self.options.name.clone();
        let place = found.place(&self.options);
        let disks =
            place.disks.iter().filter_map(|path| crate::device::inspect(path).ok()).map(|d| d.dev).collect();
        let Some(socket) = place.socket else {
            return Err((GuestError::NotFound { name, why: place.why }, disks));
        };
        if self.busy.load(Ordering::Acquire) {
            return Err((GuestError::Busy { name }, disks));
        }
        let guardian = match &self.handle {
            Some(handle) => handle.clone(),
            None => match GuardianHandle::spawn(self.guardian.clone()) {
                Ok(handle) => self.handle.insert(handle).clone(),
                Err(source) => return Err((GuestError::Guardian { name, source }, disks)),
            },
        };
        let job = Job {
            name: name.clone(),
            record: record::path(run_dir, slot),
            socket,
            disks: place.disks,
            guardian,
            limit: self.options.freeze_timeout,
            deadline,
            busy: self.busy.clone(),
        };
        let (release, reports) = job.start().map_err(|error| (error, disks.clone()))?;
        let own = GREETING + self.options.freeze_timeout;
        let limit = most.map_or(own, |most| most.min(own));
        Ok(Waiting { name, disks, application: self.options.application, limit, release, reports })
    }
}

struct Waiting {
    name: String,
    disks: Vec<DevNumber>,
    application: bool,
    limit: Duration,
    /// Dropped, it thaws.
    release: Sender<()>,
    reports: Receiver<one::Report>,
}

/// A guest that is not frozen.
#[derive(Debug)]
pub struct Failed {
    /// Which.
    pub name: String,
    /// Why.
    pub error: GuestError,
    /// Its disks.
    pub disks: Vec<DevNumber>,
}

/// Guests that stand still until this is thawed or dropped.
pub struct FrozenGuests {
    waiting: Vec<Waiting>,
    frozen: Vec<(Waiting, Frozen)>,
    /// Those that do not.
    pub failed: Vec<Failed>,
}

/// A guest that stood still.
#[derive(Debug)]
pub struct Stood {
    /// Which.
    pub name: String,
    /// Its disks.
    pub disks: Vec<DevNumber>,
    /// Its applications too, by its own hooks.
    pub application: bool,
}

impl FrozenGuests {
    /// None, and nothing to thaw.
    #[must_use]
    pub fn none() -> Self {
        Self { waiting: vec![], frozen: vec![], failed: vec![] }
    }

    fn gather(&mut self, began: Instant) {
        for waiting in self.waiting.drain(..) {
            let left = (began + waiting.limit).saturating_duration_since(Instant::now());
            match waiting.reports.recv_timeout(left) {
                Ok(one::Report::Frozen(frozen)) => {
                    self.frozen.push((waiting, frozen));
                }
                Ok(one::Report::Failed(error)) => {
                    self.failed.push(Failed { name: waiting.name, error, disks: waiting.disks });
                }
                // Its thread sees that nobody waits, and thaws.
                _ => {
                    let error = GuestError::Slow { name: waiting.name.clone(), limit: waiting.limit };
                    self.failed.push(Failed { name: waiting.name, error, disks: waiting.disks });
                }
            }
        }
    }

    /// How many stand still.
    #[must_use]
    pub fn count(&self) -> usize {
        self.frozen.len()
    }

    /// Thaws them all. Answers those that stood still until now; the others are told as failed. Takes 2 s at most, and is thawing on
    /// after that.
    #[must_use]
    pub fn thaw(self) -> (Vec<Stood>, Vec<Failed>) {
        let mut failed = self.failed;
        let mut stood = vec![];
        let until = Instant::now() + THAW;
        // All at once, then one answer after the other.
        let ending: Vec<_> = (self.frozen.into_iter())
            .map(|(waiting, frozen)| {
                drop(waiting.release);
                (waiting.name, waiting.disks, waiting.application, waiting.reports, frozen)
            })
            .collect();
        for (name, disks, application, reports, frozen) in ending {
            let why = match reports.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(one::Report::Thawed { count, in_time: true }) if count >= frozen.count => {
                    stood.push(Stood { name, disks, application });
                    continue;
                }
                Ok(one::Report::Thawed { in_time: false, .. }) => "the deadline passed".to_owned(),
                Ok(one::Report::Thawed { count, .. }) => {
                    format!("{} filesystems were frozen, {count} still were at the end", frozen.count)
                }
                Ok(one::Report::Failed(error)) => crate::error::chain(&error),
                _ => "it does not answer the thaw; its guardian keeps at it".to_owned(),
            };
            let error = GuestError::Thawed { name: name.clone(), why };
            failed.push(Failed { name, error, disks });
        }
        (stood, failed)
    }
}
