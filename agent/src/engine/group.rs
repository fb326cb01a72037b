//! A machine's part in the markers of its group: it prepares when told, freezes when told, stays frozen until all others are, and says what
//! came of it. Who decides what is told is [`crate::group`].
//!
//! **One instant.** The state that becomes the point is what the disks hold when the freeze is complete, and nothing is written to them until
//! the word to mark: filesystems are frozen, and what no freeze holds still is seen from the kernel's counts to have stood still. Anything
//! else is no point of the group; it may still be one of this machine.
//!
//! **Limits.** A freeze ends by its own deadline at the latest, whatever is heard; the guardian's ends it if this process hangs.

use super::{Engine, application::Applications};
use crate::{
    device,
    freeze::FrozenSet,
    group::{FreezeLimits, FromEngine, ToEngine},
    metrics::{MarkerStage, Metrics},
    mounts,
};
use highwater_delta::{CommitId, DiskId};
use highwater_group::{Kind, Marker};
use std::{
    collections::VecDeque,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError, channel},
    },
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// The freeze's own deadline must not be what ends it.
const MARGIN: Duration = Duration::from_millis(200);

/// How far it is.
#[derive(Debug)]
enum Stage {
    /// Waits for hooks of a point of this machine's own.
    Waiting,
    /// Hooks are being called, filesystems are being written out.
    Preparing { is_out: bool, quiet: bool },
    /// All is prepared.
    Ready,
    /// The word to freeze has come.
    Freezing(FreezeLimits),
    /// It is frozen, and the word to mark came in time.
    Marked,
    /// It is thawed, and was still until the word came: the point that is being made is the group's.
    Making,
    /// It is frozen, and came to nothing.
    Spoilt,
}

#[derive(Debug)]
struct Part {
    marker: Marker,
    kind: Kind,
    /// There are hooks, and they were called for it.
    hooked: bool,
    stage: Stage,
    /// It is asked no more by then, or somebody has forgotten to say so.
    until: Instant,
}

/// Longer than any roster lets a member wait for the word to freeze.
const PART_MAX: Duration = Duration::from_secs(2 * 3600);

/// What the engine keeps of it.
pub(super) struct GroupPoints {
    asks: mpsc::Receiver<ToEngine>,
    done: mpsc::UnboundedSender<FromEngine>,
    part: Option<Part>,
    /// Came while the machine was frozen for something else.
    put_off: VecDeque<ToEngine>,
    metrics: Arc<Metrics>,
    /// Filesystems are being written out: one thread at a time, however slow they are.
    written_out: Option<Receiver<()>>,
}

/// What the kernel had counted as written to each disk, in sectors, when nothing was being written to any.
pub(super) type AtRest = Vec<(u64, u64)>;

/// What is to be done for the group now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForGroup {
    /// Nothing.
    Nothing,
    /// No point with a freeze now: it is about to be frozen for the group, or its applications stand still for it.
    Wait,
    /// The point with a freeze is the group's.
    Freeze,
}

impl GroupPoints {
    pub(super) fn new(
        (asks, done): (mpsc::Receiver<ToEngine>, mpsc::UnboundedSender<FromEngine>),
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { asks, done, part: None, put_off: VecDeque::new(), metrics, written_out: None }
    }

    fn say(&self, what: FromEngine) {
        // Without a group nobody listens.
        let _ = self.done.send(what);
    }

    fn next(&mut self) -> Option<ToEngine> {
        self.put_off.pop_front().or_else(|| self.asks.try_recv().ok())
    }

    /// Waits for something to be asked; for ever, if nobody can ask any more.
    pub(super) async fn asked(&mut self) {
        if !self.put_off.is_empty() {
            return;
        }
        match self.asks.recv().await {
            Some(ask) => self.put_off.push_back(ask),
            None => std::future::pending().await,
        }
    }

    /// Whether something has to be looked at soon.
    pub(super) fn is_busy(&self) -> bool {
        self.part.is_some()
    }

    /// Whether applications are to stand still for it, or do.
    pub(super) fn has_applications(&self) -> bool {
        let begun = |part: &Part| !matches!(part.stage, Stage::Waiting);
        self.part.as_ref().is_some_and(|part| part.kind == Kind::Application && begun(part))
    }

    /// Whether it is prepared, or nearly: no hooks for others now.
    pub(super) fn is_under_way(&self) -> bool {
        self.part.as_ref().is_some_and(|part| !matches!(part.stage, Stage::Waiting))
    }

    /// A second freeze is another instant.
    fn begin_freeze(&mut self) {
        if self.is_freezing().is_none() {
            self.over();
        }
    }

    /// Of the freeze that begins, if it is the group's.
    pub(super) fn freeze_limits(&self) -> Option<FreezeLimits> {
        match self.part.as_ref()?.stage {
            Stage::Freezing(limits) => Some(limits),
            _ => None,
        }
    }

    /// Whether the freeze that begins is the group's.
    fn is_freezing(&self) -> Option<Marker> {
        self.part.as_ref().filter(|part| matches!(part.stage, Stage::Freezing(_))).map(|part| part.marker)
    }

    /// The point's delta is complete and under way. Answers of which marker it is.
    pub(super) fn committed(&mut self) -> Option<Marker> {
        self.part.take_if(|part| matches!(part.stage, Stage::Making)).map(|part| part.marker)
    }

    /// What was kept will not be stored: its session has ended.
    pub(super) fn lost(&self, marker: Marker) {
        self.say(FromEngine::Lost { marker });
    }

    /// The machine's point is stored.
    pub(super) fn stored(&self, marker: Marker, commit: CommitId, taken_at_ms: u64) {
        self.metrics.marker(MarkerStage::Stored);
        self.say(FromEngine::Stored { marker, commit, taken_at_ms });
    }

    /// It was frozen for this, and is not any more.
    fn spoil(&mut self) {
        if let Some(part) = &mut self.part {
            part.stage = Stage::Spoilt;
        }
    }

    /// Whatever the attempt came to, it is over.
    fn over(&mut self) {
        let is_tried =
            |stage: &Stage| !matches!(stage, Stage::Waiting | Stage::Preparing { .. } | Stage::Ready);
        let Some(Part { marker, stage, .. }) = self.part.take_if(|part| is_tried(&part.stage)) else {
            return;
        };
        match stage {
            Stage::Freezing(_) => self.say(FromEngine::Frozen { marker, done: false }),
            Stage::Making => self.lost(marker),
            _ => self.say(FromEngine::Kept { marker, intact: false }),
        }
    }
}

impl Engine {
    /// Takes in what the group asks for, without waiting.
    pub(super) fn take_group_asks(&mut self) {
        while let Some(ask) = self.group.next() {
            match ask {
                ToEngine::Tell(message) => {
                    // The session that it is meant for may have begun just now.
                    self.take_link_events();
                    // An older collector would take it for nonsense, and end the session.
                    if matches!(&self.link, super::Link::Up(session) if session.knows_groups) {
                        self.tell(message);
                    }
                }
                ToEngine::Prepare { marker, kind } => self.prepare_for_group(marker, kind),
                ToEngine::Freeze { marker, limits } => match &mut self.group.part {
                    Some(part) if part.marker == marker && matches!(part.stage, Stage::Ready) => {
                        part.stage = Stage::Freezing(limits);
                    }
                    _ => self.group.say(FromEngine::Frozen { marker, done: false }),
                },
                // It is frozen no longer.
                ToEngine::Keep { marker } => self.group.say(FromEngine::Kept { marker, intact: false }),
                ToEngine::Drop { marker } => {
                    self.drop_part(|part| part.marker == marker);
                }
            }
        }
    }

    fn prepare_for_group(&mut self, marker: Marker, kind: Kind) {
        if !self.frozen_points_possible() {
            let states = self.disks.iter().map(|d| (d.protected.name.as_str(), d.state.state()));
            let why = super::control::why_no_point(states)
                .map_or_else(|| "the stream begins anew".to_owned(), |(cause, _)| cause);
            tracing::info!(%marker, why, "this machine cannot take part in its group's point now");
            return self.group.say(FromEngine::Prepared { marker, done: false });
        }
        self.drop_part(|_| true);
        self.group.metrics.marker(MarkerStage::Begun);
        let until = Instant::now() + PART_MAX;
        self.group.part = Some(Part { marker, kind, hooked: false, stage: Stage::Waiting, until });
        self.move_group_on(&Applications::Alone);
    }

    /// Whether a point with a freeze could be made now.
    fn frozen_points_possible(&self) -> bool {
        matches!(self.link, super::Link::Up(_))
            && (self.in_order() || (!self.ordered.is_streaming() && self.points_possible()))
    }

    /// What is done for it is undone.
    fn drop_part(&mut self, which: impl FnOnce(&Part) -> bool) {
        if self.group.part.take_if(|part| which(part)).is_some_and(|part| part.hooked) {
            self.applications.release();
        }
    }

    /// Moves preparations on, and says what is to be done.
    pub(super) fn see_to_group(&mut self, applications: &Applications) -> ForGroup {
        let now = Instant::now();
        self.drop_part(|part| now > part.until);
        self.move_group_on(applications);
        let Some(part) = &self.group.part else { return ForGroup::Nothing };
        match part.stage {
            Stage::Waiting => ForGroup::Nothing,
            // Applications stand still for one freeze only.
            Stage::Preparing { .. } | Stage::Ready if part.kind == Kind::Application => ForGroup::Wait,
            Stage::Preparing { .. } | Stage::Ready => ForGroup::Nothing,
            Stage::Freezing(_) if self.frozen_points_possible() => ForGroup::Freeze,
            Stage::Freezing(_) | Stage::Marked | Stage::Making | Stage::Spoilt => {
                self.group.over();
                ForGroup::Nothing
            }
        }
    }

    fn move_group_on(&mut self, applications: &Applications) {
        let Some(Part { marker, kind, stage, .. }) = &mut self.group.part else { return };
        let (marker, kind) = (*marker, *kind);
        if matches!(stage, Stage::Waiting) && !self.applications.are_busy() {
            let quiet = match kind {
                Kind::Crash => true,
                Kind::Application => match self.applications.begin_for_group(&self.options.run_dir) {
                    Ok(quiet) => quiet,
                    Err(()) => return self.unprepared(marker),
                },
            };
            if self.group.written_out.is_none() {
                self.group.written_out = Some(self.write_out_meanwhile());
            }
            if let Some(part) = &mut self.group.part {
                part.hooked = !quiet;
                part.stage = Stage::Preparing { is_out: false, quiet };
            }
            return;
        }
        let Stage::Preparing { is_out, quiet } = stage else { return };
        let still = |wait: &Receiver<()>| matches!(wait.try_recv(), Err(TryRecvError::Empty));
        if !*is_out && !self.group.written_out.as_ref().is_some_and(still) {
            self.group.written_out = None;
            *is_out = true;
        }
        if !*quiet {
            match applications {
                Applications::Wait => {}
                Applications::Freeze if self.applications.stand_still() => *quiet = true,
                // One has failed: what the others have would be worth less for the name it bears.
                Applications::Freeze | Applications::Alone => return self.unprepared(marker),
            }
        }
        if *is_out && *quiet {
            if let Some(part) = &mut self.group.part {
                part.stage = Stage::Ready;
            }
            self.group.say(FromEngine::Prepared { marker, done: true });
        }
    }

    fn unprepared(&mut self, marker: Marker) {
        self.drop_part(|_| true);
        self.group.say(FromEngine::Prepared { marker, done: false });
    }

    /// Writes out what is dirty on a thread of its own, so that the freeze has little to do.
    fn write_out_meanwhile(&self) -> Receiver<()> {
        let (done, wait) = channel();
        let devices: Vec<_> = self.disks.iter().filter_map(|disk| disk.device.clone()).collect();
        let work = move || {
            let filesystems = mounts::survey(&devices).map(|survey| survey.filesystems).unwrap_or_default();
            for filesystem in filesystems.iter().filter(|filesystem| !filesystem.read_only) {
                if let Ok(file) = filesystem.open() {
                    // SAFETY: an open descriptor.
                    unsafe { libc::syncfs(file.as_raw_fd()) };
                }
            }
            let _ = done.send(());
        };
        // Without it the freeze takes longer.
        let _ = std::thread::Builder::new().name("sync".into()).spawn(work);
        wait
    }

    /// The freeze that was the group's has been tried.
    pub(super) fn group_freeze_over(&mut self) {
        self.group.over();
    }

    /// A freeze begins.
    pub(super) fn group_freeze_begins(&mut self) {
        self.group.begin_freeze();
    }

    /// Whether the freeze that has begun was the group's, and the group has given it up meanwhile.
    pub(super) fn group_gave_up(&mut self) -> bool {
        let Some(marker) = self.group.is_freezing() else { return false };
        while let Ok(ask) = self.group.asks.try_recv() {
            self.group.put_off.push_back(ask);
        }
        let dropped = |ask: &ToEngine| matches!(ask, ToEngine::Drop { marker: of } if *of == marker);
        self.group.put_off.iter().any(dropped)
    }

    /// Under a freeze that is complete, before the state of the disks is taken.
    pub(super) fn rest_for_group(&self, members: &[DiskId]) -> Option<AtRest> {
        self.group.is_freezing().and_then(|_| self.at_rest(members))
    }

    /// Under the freeze, the state of the disks taken: if it is the group's, waits for the word to mark. `members`: the disks that are in the
    /// point; `before`: how they stood before their state was taken. Whatever was written since may be what a message to another member
    /// told of.
    pub(super) fn hold_for_group(&mut self, set: &FrozenSet, members: &[DiskId], before: Option<AtRest>) {
        let Some(marker) = self.group.is_freezing() else { return };
        let Some(before) = before.filter(|before| self.at_rest(members).as_ref() == Some(before)) else {
            tracing::info!(%marker, "a disk is written to though its filesystems are frozen, or its I/O is not counted: no point of the group");
            return self.group.over();
        };
        self.group.say(FromEngine::Frozen { marker, done: true });
        let left = set.time_left();
        let until = Instant::now() + left - MARGIN.min(left / 4);
        let word = self.word(marker, until);
        let kept = match word {
            Word::Keep => self.at_rest(members) == Some(before),
            Word::Drop => {
                self.group.part = None;
                return;
            }
            Word::None => false,
        };
        if !kept {
            return self.group.spoil();
        }
        if let Some(part) = &mut self.group.part {
            part.stage = Stage::Marked;
        }
    }

    /// The freeze has ended, having lasted so long. `intact`: as it should; `application`: and applications stood still until then.
    pub(super) fn group_thawed(&mut self, intact: bool, application: bool, frozen_us: u64) {
        let Some(part) = &mut self.group.part else { return };
        let marker = part.marker;
        match part.stage {
            Stage::Marked if intact && (application || !part.hooked) => {
                part.stage = Stage::Making;
                tracing::debug!(%marker, frozen_us, thawed_at_us = steady_us(), "kept a marker");
                self.group.metrics.marker(MarkerStage::Kept);
                self.group.say(FromEngine::Kept { marker, intact: true });
            }
            // A freeze that was not held for the group is none of its.
            Stage::Freezing(_) => {}
            _ => self.group.over(),
        }
    }

    fn word(&mut self, marker: Marker, until: Instant) -> Word {
        let runtime = self.runtime.clone();
        loop {
            self.pulse.work();
            let left = until.saturating_duration_since(Instant::now());
            let asked = runtime.block_on(async { tokio::time::timeout(left, self.group.asks.recv()).await });
            match asked {
                Err(_) | Ok(None) => return Word::None,
                Ok(Some(ToEngine::Keep { marker: of })) if of == marker => return Word::Keep,
                Ok(Some(ToEngine::Drop { marker: of })) if of == marker => return Word::Drop,
                Ok(Some(other)) => self.group.put_off.push_back(other),
            }
        }
    }

    /// What the kernel counts as written to each disk, if nothing is being written to any; else none.
    fn at_rest(&self, members: &[DiskId]) -> Option<AtRest> {
        let count = |id: &DiskId| {
            let device = self.disks.iter().find(|disk| disk.id() == *id)?.device.as_ref()?;
            if !device::iostats_on(device.whole).unwrap_or(true) {
                return None;
            }
            // In this order: what is over by the first look has been counted by the second.
            let (_, writes) = device::inflight(device.dev).ok()?;
            let stat = device::stat(device.dev).ok()?;
            (writes == 0).then_some((stat.sectors_written, stat.sectors_discarded))
        };
        members.iter().map(count).collect()
    }
}

/// Of a clock that all programs of this machine share.
fn steady_us() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000)
}

enum Word {
    Keep,
    Drop,
    /// In time there was none.
    None,
}
