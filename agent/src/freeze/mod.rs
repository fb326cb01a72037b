//! Freezing all filesystems of the protected disks together, for a moment.
//!
//! **Contract.** [`FrozenSet::freeze`] returns with all of them frozen, or with an error and all thawed (or being thawed). It
//! never blocks beyond its limits: the calls into the kernel are made by a thread of their own, which thaws and cleans up
//! by itself if the caller has given up on it. A dropped set is thawed. A killed agent's set is thawed by the guardian,
//! which is armed before anything is frozen; without a guardian nothing is frozen. If both are killed, [`thaw_all`] finds
//! what was armed in a record in the run directory.
//!
//! **Exactness.** A state read under the freeze counts only if [`Thawed::intact`] holds afterwards: every filesystem was still
//! frozen when the agent thawed it. Filesystems that cannot freeze (vfat) are listed by [`FrozenSet::unfrozen`]: they are
//! synced, and the caller must see from the tracker that nothing wrote while it read.
//!
//! **Order.** As given ([`crate::mounts::survey`]: top of the stack first), thawed the other way round.

pub(crate) mod ioctl;
mod record;
mod worker;

pub use record::{ThawedAll, thaw_all};

use crate::{
    error::Coded,
    guardian::{GuardianError, GuardianHandle},
    mounts::{Filesystem, MountsError},
};
use std::{
    io,
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};
use worker::{Progress, Report};

/// How long past its deadline a thaw is waited for before the caller is told that it hangs.
const THAW_GRACE: Duration = Duration::from_secs(2);

/// Why nothing is frozen (any more).
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No guardian.
    #[error("nothing was frozen")]
    Guardian(#[from] GuardianError),
    /// A filesystem is out of reach.
    #[error("nothing was frozen")]
    Mounts(#[from] MountsError),
    /// The record of what is armed cannot be kept.
    #[error("cannot write {path}")]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else has frozen it.
    #[error("{mount_point} is frozen by another program")]
    AlreadyFrozen {
        /// Which.
        mount_point: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot freeze {mount_point}")]
    Failed {
        /// Which.
        mount_point: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Syncing before the freeze took too long. Nothing was frozen.
    #[error("writing out {mount_point} before the freeze took longer than {limit:?}")]
    SyncSlow {
        /// Which.
        mount_point: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// The deadline passed before all were frozen.
    #[error("freezing {mount_point} took longer than {limit:?}; all is being thawed")]
    Deadline {
        /// At which.
        mount_point: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// A thaw hangs; guardian and helper thread keep at it.
    #[error("thawing hangs in the kernel")]
    ThawHangs,
}

impl Coded for FreezeError {
    fn code(&self) -> u16 {
        match self {
            Self::Guardian(error) => error.code(),
            Self::Mounts(error) => error.code(),
            Self::Record { .. } | Self::Failed { .. } => 1430,
            Self::AlreadyFrozen { .. } => 1431,
            Self::SyncSlow { .. } => 1432,
            Self::Deadline { .. } => 1433,
            Self::ThawHangs => 1434,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::Guardian(error) => error.action(),
            Self::Mounts(error) => error.action(),
            Self::Record { .. } => "Check the run-dir of the configuration; it should be on a tmpfs.".into(),
            Self::Failed { .. } => "Check the filesystem (`dmesg`); the next point is tried as usual.".into(),
            Self::AlreadyFrozen { .. } => {
                "Wait for it, or thaw it with `fsfreeze --unfreeze`; the next point is tried as usual.".into()
            }
            Self::SyncSlow { .. } => "The disk is slower than its writers; the next point is tried as usual.".into(),
            Self::Deadline { .. } => {
                "Raise replication.freeze-deadline if the disk needs longer; the next point is tried as usual.".into()
            }
            Self::ThawHangs => "Look for a device that hangs (`dmesg`).".into(),
        }
    }
}

/// Limits of a freeze.
#[derive(Clone, Debug)]
pub struct FreezeOptions {
    /// From the first filesystem's freeze to the last one's thaw; the guardian thaws when it passes.
    pub deadline: Duration,
    /// For writing out the filesystems beforehand, while nothing is frozen.
    pub sync_limit: Duration,
    /// Where the record of what is armed is kept; should be a tmpfs.
    pub run_dir: PathBuf,
}

/// A frozen filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Its type.
    pub fs_type: String,
    /// What the kernel's own freeze took: writing out what was dirty.
    pub enter_us: u64,
}

/// How long a filesystem was frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenFor {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Its type.
    pub fs_type: String,
    /// What the kernel's own freeze took.
    pub enter_us: u64,
    /// From the start of its freeze to the end of its thaw: how long writers may have waited.
    pub freeze_us: u64,
}

/// The end of a freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// One for each, in freeze order.
    pub filesystems: Vec<FrozenFor>,
    /// From the first one's freeze to the last one's thaw.
    pub total_us: u64,
    /// All were frozen until the agent itself thawed them. If not, what was read meanwhile is no recovery point.
    pub intact: bool,
    /// Whether the guardian confirmed that all is thawed. If not, it is started anew for the next freeze.
    pub guardian_confirmed: bool,
}

/// Filesystems that are frozen until this is thawed or dropped.
#[derive(Debug)]
pub struct FrozenSet {
    frozen: Vec<Frozen>,
    unfrozen: Vec<Filesystem>,
    deadline: Instant,
    release: Option<Sender<()>>,
    reports: Receiver<Report>,
}

impl FrozenSet {
    /// Writes out these filesystems, then freezes them in this order. Blocks for `sync_limit` plus `deadline` at most.
    ///
    /// # Errors
    /// Then all of them are thawed, or (after [`FreezeError::Deadline`]) will be as soon as the kernel lets go.
    pub fn freeze(
        filesystems: &[Filesystem],
        guardian: &GuardianHandle,
        options: &FreezeOptions,
    ) -> Result<Self, FreezeError> {
        let (progress, release, reports) =
            worker::start(filesystems.to_vec(), guardian.clone(), options.clone());
        let report = wait(&reports, &progress, options.sync_limit, |progress| progress.armed_at().is_some());
        let report = match report {
            Waited::Report(report) => report,
            Waited::Reached => {
                let armed_at = progress.armed_at().unwrap_or_else(Instant::now);
                let left = (armed_at + options.deadline).saturating_duration_since(Instant::now());
                match wait(&reports, &progress, left, |_| false) {
                    Waited::Report(report) => report,
                    Waited::Reached | Waited::Late => {
                        progress.give_up();
                        let mount_point = progress.at(filesystems);
                        return Err(FreezeError::Deadline { mount_point, limit: options.deadline });
                    }
                }
            }
            Waited::Late => {
                progress.give_up();
                let mount_point = progress.at(filesystems);
                return Err(FreezeError::SyncSlow { mount_point, limit: options.sync_limit });
            }
        };
        match report {
            Report::Frozen { frozen, unfrozen, deadline } => {
                Ok(Self { frozen, unfrozen, deadline, release: Some(release), reports })
            }
            Report::Failed(error) => Err(error),
            Report::Thawed(_) => Err(FreezeError::ThawHangs),
        }
    }

    /// What is frozen, in freeze order.
    #[must_use]
    pub fn frozen(&self) -> &[Frozen] {
        &self.frozen
    }

    /// What cannot be frozen, for want of support in its filesystem; only synced.
    #[must_use]
    pub fn unfrozen(&self) -> &[Filesystem] {
        &self.unfrozen
    }

    /// Until the guardian thaws.
    #[must_use]
    pub fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Thaws all, in reverse order.
    ///
    /// # Errors
    /// A thaw hangs; it is being tried further.
    pub fn thaw(mut self) -> Result<Thawed, FreezeError> {
        self.let_go().unwrap_or(Err(FreezeError::ThawHangs))
    }

    fn let_go(&mut self) -> Option<Result<Thawed, FreezeError>> {
        let release = self.release.take()?;
        // Dropping the sender is the signal; it works even if the thread is gone.
        drop(release);
        let patience = self.time_left() + THAW_GRACE;
        match self.reports.recv_timeout(patience) {
            Ok(Report::Thawed(thawed)) => Some(Ok(thawed)),
            _ => Some(Err(FreezeError::ThawHangs)),
        }
    }
}

impl Drop for FrozenSet {
    fn drop(&mut self) {
        // An error here has its second and third line of defence in the thread and the guardian.
        let _ = self.let_go();
    }
}

enum Waited {
    Report(Report),
    Reached,
    Late,
}

fn wait(
    reports: &Receiver<Report>,
    progress: &Progress,
    limit: Duration,
    reached: impl Fn(&Progress) -> bool,
) -> Waited {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match reports.recv_timeout(left.min(Duration::from_millis(20))) {
            Ok(report) => return Waited::Report(report),
            Err(RecvTimeoutError::Disconnected) => {
                let error = io::Error::other("the freezing thread ended unexpectedly");
                return Waited::Report(Report::Failed(FreezeError::Guardian(GuardianError::Silent(error))));
            }
            Err(RecvTimeoutError::Timeout) if reached(progress) => return Waited::Reached,
            Err(RecvTimeoutError::Timeout) if left.is_zero() => return Waited::Late,
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
