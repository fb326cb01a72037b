//! A recovery point of the stream: a position, and what leads to it.
//!
//! 1. What must be read again is read and sent, live; so is what nothing explained.
//! 2. The stream is sealed at a position behind those reads. For a filesystem-consistent point the filesystems are frozen
//!    meanwhile, and nothing is copied under the freeze but blocks whose order only the device knew.
//! 3. The epoch ends, and with it the window: only now is the stream known to be complete up to the position.
//! 4. What was sealed is sent and committed. If the epoch showed a change that the stream lacks, it is all done once more, in the
//!    same delta.

use super::super::{
    Engine,
    disk::Disk,
    guests::GuestRank,
    point::PointError,
    send::{HeldRun, OpenDelta, SendError},
    state::DiskState,
};
use crate::{
    capture::assemble::Sealed,
    mounts::{self, Survey},
};
use highwater_delta::{
    BLOCK_BYTES, BlockRange, CommitKind, Consistency, DeltaId, DiskId, PointDisk, PointInfo,
};
use highwater_wire::message::AgentMessage;
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// How long a position that can be sealed is waited for, live and under a freeze.
const SEAL_MAX: Duration = Duration::from_secs(5);
const SEAL_FROZEN_MAX: Duration = Duration::from_secs(1);
/// Between looks whether something is lost, meanwhile.
const SEAL_LOOK: Duration = Duration::from_millis(200);
/// A position that is older is not taken without asking for a newer one.
const SEAL_AGE: Duration = Duration::from_millis(100);
/// Times that something is found to be lacking, before the point is given up.
const TRIES: u32 = 8;
/// While nothing is written, a point is made so rarely.
const IDLE: Duration = Duration::from_secs(60);
/// How often it is looked what lies on the disks.
const SURVEY_EVERY: Duration = Duration::from_secs(30);

/// What is made of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Make {
    /// A crash-consistent point.
    Crash,
    /// A filesystem-consistent point.
    Frozen,
    /// No point: what is held is sent and stored, so that there is room again.
    Progress,
}

/// What came of the rounds; everything that was sealed has been sent.
enum Outcome {
    /// A point.
    Point(Marked),
    /// None, or not now: a freeze failed.
    Progress(Option<PointError>),
}

/// What was sealed, and when that was.
struct Marked {
    sealed: Sealed,
    /// Nothing was written while blocks were read under the freeze.
    exact: bool,
    /// Applications stood still, from before the freeze until after it.
    application: bool,
    /// How guests left their disks.
    guests: Vec<GuestRank>,
    taken_at_ms: u64,
    freeze_us: u64,
    /// Blocks read under the freeze, to be sent after what was sealed.
    held: Vec<(DiskId, Vec<HeldRun>)>,
}

impl Engine {
    /// Whether the next point is one of the stream.
    pub(in crate::engine) fn in_order(&self) -> bool {
        self.ordered.streaming.as_ref().is_some_and(|s| s.since.elapsed() >= super::ENTRY_GRACE)
            && self.disks.iter().all(|d| d.state.state().allows_points())
            && !self.disks.iter().any(|d| *d.state.state() == DiskState::Bitmap && d.device.is_some())
            && self.disks.iter().any(|d| *d.state.state() == DiskState::WriteOrdered)
    }

    /// Makes it; whatever comes of it, the next one is due an interval later.
    pub(in crate::engine) fn make_ordered(&mut self, make: Make) {
        let started = Instant::now();
        // Progress is no point: with it, the next point would be put off again and again.
        if make != Make::Progress {
            self.ordered.due = started + self.ordered.options.point_interval;
        }
        let due = self.point_due;
        if make == Make::Frozen {
            self.point_due = started + self.options.point_interval;
        }
        match self.try_ordered(make) {
            Ok(Some(error @ PointError::GivenUp)) => {
                tracing::info!(code = "HW-1458", %error, "no freeze this time");
                // Nobody's own point was tried.
                self.point_due = due;
            }
            Ok(Some(trouble)) => self.ordered_trouble(make, &trouble),
            Ok(None) if make == Make::Frozen => self.point_trouble = None,
            Ok(None) => {}
            Err(PointError::Send(SendError::LinkDown)) => self.wait_for_link_down(),
            Err(PointError::Send(SendError::Source(id, error))) => {
                self.leave_order("unreadable", &error.to_string());
                self.unreadable(id, &error);
            }
            Err(PointError::Send(error)) => {
                let id = self.disks.first().map_or_else(DiskId::new, Disk::id);
                self.on_send_error(id, &error);
            }
            Err(error) => {
                self.ordered_trouble(make, &error);
                self.leave_order(error.kind(), &error.to_string());
            }
        }
    }

    /// An attempt at a point of the stream failed.
    fn ordered_trouble(&mut self, make: Make, error: &PointError) {
        if make != Make::Frozen {
            return;
        }
        let code = format!("HW-{}", error.code());
        tracing::warn!(code, %error, "no recovery point this time; nothing is lost");
        self.point_trouble = Some(format!("{code}: {error}"));
        for waiting in self.point_wanted.drain(..) {
            let _ = waiting.send(super::super::control::refused(error.code(), &error.to_string()));
        }
    }

    /// `Some`: the freeze failed, and the stream is as good as before. An error means that the stream is to be given up.
    fn try_ordered(&mut self, make: Make) -> Result<Option<PointError>, PointError> {
        self.pulse.work();
        if make == Make::Frozen {
            self.board.put(self.status());
        }
        let members: Vec<DiskId> = (self.disks.iter())
            .filter(|d| *d.state.state() == DiskState::WriteOrdered)
            .map(Disk::id)
            .collect();
        let surveyed = self.ordered.streaming.as_ref().and_then(|s| s.surveyed);
        if surveyed.is_none_or(|at| at.elapsed() >= SURVEY_EVERY) || self.skips_something() {
            self.survey_ordered(&members)?;
        }
        let open = self.open_delta(DeltaId::new())?;
        let mut begun = false;
        let made = self.rounds_ordered(&open, &members, make, &mut begun);
        let outcome = match made {
            Ok(outcome) => outcome,
            Err(error) => {
                if begun {
                    self.tell(AgentMessage::DeltaAbort(open.delta));
                }
                return Err(error);
            }
        };
        open.check_complete()?;
        let chunks = open.chunks.load(Ordering::Acquire);
        let (marked, trouble) = match outcome {
            Outcome::Point(marked) => (marked, None),
            Outcome::Progress(trouble) => {
                if chunks > 0 {
                    self.commit(&open.queue, open.delta, chunks, CommitKind::Partial)?;
                } else {
                    self.disks.iter_mut().for_each(|disk| disk.ledger.untake(open.delta));
                    if begun {
                        self.tell(AgentMessage::DeltaAbort(open.delta));
                    }
                }
                return Ok(trouble);
            }
        };
        let frozen = make == Make::Frozen;
        let info = PointInfo {
            consistency: match frozen {
                true => self.consistency(&members, marked.application, &marked.guests),
                false => Consistency::Crash,
            },
            taken_at_ms: marked.taken_at_ms,
            freeze_us: marked.freeze_us,
            disks: (self.disks.iter())
                .filter(|d| members.contains(&d.id()))
                .map(|d| PointDisk { disk: d.id(), size_bytes: d.size_bytes() })
                .collect(),
        };
        self.commit(&open.queue, open.delta, chunks, CommitKind::Point(info))?;
        if let Some(streaming) = &mut self.ordered.streaming {
            streaming.committed = Some(Instant::now());
        }
        Ok(trouble)
    }

    /// What lies on the disks: known anew for each freeze, and now and then because of swap areas.
    fn survey_ordered(&mut self, members: &[DiskId]) -> Result<Survey, PointError> {
        let devices: Vec<_> = (self.disks.iter())
            .filter(|d| members.contains(&d.id()))
            .filter_map(|d| d.device.clone())
            .collect();
        let survey = mounts::survey(&devices)?;
        self.leave_out_swap(members, &survey);
        if let Some(streaming) = &mut self.ordered.streaming {
            streaming.surveyed = Some(Instant::now());
        }
        Ok(survey)
    }

    fn rounds_ordered(
        &mut self,
        open: &OpenDelta,
        members: &[DiskId],
        make: Make,
        begun: &mut bool,
    ) -> Result<Outcome, PointError> {
        for round in 0..TRIES {
            self.pulse.work();
            self.read_again();
            if self.lacks(members) {
                self.begin_delta(open, begun)?;
                for id in members {
                    self.send_live(open, *id)?;
                }
            }
            // Before the freeze, once without: what has gathered is sent, so that little is left to do.
            let freeze = make == Make::Frozen && round > 0;
            let (marked, trouble) = if freeze {
                // Rounds take their time: what was mounted meanwhile must be frozen too.
                let survey = self.survey_ordered(members)?;
                self.seal_frozen(&survey, members)?
            } else {
                (Some(self.seal(SEAL_MAX)?), None)
            };
            let Some(mut marked) = marked else { return Ok(Outcome::Progress(trouble)) };
            // Everything that is covered now lies before the position that was sealed.
            for disk in &marked.sealed.disks {
                let Some(own) = self.disk_mut(disk.id) else { continue };
                let shift = own.shift;
                own.ledger.take_covered(open.delta, disk.doubtful.iter().map(|block| block >> shift));
                // What is in doubt need not be marked: of a write that was refused nothing completes.
                self.tracker.mark_some(disk.id, disk.doubtful.iter().map(|block| block >> shift))?;
            }
            let ended = self.end_window()?;
            // Before the bits are explained, which takes the reader's coming to the window's end: what was sealed is in its way.
            if let Err(error) = self.send_sealed(open, &mut marked, begun) {
                self.unexplained(&ended.bits);
                return Err(error);
            }
            self.explain_window(ended)?;
            // Sealed content knows its device by number only; after the seal, for what came before it.
            if !self.are_still() {
                return Err(PointError::Disordered("a disk is another one now, or of another size"));
            }
            if self.skips_something() {
                // What is swap no longer is read, and this is no position then.
                self.survey_ordered(members)?;
            }
            let ordered = |d: &Disk| *d.state.state() == DiskState::WriteOrdered;
            if !members.iter().all(|id| self.disks.iter().any(|d| d.id() == *id && ordered(d))) {
                return Err(PointError::Suspect);
            }
            if make == Make::Progress || trouble.is_some() {
                return Ok(Outcome::Progress(trouble));
            }
            let lacking = !marked.exact
                || self.lacks(members)
                || self
                    .ordered
                    .live
                    .as_ref()
                    .is_some_and(|live| live.reader.is_lacking(marked.sealed.position));
            if lacking {
                let unread: u64 = (self.disks.iter().filter(|d| members.contains(&d.id())))
                    .map(|d| d.ledger.to_send().count())
                    .sum();
                let figures = self.ordered.figures().map(|(_, reader)| reader.figures());
                tracing::debug!(round, unread, exact = marked.exact, ?figures, "the stream lacked something");
            }
            if !lacking && (make == Make::Crash || freeze) {
                let committed = self.ordered.streaming.as_ref().and_then(|s| s.committed);
                if !*begun && make == Make::Crash && committed.is_some_and(|at| at.elapsed() < IDLE) {
                    // Nothing has changed since the last point.
                    return Ok(Outcome::Progress(None));
                }
                self.begin_delta(open, begun)?;
                return Ok(Outcome::Point(marked));
            }
        }
        Err(PointError::Disordered("changes that were not captured keep coming"))
    }

    /// Whether the devices of the stream are what they were when it began.
    fn are_still(&self) -> bool {
        self.ordered.streaming.as_ref().is_some_and(|s| s.disks.iter().all(|(_, device)| device.is_still()))
    }

    /// Whether something of a disk is left out.
    fn skips_something(&self) -> bool {
        self.disks.iter().any(|d| !d.ledger.skipped().is_empty())
    }

    /// Whether something of these disks must be read.
    fn lacks(&self, members: &[DiskId]) -> bool {
        self.disks.iter().any(|d| members.contains(&d.id()) && !d.ledger.to_send().is_empty())
    }

    fn begin_delta(&mut self, open: &OpenDelta, begun: &mut bool) -> Result<(), PointError> {
        if !*begun {
            open.begin()?;
            *begun = true;
        }
        Ok(())
    }

    /// What has to be read again goes back to what is to be sent.
    fn read_again(&mut self) {
        let Some(live) = self.ordered.live.as_ref() else { return };
        for (id, again) in live.reader.take_again() {
            self.metrics.read_again(again.healing.len() as u64, again.lacking.len() as u64);
            if let Some(disk) = self.disks.iter_mut().find(|d| d.id() == id) {
                let shift = disk.shift;
                disk.ledger.again(again.lacking.iter().chain(&again.healing).map(|block| block >> shift));
            }
        }
    }

    /// Seals the stream near where it is now. The point's time is one by which all that had been submitted is in it.
    fn seal(&mut self, most: Duration) -> Result<Marked, PointError> {
        let (Some(live), Some(streaming)) = (&mut self.ordered.live, &self.ordered.streaming) else {
            return Err(PointError::Disordered("gone"));
        };
        let at_least = streaming.floor.max(streaming.covered_to);
        let until = Instant::now() + most;
        let old = live.reader.clean_age().is_none_or(|age| age > SEAL_AGE);
        let mut fresh = old.then(|| live.reader.position().max(at_least));
        let (sealed, moment) = loop {
            // Where blocks are written in part all the time, a position comes when it is asked for.
            let wanted = fresh.take().unwrap_or(at_least);
            if let Some(sealed) = live.reader.seal(wanted, SEAL_LOOK.min(most)) {
                break sealed;
            }
            // What was dropped may be what it waits for.
            if let Some(loss) = live.tap.look(&live.barrier)? {
                return Err(PointError::Lost(loss));
            }
            if let Some(broken) = live.reader.gave_up() {
                return Err(PointError::Disordered(broken.told()));
            }
            if Instant::now() >= until || live.reader.is_broken() {
                return Err(PointError::Disordered("no position could be sealed in time"));
            }
        };
        Ok(Marked {
            sealed,
            exact: true,
            application: false,
            guests: vec![],
            taken_at_ms: moment.unix_ms(),
            freeze_us: 0,
            held: vec![],
        })
    }

    /// Seals the stream while all filesystems are frozen. What was sealed is to be sent, whatever became of the freeze.
    fn seal_frozen(
        &mut self,
        survey: &Survey,
        members: &[DiskId],
    ) -> Result<(Option<Marked>, Option<PointError>), PointError> {
        let (guests, set) = match self.freeze_all(survey) {
            Ok(all) => all,
            Err(error) => return Ok((None, Some(error))),
        };
        // Whatever happens from here on, the set is thawed: by us, by its drop, or by the guardian.
        let rest = self.rest_for_group(members);
        let marked = self.mark_frozen();
        let seen = if marked.is_ok() { self.hook("frozen") } else { Ok(()) };
        if seen.is_ok() && marked.as_ref().is_ok_and(|marked| marked.exact) {
            self.hold_for_group(&set, members, rest);
        }
        let thawed = set.thaw();
        let stood = self.thaw_guests(guests);
        let hooked = self.hook("thaw");
        let mut marked = marked?;
        let trouble = match thawed {
            Err(error) => Some(error.into()),
            Ok(thawed) => {
                self.metrics.frozen(Duration::from_micros(thawed.total_us));
                marked.freeze_us = thawed.total_us;
                marked.guests = stood;
                // If it must be frozen once more, they go on standing still.
                marked.application = thawed.intact && marked.exact && self.applications.thawed();
                self.group_thawed(thawed.intact, marked.application, thawed.total_us);
                (!thawed.intact).then_some(PointError::Thawed)
            }
        };
        Ok((Some(marked), trouble.or(seen.err()).or(hooked.err())))
    }

    /// Under the freeze: the stream's end now is the marker.
    fn mark_frozen(&mut self) -> Result<Marked, PointError> {
        let (Some(live), Some(streaming)) = (&self.ordered.live, &mut self.ordered.streaming) else {
            return Err(PointError::Disordered("gone"));
        };
        let taken_at_ms = now_ms();
        streaming.floor = streaming.floor.max(live.reader.position());
        let mut marked = self.seal(SEAL_FROZEN_MAX)?;
        marked.taken_at_ms = taken_at_ms;
        let Some(live) = &self.ordered.live else { return Ok(marked) };
        let again: Vec<(DiskId, Vec<u64>)> = (live.reader.take_again_frozen().into_iter())
            .map(|(id, found)| (id, found.lacking.into_iter().chain(found.healing).collect()))
            .collect();
        let blocks: usize = again.iter().map(|(_, blocks)| blocks.len()).sum();
        if (blocks * BLOCK_BYTES) as u64 > self.options.freeze_budget_bytes {
            // More than may be read under a freeze: it is read live, and frozen once more.
            for (id, blocks) in again {
                if let Some(disk) = self.disk_mut(id) {
                    let shift = disk.shift;
                    disk.ledger.again(blocks.iter().map(|block| block >> shift));
                }
            }
            marked.exact = false;
            return Ok(marked);
        }
        for (id, blocks) in again {
            // They stay covered, and so pending, until the next delta: this one does not take them.
            marked.held.push((id, self.hold(id, &blocks)?));
        }
        if let (Some(live), Some(streaming)) = (&self.ordered.live, &mut self.ordered.streaming)
            && !marked.held.is_empty()
        {
            // A disk that no freeze holds still may have been written to while it was read.
            let end = live.reader.position();
            marked.exact = end == marked.sealed.position;
            streaming.floor = streaming.floor.max(end);
        }
        Ok(marked)
    }

    /// Reads blocks into memory.
    fn hold(&mut self, id: DiskId, blocks: &[u64]) -> Result<Vec<HeldRun>, PointError> {
        let pool = self.pool.clone();
        let Some(disk) = self.disk_mut(id) else { return Ok(vec![]) };
        let source = |e| PointError::Send(SendError::Source(id, e));
        let Some(reader) = disk.open(1, &pool) else { return Err(PointError::Suspect) };
        let ranges: Vec<_> = blocks.iter().map(|block| BlockRange::new(*block, 1)).collect();
        let mut job = reader.map_err(source)?.read_ranges(ranges);
        let mut held = vec![];
        while let Some(run) = job.next_blocking() {
            let run = run.map_err(source)?;
            held.push(HeldRun { range: run.range, content: run.buffer.to_vec() });
        }
        Ok(held)
    }

    /// Sends what was sealed, then what was read under the freeze.
    fn send_sealed(
        &mut self,
        open: &OpenDelta,
        marked: &mut Marked,
        begun: &mut bool,
    ) -> Result<(), PointError> {
        for disk in std::mem::take(&mut marked.sealed.disks) {
            let (data, zeros) = disk.batch.into_parts();
            if !data.is_empty() || !zeros.is_empty() {
                self.begin_delta(open, begun)?;
                open.send_captured(disk.id, data, zeros)?;
            }
        }
        for (id, runs) in std::mem::take(&mut marked.held) {
            self.begin_delta(open, begun)?;
            let ranges: Vec<_> = runs.iter().map(|run| run.range).collect();
            open.expect(&ranges);
            open.send_held(id, runs)?;
        }
        Ok(())
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
