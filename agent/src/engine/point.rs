//! Making a recovery point in bitmap mode: live rounds until little is left, then a freeze.
//!
//! 1. Write out the filesystems, end the epoch, send what it marked, live; again until the rest fits the freeze budget.
//! 2. Freeze every filesystem of the machine's disks, end the epoch, read the rest into memory, thaw.
//! 3. Send the rest, commit.
//!
//! A live read may see a block half-way between two writes; the block is then marked in a later epoch and read again, at
//! the latest under the freeze. So what the delta holds at its end is the content at the freeze.
//!
//! What no freeze holds still (a disk without a filesystem, a raw partition, a filesystem that cannot freeze) may be
//! written to meanwhile. So every point is checked before the thaw: nothing is in flight, and nothing was marked since the
//! epoch ended. Otherwise there is no point, and the status says why. A disk without a filesystem thus gets its points when
//! its writers pause, or with a freeze hook that makes them.

use super::{
    Engine,
    disk::Disk,
    guests::GuestRank,
    send::{HeldRun, OpenDelta, SendError},
    state::DiskState,
};
use crate::{
    capture::{CaptureError, Loss},
    device::{self, BlockDevice},
    error::Coded,
    freeze::FreezeError,
    mounts::{self, Filesystem, MountsError, Survey},
    tracker::TrackerError,
};
use highwater_delta::{BlockRange, CommitKind, DeltaId, DiskId, PointDisk, PointInfo};
use highwater_wire::message::AgentMessage;
use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Why there is no point this time. Nothing is lost: the blocks stay pending.
#[derive(Debug, thiserror::Error)]
pub(super) enum PointError {
    /// Sending failed.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The tracker failed.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// What lies on the disks could not be found out.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// The filesystems could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Writes come faster than they can be sent.
    #[error("{left_bytes} bytes were left after {rounds} rounds, more than may be read under a freeze")]
    NotConverging {
        /// What remained.
        left_bytes: u64,
        /// Rounds made.
        rounds: u32,
    },
    /// The guardian thawed before all was read.
    #[error("the freeze ended before all was read")]
    Thawed,
    /// The kernel does not count a disk's I/O: it cannot be seen whether the disk is at rest.
    #[error("the kernel does not count the I/O of disk {0}: switch it on again in its queue/iostats")]
    NotCounted(String),
    /// Something that no freeze holds still was written to.
    #[error(
        "disk {0} was written to while it was read: not all of its writers are held still by freezing filesystems"
    )]
    Written(String),
    /// A disk became suspect.
    #[error("a disk is suspect")]
    Suspect,
    /// The operator's hook failed.
    #[error("the freeze hook failed: {0}")]
    Hook(String),
    /// The captured stream lacks something.
    #[error("the captured stream is not complete: {0}")]
    Lost(Loss),
    /// The kernel refused something about capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The captured stream cannot be used.
    #[error("the captured stream cannot be used: {0}")]
    Disordered(&'static str),
    /// It was to be the group's.
    #[error("the group had given up its point before all was frozen here")]
    GivenUp,
}

impl PointError {
    pub(super) fn code(&self) -> u16 {
        match self {
            Self::Send(_) => 1463,
            Self::Tracker(e) => e.code(),
            Self::Mounts(e) => e.code(),
            Self::Freeze(e) => e.code(),
            Self::NotConverging { .. } => 1464,
            Self::Thawed => 1465,
            Self::Written(_) => 1466,
            Self::NotCounted(_) => 1488,
            Self::Suspect => 1460,
            Self::Hook(_) => 1467,
            Self::Lost(_) => 1495,
            Self::Capture(e) => e.code(),
            Self::Disordered(_) => 1496,
            Self::GivenUp => 1458,
        }
    }
    /// A word for metrics.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Lost(loss) => loss.as_str(),
            Self::Disordered(_) => "stalled",
            Self::Suspect => "suspect",
            _ => "failed",
        }
    }
}

/// What was read of each disk.
type HeldDisks = Vec<(DiskId, Vec<HeldRun>)>;

/// What the kernel counts as written and discarded, in sectors.
type Written = BTreeMap<DiskId, Option<(u64, u64)>>;

/// What came of a freeze.
enum Attempt {
    /// A consistent state.
    Point(Frozen),
    /// Something wrote meanwhile. What was read has been taken from the ledger, so it is sent like a live round's; whatever
    /// changed since is marked, and read again.
    Moved { disk: String, runs: Vec<(DiskId, Vec<HeldRun>)> },
}

/// What was read under the freeze.
struct Frozen {
    runs: HeldDisks,
    taken_at_ms: u64,
    freeze_us: u64,
    /// Applications stood still, from before the freeze until after it.
    application: bool,
    /// How guests left their disks.
    guests: Vec<GuestRank>,
}

impl Engine {
    /// Whether a point can be made now: something is replicated, and nothing is in doubt.
    pub(super) fn points_possible(&self) -> bool {
        self.disks.iter().all(|d| d.state.state().allows_points())
            && self.disks.iter().any(|d| *d.state.state() == DiskState::Bitmap && d.device.is_some())
    }

    /// Tries to make a point; whatever comes of it, the next one is due an interval later.
    pub(super) fn make_point(&mut self) {
        let (started, due) = (Instant::now(), self.point_due);
        self.point_due = started + self.options.point_interval;
        match self.try_point() {
            Ok(()) => self.point_trouble = None,
            Err(error @ PointError::GivenUp) => {
                tracing::info!(code = "HW-1458", %error, "no freeze this time");
                // Nobody's own point was tried.
                self.point_due = due;
                self.forget_taken();
            }
            Err(PointError::Send(SendError::LinkDown)) => self.wait_for_link_down(),
            Err(PointError::Send(SendError::Source(id, error))) => {
                self.unreadable(id, &error);
                // The others at once, and whoever asked for the point gets it without this disk.
                self.point_due = started;
            }
            Err(PointError::Send(error)) => {
                let id = self.disks.first().map_or_else(DiskId::new, super::disk::Disk::id);
                self.on_send_error(id, &error);
            }
            Err(error) => {
                let code = format!("HW-{}", error.code());
                tracing::warn!(code, %error, "no recovery point this time; nothing is lost");
                self.point_trouble = Some(format!("{code}: {error}"));
                for waiting in self.point_wanted.drain(..) {
                    let _ = waiting.send(super::control::refused(error.code(), &error.to_string()));
                }
                // What was taken for the abandoned delta is pending, and read again.
                self.forget_taken();
            }
        }
    }

    fn try_point(&mut self) -> Result<(), PointError> {
        self.pulse.work();
        self.board.put(self.status());
        let (devices, members): (Vec<_>, Vec<DiskId>) = (self.disks.iter())
            .filter(|d| *d.state.state() == DiskState::Bitmap)
            .filter_map(|d| d.device.clone().map(|device| (device, d.id())))
            .unzip();
        for device in &devices {
            if !device::iostats_on(device.whole).unwrap_or(true) {
                return Err(PointError::NotCounted(device.path.display().to_string()));
            }
        }
        let mut survey = mounts::survey(&devices)?;
        self.leave_out_swap(&members, &survey);
        let delta = DeltaId::new();
        let open = self.open_delta(delta)?;
        open.begin()?;
        let made = self.rounds(&open, &members, &devices, &mut survey);
        let frozen = match made {
            Ok(frozen) => frozen,
            Err(error) => {
                self.tell(AgentMessage::DeltaAbort(delta));
                return Err(error);
            }
        };
        for (disk, runs) in frozen.runs {
            open.send_held(disk, runs)?;
        }
        open.check_complete()?;
        let info = PointInfo {
            consistency: self.consistency(&members, frozen.application, &frozen.guests),
            taken_at_ms: frozen.taken_at_ms,
            freeze_us: frozen.freeze_us,
            disks: (self.disks.iter())
                .filter(|d| members.contains(&d.id()))
                .map(|d| PointDisk { disk: d.id(), size_bytes: d.size_bytes() })
                .collect(),
        };
        let chunks = open.chunks.load(Ordering::Acquire);
        self.commit(&open.queue, delta, chunks, CommitKind::Point(info))?;
        Ok(())
    }

    /// Live rounds, then the freeze; again if too much came in between.
    fn rounds(
        &mut self,
        open: &OpenDelta,
        members: &[DiskId],
        devices: &[BlockDevice],
        survey: &mut Survey,
    ) -> Result<Frozen, PointError> {
        let budget = self.options.freeze_budget_bytes;
        let mut rounds = 0;
        let mut quiet_tries = 0;
        loop {
            self.pulse.work();
            write_out(&survey.filesystems, self.options.freeze.sync_limit);
            self.epoch_of(members)?;
            let left = self.left(members);
            // One live round costs little and shortens the freeze; more only as long as there is too much.
            if left > budget || (rounds == 0 && left > budget / 8) {
                if rounds >= self.options.rounds_max {
                    return Err(PointError::NotConverging { left_bytes: left, rounds });
                }
                rounds += 1;
                for id in members {
                    self.send_live(open, *id)?;
                }
                self.take_link_events();
                continue;
            }
            // Rounds take their time: what was mounted meanwhile must be frozen too, and what was swap may be a filesystem now.
            let now = mounts::survey(devices)?;
            let same = same_ground(&now, survey);
            *survey = now;
            if !same {
                if rounds >= self.options.rounds_max {
                    return Err(PointError::NotConverging { left_bytes: left, rounds });
                }
                self.leave_out_swap(members, survey);
                rounds += 1;
                continue;
            }
            self.metrics.rounds(rounds);
            match self.frozen(open, members, survey, budget) {
                Err(PointError::NotConverging { .. }) if rounds < self.options.rounds_max => rounds += 1,
                Ok(Attempt::Moved { disk, runs }) => {
                    quiet_tries += 1;
                    if quiet_tries > self.options.rounds_max {
                        return Err(PointError::Written(disk));
                    }
                    for (disk, runs) in runs {
                        open.send_held(disk, runs)?;
                    }
                }
                Ok(Attempt::Point(frozen)) => return Ok(frozen),
                Err(error) => return Err(error),
            }
        }
    }

    fn left(&self, members: &[DiskId]) -> u64 {
        self.disks.iter().filter(|d| members.contains(&d.id())).map(super::disk::Disk::to_send_bytes).sum()
    }

    /// Ends the epoch; answers the disks with something in flight.
    fn epoch_of(&mut self, members: &[DiskId]) -> Result<Vec<DiskId>, PointError> {
        let unsettled = self.end_epoch()?;
        let trusted =
            |id: &DiskId| self.disks.iter().any(|d| d.id() == *id && *d.state.state() == DiskState::Bitmap);
        if members.iter().all(trusted) { Ok(unsettled) } else { Err(PointError::Suspect) }
    }

    pub(super) fn send_live(&mut self, open: &OpenDelta, id: DiskId) -> Result<(), PointError> {
        let (readers, pool) = (self.options.readers, self.pool.clone());
        let Some(disk) = self.disk_mut(id) else { return Ok(()) };
        let Some(reader) = disk.open(readers, &pool) else { return Err(PointError::Suspect) };
        let reader = reader.map_err(|e| SendError::Source(id, e))?;
        let taken = disk.ledger.take(open.delta, 0, u64::MAX);
        let ranges = disk.blocks(&taken);
        open.expect(&ranges);
        self.ordered.will_read(id, &ranges);
        let job = reader.read_ranges(ranges.clone());
        open.send(id, job, None)?;
        self.ordered.was_read(id, &ranges);
        Ok(())
    }

    /// The freeze itself.
    fn frozen(
        &mut self,
        open: &OpenDelta,
        members: &[DiskId],
        survey: &Survey,
        budget: u64,
    ) -> Result<Attempt, PointError> {
        let (guests, set) = self.freeze_all(survey)?;
        let taken_at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let rest = self.rest_for_group(members);
        // Whatever happens from here on, the set is thawed: by us, by its drop, or by the guardian.
        let result = self.read_frozen(open, members, budget).and_then(|(runs, moved, written)| {
            let moved = match moved {
                Some(disk) => Some(disk),
                None => self.moved(members, &written)?,
            };
            if moved.is_none() {
                self.hook("frozen")?;
                self.hold_for_group(&set, members, rest);
            }
            Ok((runs, moved))
        });
        let thawed = set.thaw();
        let guests = self.thaw_guests(guests);
        let hooked = self.hook("thaw");
        let (runs, moved) = result?;
        let thawed = thawed?;
        self.metrics.frozen(Duration::from_micros(thawed.total_us));
        if !thawed.intact {
            self.group_thawed(false, false, thawed.total_us);
            return Err(PointError::Thawed);
        }
        hooked?;
        Ok(match moved {
            Some(disk) => Attempt::Moved { disk, runs },
            None => {
                let application = self.applications.thawed();
                self.group_thawed(true, application, thawed.total_us);
                Attempt::Point(Frozen { runs, taken_at_ms, freeze_us: thawed.total_us, application, guests })
            }
        })
    }

    /// Reads the rest into memory. Also answers a disk that was not at rest when the epoch ended.
    fn read_frozen(
        &mut self,
        open: &OpenDelta,
        members: &[DiskId],
        budget: u64,
    ) -> Result<(HeldDisks, Option<String>, Written), PointError> {
        let unsettled = self.epoch_of(members)?;
        let written = self.written(members);
        let moved = (self.disks.iter())
            .find(|d| members.contains(&d.id()) && unsettled.contains(&d.id()))
            .map(|d| d.protected.name.clone());
        if moved.is_some() {
            return Ok((vec![], moved, written));
        }
        let left = self.left(members);
        if left > budget {
            return Err(PointError::NotConverging { left_bytes: left, rounds: 0 });
        }
        let pool = self.pool.clone();
        let (readers, pulse) = (self.options.readers, self.pulse.clone());
        let mut all = vec![];
        for id in members {
            let Some(disk) = self.disk_mut(*id) else { continue };
            let taken = disk.ledger.take(open.delta, 0, u64::MAX);
            let ranges = disk.blocks(&taken);
            open.expect(&ranges);
            let Some(reader) = disk.open(readers, &pool) else { return Err(PointError::Suspect) };
            let source = |e| PointError::Send(SendError::Source(*id, e));
            let reader = reader.map_err(source)?;
            let mut job = reader.read_ranges(ranges);
            let mut runs = vec![];
            while let Some(run) = job.next_blocking() {
                let run = run.map_err(source)?;
                pulse.work();
                // Copied out: kept buffers would hold more memory than they have content, and could starve the readers.
                runs.push(HeldRun { range: run.range, content: run.buffer.to_vec() });
            }
            all.push((*id, runs));
        }
        Ok((all, None, written))
    }

    /// What the kernel counts as written to each disk so far (of a partition: to it alone); `None`: it cannot be asked.
    fn written(&self, members: &[DiskId]) -> Written {
        let count = |disk: &Disk| {
            let stat = device::stat(disk.device.as_ref()?.dev).ok()?;
            Some((stat.sectors_written, stat.sectors_discarded))
        };
        self.disks.iter().filter(|d| members.contains(&d.id())).map(|d| (d.id(), count(d))).collect()
    }

    /// A disk that something wrote to since the last epoch ended. In this order: a write that is over by the first look has been
    /// marked by the second; one that no program was shown has been counted by the kernel.
    fn moved(&self, members: &[DiskId], written: &Written) -> Result<Option<String>, PointError> {
        let counted = self.written(members);
        for disk in self.disks.iter().filter(|d| members.contains(&d.id())) {
            let busy = disk
                .device
                .as_ref()
                .is_none_or(|d| device::inflight(d.dev).map_or(true, |(_, writes)| writes > 0));
            let id = disk.id();
            if busy || self.tracker.dirty_now(id)? > 0 || counted.get(&id) != written.get(&id) {
                return Ok(Some(disk.protected.name.clone()));
            }
        }
        Ok(None)
    }

    /// Swap areas are not copied; areas that are swap no longer are.
    pub(super) fn leave_out_swap(&mut self, members: &[DiskId], survey: &Survey) {
        let mut unmarked = vec![];
        for (id, found) in members.iter().zip(&survey.disks) {
            let tracker = &self.tracker;
            let Some(disk) = self.disks.iter_mut().find(|d| d.id() == *id) else { continue };
            disk.has_filesystem = found.has_filesystem;
            let skip = skipped(&found.swap, disk.shift);
            self.ordered.set_skip(*id, disk.blocks(&skip));
            let freed = disk.ledger.set_skip(skip);
            if !freed.is_empty() {
                let mut set = highwater_delta::BlockSet::new(disk.granules());
                freed.iter().for_each(|r| set.insert_range(*r));
                if let Err(error) = tracker.mark(*id, set.words()) {
                    unmarked.push((*id, error));
                }
            }
        }
        // What is only in the ledger is forgotten with the next session: the disk would lack it without a word.
        for (id, error) in unmarked {
            self.start_resync(id, format!("blocks that are swap no longer could not be marked: {error}"));
        }
    }

    /// What was taken for a delta that is not sent any further is pending still.
    pub(super) fn forget_taken(&mut self) {
        let keep: Vec<DeltaId> = self.awaited.iter().map(|a| a.delta).collect();
        for disk in &mut self.disks {
            if let Ok(pending) = self.tracker.pending(disk.protected.disk) {
                disk.ledger.reset_except(&pending, &keep);
            }
        }
    }

    pub(super) fn hook(&self, moment: &str) -> Result<(), PointError> {
        let Some((program, arguments)) = self.options.freeze_hook.as_ref().and_then(|c| c.split_first())
        else {
            return Ok(());
        };
        let fail = |what: String| PointError::Hook(format!("{program} {moment}: {what}"));
        let mut child = Command::new(program)
            .args(arguments)
            .arg(moment)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| fail(e.to_string()))?;
        let until = Instant::now() + self.options.freeze.deadline;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(fail(status.to_string())),
                Ok(None) if Instant::now() < until => std::thread::park_timeout(Duration::from_millis(2)),
                Ok(None) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(fail("it took longer than the freeze deadline".into()));
                }
                Err(error) => return Err(fail(error.to_string())),
            }
        }
    }
}

/// Whether the same filesystems lie on the same disks, and the same swap areas. Where they are mounted may have changed:
/// containers come and go.
fn same_ground(a: &Survey, b: &Survey) -> bool {
    let ground = |f: &Filesystem| (f.dev, f.devices.clone(), f.read_only);
    a.disks == b.disks && a.filesystems.iter().map(ground).eq(b.filesystems.iter().map(ground))
}

/// Granules that lie wholly within swap.
fn skipped(swap: &[mounts::SectorRange], shift: u32) -> Vec<BlockRange> {
    (swap.iter().filter_map(mounts::SectorRange::blocks_inside))
        .filter_map(|r| {
            let (first, end) = (r.start.0.div_ceil(1 << shift), r.end() >> shift);
            (first < end).then(|| BlockRange::new(first, end - first))
        })
        .collect()
}

/// Writes out what is dirty before the epoch ends, so that the freeze has little to do. Best effort, on a thread of its own:
/// a filesystem that hangs must not hang the agent.
fn write_out(filesystems: &[Filesystem], limit: Duration) {
    use std::os::fd::AsRawFd;
    let files: Vec<_> = filesystems.iter().filter(|f| !f.read_only).filter_map(|f| f.open().ok()).collect();
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for file in files {
            // SAFETY: an open descriptor.
            unsafe { libc::syncfs(file.as_raw_fd()) };
        }
        let _ = done.send(());
    });
    let _ = wait.recv_timeout(limit);
}
