//! The thread that makes the calls into the kernel. It alone owns a frozen set from arming to disarming, so there is one
//! place that cleans up, whether the caller waits for it or not.

use super::{FreezeError, FreezeOptions, Frozen, FrozenFor, Thawed, ioctl, record};
use crate::{guardian::GuardianHandle, mounts::Filesystem};
use std::{
    fs::File,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel, sync_channel},
    },
    time::Instant,
};

pub(super) enum Report {
    Frozen { frozen: Vec<Frozen>, unfrozen: Vec<Filesystem>, deadline: Instant },
    Failed(FreezeError),
    Thawed(Thawed),
}

/// What the caller can see of the thread while it is inside the kernel.
#[derive(Default)]
pub(super) struct Progress {
    armed_at: OnceLock<Instant>,
    given_up: AtomicBool,
    index: AtomicUsize,
}

impl Progress {
    pub(super) fn armed_at(&self) -> Option<Instant> {
        self.armed_at.get().copied()
    }
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
    pub(super) fn at(&self, filesystems: &[Filesystem]) -> PathBuf {
        let index = self.index.load(Ordering::Relaxed);
        filesystems.get(index).map(|fs| fs.mount_point.clone()).unwrap_or_default()
    }
}

/// Starts the thread. Dropping the sender thaws.
pub(super) fn start(
    filesystems: Vec<Filesystem>,
    guardian: GuardianHandle,
    options: FreezeOptions,
) -> (Arc<Progress>, Sender<()>, Receiver<Report>) {
    let progress = Arc::new(Progress::default());
    let (release, released) = channel::<()>();
    // Room for all that is ever sent: the thread never waits for a caller that has left.
    let (report, reports) = sync_channel(2);
    let job = Job { filesystems, guardian, options, progress: Arc::clone(&progress), taken: Vec::new() };
    std::thread::spawn(move || {
        let mut job = job;
        let outcome = job.freeze();
        let frozen = outcome.is_ok();
        // After an error all is thawed first, so that the caller sees a clean machine.
        let thawed = if frozen {
            let _ = report.send(outcome.unwrap_or_else(Report::Failed));
            let _ = released.recv();
            job.end()
        } else {
            job.end();
            let _ = report.send(outcome.unwrap_or_else(Report::Failed));
            return;
        };
        let _ = report.send(Report::Thawed(thawed));
    });
    (progress, release, reports)
}

struct Job {
    filesystems: Vec<Filesystem>,
    guardian: GuardianHandle,
    options: FreezeOptions,
    progress: Arc<Progress>,
    taken: Vec<Taken>,
}

/// A filesystem frozen by us.
struct Taken {
    index: usize,
    file: File,
    started: Instant,
    enter_us: u64,
}

impl Job {
    fn freeze(&mut self) -> Result<Report, FreezeError> {
        let mut files = Vec::with_capacity(self.filesystems.len());
        for (index, filesystem) in self.filesystems.iter().enumerate() {
            self.progress.index.store(index, Ordering::Relaxed);
            let file = filesystem.open()?;
            if !filesystem.read_only {
                ioctl::sync(&file).map_err(|source| FreezeError::Failed {
                    mount_point: filesystem.mount_point.clone(),
                    source,
                })?;
            }
            files.push(file);
        }
        if self.progress.given_up.load(Ordering::Relaxed) {
            return Err(FreezeError::ThawHangs);
        }
        record::write(&self.options.run_dir, &self.filesystems)?;
        self.guardian.arm(&files, self.options.deadline)?;
        let armed_at = Instant::now();
        let _ = self.progress.armed_at.set(armed_at);
        let deadline = armed_at + self.options.deadline;
        let mut frozen = Vec::new();
        let mut unfrozen = Vec::new();
        for (index, file) in files.into_iter().enumerate() {
            self.progress.index.store(index, Ordering::Relaxed);
            let filesystem = &self.filesystems[index];
            if Instant::now() >= deadline || self.progress.given_up.load(Ordering::Relaxed) {
                return Err(FreezeError::Deadline {
                    mount_point: filesystem.mount_point.clone(),
                    limit: self.options.deadline,
                });
            }
            self.guardian.take(index)?;
            let started = Instant::now();
            match ioctl::freeze(&file) {
                Ok(()) => {
                    let enter_us = micros(started);
                    self.taken.push(Taken { index, file, started, enter_us });
                    frozen.push(Frozen {
                        mount_point: filesystem.mount_point.clone(),
                        fs_type: filesystem.fs_type.clone(),
                        enter_us,
                    });
                }
                Err(error) => {
                    // Not ours: the guardian must leave it alone.
                    self.guardian.release(index)?;
                    match error.raw_os_error() {
                        Some(libc::EOPNOTSUPP) => unfrozen.push(filesystem.clone()),
                        Some(libc::EBUSY) => {
                            let mount_point = filesystem.mount_point.clone();
                            return Err(FreezeError::AlreadyFrozen { mount_point });
                        }
                        _ => {
                            let mount_point = filesystem.mount_point.clone();
                            return Err(FreezeError::Failed { mount_point, source: error });
                        }
                    }
                }
            }
        }
        if Instant::now() >= deadline {
            let mount_point = self.progress.at(&self.filesystems);
            return Err(FreezeError::Deadline { mount_point, limit: self.options.deadline });
        }
        Ok(Report::Frozen { frozen, unfrozen, deadline })
    }

    /// Thaws what is frozen, disarms, removes the record.
    fn end(&mut self) -> Thawed {
        let mut intact = true;
        let mut filesystems = Vec::new();
        let first = self.taken.first().map(|taken| taken.started);
        for taken in self.taken.drain(..).rev() {
            match ioctl::thaw(&taken.file) {
                Ok(()) => {}
                // Thawed by the guardian, or by somebody else: either way certain, and not as it should be.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => intact = false,
                // Not certain: the guardian stays answerable.
                Err(_) => {
                    intact = false;
                    continue;
                }
            }
            let freeze_us = micros(taken.started);
            let _ = self.guardian.release(taken.index);
            let filesystem = &self.filesystems[taken.index];
            filesystems.push(FrozenFor {
                mount_point: filesystem.mount_point.clone(),
                fs_type: filesystem.fs_type.clone(),
                enter_us: taken.enter_us,
                freeze_us,
            });
        }
        filesystems.reverse();
        let total_us = first.map_or(0, micros);
        // What is beyond the kernel's own part is ours: ending the epoch, reading, checking, thawing.
        let enter_us: u64 = filesystems.iter().map(|frozen: &FrozenFor| frozen.enter_us).sum();
        tracing::debug!(total_us, enter_us, "thawed");
        let armed = self.progress.armed_at().is_some();
        let guardian_confirmed = armed && self.guardian.disarm().is_ok();
        if guardian_confirmed || !armed || intact {
            record::remove(&self.options.run_dir);
        }
        Thawed { filesystems, total_us, intact, guardian_confirmed }
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
