//! The owner of everything: decides what is sent when, and when a state is a recovery point.
//!
//! One thread runs [`Engine::run`]. It alone ends epochs, reads disks (through reader threads), freezes, and answers control
//! requests; the session with the collector is a task that talks to it through channels (`link`). So a write travels one way:
//! tracker → ledger → source → batch → link.
//!
//! **Rules.** A granule leaves the tracker's pending bits only after the delta that holds it was acknowledged as stored,
//! and only if it was not marked again since it was read (`ledger`). Whatever fails in between, all pending is sent again.
//! A point is committed only if all its disks were read in one consistent state (`point`). While a disk's copy is in doubt there
//! are no points.
//!
//! **Crash.** The pinned bits and the vault's last commit are all that matters; both outlive this process.

mod application;
mod asked;
pub mod batch;
mod compare;
mod control;
pub mod disk;
pub mod doubts;
mod freezing;
mod group;
mod guests;
mod last_point;
pub mod ledger;
pub mod link;
pub mod ordered;
mod point;
mod protect;
pub mod registry;
pub mod renewal;
mod send;
mod session;
mod slice;
pub mod state;
mod status;
pub mod trouble;

use crate::{
    control::{Ask, Board, Response, status::GuestStatus},
    error::OperatorError,
    freeze::FreezeOptions,
    group::{FromEngine, SharedStatus, ToEngine},
    guardian::{GuardianHandle, GuardianOptions},
    guests::{GuestOptions, Guests},
    metrics::Metrics,
    pulse::Pulse,
    source::BufferPool,
    throttle::Throttle,
    tracker::{EpochEnd, Fault, Tracker, TrackerError},
};
pub use application::{ApplicationOptions, OnHookFailure};
use application::{ApplicationPoints, Applications};
use asked::AskedPoints;
use compare::Comparison;
use disk::Disk;
use doubts::Doubts;
use group::{ForGroup, GroupPoints};
use highwater_delta::{DeltaId, DiskId, HashKey, MachineId, PointInfo, VaultId};
use highwater_group::Marker;
use last_point::{Kept, LastPoint};
use link::{LinkDown, LinkEvent, Outgoing};
use ordered::{CaptureOptions, Make, Ordered};
use registry::{Acknowledged, Registry};
use state::DiskState;
use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc, oneshot};

/// What the operator chose.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Survives reboots.
    pub state_dir: PathBuf,
    /// In memory.
    pub run_dir: PathBuf,
    /// Between points.
    pub point_interval: Duration,
    /// Limits of a freeze.
    pub freeze: FreezeOptions,
    /// Most bytes read under a freeze.
    pub freeze_budget_bytes: u64,
    /// Live rounds before a point is given up.
    pub rounds_max: u32,
    /// zstd's level.
    pub compression_level: i32,
    /// Reading threads.
    pub readers: usize,
    /// Encoding threads.
    pub encoders: usize,
    /// Bytes after which a long copy is committed in part.
    pub partial_commit_bytes: u64,
    /// Whether a suspect disk is compared with the vault at once, or waits for the operator.
    pub resync_automatically: bool,
    /// Called with `freeze`, `frozen` and `thaw` around each point.
    pub freeze_hook: Option<Vec<String>>,
    /// Hooks of applications.
    pub application: ApplicationOptions,
    /// Guests of this host.
    pub guests: Vec<GuestOptions>,
    /// How the guardians of guests are started.
    pub guardian: GuardianOptions,
    /// Collector, for status.
    pub endpoint: Option<String>,
    /// Write-ordered mode.
    pub capture: CaptureOptions,
    /// Bytes of the disks compared with the vault a second, in the background; 0: none.
    pub compare_bytes_per_s: u64,
    /// How long a commit may take. A collector that shows that it lives and never says `Stored` must not stop the points unnoticed.
    pub stored_max: Duration,
}

/// What the engine is given.
pub struct Parts {
    /// The tracker, opened.
    pub tracker: Tracker,
    /// Whether it took over running programs; if not, why.
    pub fresh: Option<String>,
    /// Thaws what this process no longer can.
    pub guardian: GuardianHandle,
    /// Bounds the memory of reads.
    pub pool: Arc<BufferPool>,
    /// Bandwidth.
    pub throttle: Arc<Throttle>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Events of the session.
    pub link: mpsc::Receiver<LinkEvent>,
    /// Ends a back-off early.
    pub wake: Arc<Notify>,
    /// What operators ask for.
    pub control: mpsc::Receiver<Ask>,
    /// For the last report, told while the engine is busy.
    pub board: Arc<Board>,
    /// What the group asks for, and what is answered.
    pub group: (mpsc::Receiver<ToEngine>, mpsc::UnboundedSender<FromEngine>),
    /// How the group stands.
    pub group_status: SharedStatus,
    /// Who this machine is, once enrolled.
    pub machine: Option<MachineId>,
    /// Set when the process is to end.
    pub stop: Arc<std::sync::atomic::AtomicBool>,
    /// The engine's sign of life.
    pub pulse: Arc<Pulse>,
    /// For waiting on channels from this thread.
    pub runtime: tokio::runtime::Handle,
}

/// The session as the engine sees it.
pub(crate) enum Link {
    Down(Option<LinkDown>),
    Up(Session),
}

/// What belongs to one session.
pub(crate) struct Session {
    queue: mpsc::Sender<Outgoing>,
    key: HashKey,
    vault: VaultId,
    since: Instant,
    /// The collector knows of groups.
    knows_groups: bool,
}

/// A delta that is committed and not yet known to be stored.
struct Awaited {
    delta: DeltaId,
    since: Instant,
    point: Option<PointInfo>,
    /// The marker of the group that it is the point of.
    marker: Option<Marker>,
    /// Operators who wait for the point.
    waiting: Vec<oneshot::Sender<Response>>,
}

/// See the module.
pub struct Engine {
    options: EngineOptions,
    tracker: Tracker,
    guardian: GuardianHandle,
    pool: Arc<BufferPool>,
    throttle: Arc<Throttle>,
    metrics: Arc<Metrics>,
    events: mpsc::Receiver<LinkEvent>,
    wake: Arc<Notify>,
    control: mpsc::Receiver<Ask>,
    /// Asked for while a delta is open. Disks come and go between deltas only: the collector is told of them, and so are the
    /// ledgers that the delta was taken from.
    put_off: VecDeque<Ask>,
    delta_open: bool,
    board: Arc<Board>,
    machine: Option<MachineId>,
    stop: Arc<std::sync::atomic::AtomicBool>,
    pulse: Arc<Pulse>,
    runtime: tokio::runtime::Handle,
    registry: Registry,
    doubts: Doubts,
    disks: Vec<Disk>,
    link: Link,
    awaited: VecDeque<Awaited>,
    acknowledged: Option<Acknowledged>,
    last_point: Option<LastPoint>,
    kept: Kept,
    /// What the collector refused last; until something is stored.
    refusal: Option<OperatorError>,
    point_due: Instant,
    point_wanted: Vec<oneshot::Sender<Response>>,
    /// Operators who want a point, for which a connection is tried first.
    attempt_wanted: Vec<oneshot::Sender<Response>>,
    point_trouble: Option<String>,
    looked_at_devices: Instant,
    ordered: Ordered,
    applications: ApplicationPoints,
    asked_points: AskedPoints,
    group: GroupPoints,
    group_status: SharedStatus,
    guests: Guests,
    guest_statuses: Vec<GuestStatus>,
    comparison: Comparison,
    /// The question about hashes that is open, and its answer.
    asked: Option<(DiskId, highwater_delta::BlockRange)>,
    hashes: Option<Vec<highwater_delta::StoredBlock>>,
}

/// How often it is looked whether hooks have ended.
const HOOKS_LOOK: Duration = Duration::from_millis(10);
/// How often devices are looked for and looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Deltas that may wait for `Stored` before another is begun.
const AWAITED_MAX: usize = 2;

impl Engine {
    /// Takes its parts and what is remembered; nothing runs yet.
    ///
    /// # Errors
    /// The registry cannot be read.
    pub fn new(options: EngineOptions, parts: Parts) -> anyhow::Result<Self> {
        use anyhow::Context;
        let registry = Registry::load(&options.state_dir)
            .with_context(|| format!("cannot read the protected disks in {}", options.state_dir.display()))?;
        let acknowledged = Acknowledged::load(&options.run_dir);
        let last_point = Kept::load(&options.run_dir, &options.state_dir);
        let doubts = Doubts::load(&options.run_dir, registry.disks.iter().map(|d| d.disk));
        let mut engine = Self {
            ordered: Ordered::new(options.capture.clone()),
            applications: ApplicationPoints::new(options.application.clone()),
            asked_points: AskedPoints::default(),
            group: GroupPoints::new(parts.group, parts.metrics.clone()),
            group_status: parts.group_status,
            guest_statuses: options.guests.iter().map(guests::never_frozen).collect(),
            guests: Guests::new(options.guests.clone(), &options.guardian, options.run_dir.clone()),
            comparison: Comparison::new(options.compare_bytes_per_s),
            options,
            tracker: parts.tracker,
            guardian: parts.guardian,
            pool: parts.pool,
            throttle: parts.throttle,
            metrics: parts.metrics,
            events: parts.link,
            wake: parts.wake,
            control: parts.control,
            put_off: VecDeque::new(),
            delta_open: false,
            board: parts.board,
            machine: parts.machine,
            stop: parts.stop,
            pulse: parts.pulse,
            runtime: parts.runtime,
            registry,
            doubts,
            disks: vec![],
            link: Link::Down(None),
            awaited: VecDeque::new(),
            acknowledged,
            last_point,
            kept: Kept::default(),
            refusal: None,
            point_due: Instant::now(),
            point_wanted: vec![],
            attempt_wanted: vec![],
            point_trouble: None,
            looked_at_devices: Instant::now(),
            asked: None,
            hashes: None,
        };
        engine.thaw_applications_left();
        engine.adopt(parts.fresh.as_deref());
        Ok(engine)
    }

    /// Runs until told to stop. Tracking goes on afterwards.
    pub fn run(mut self) {
        while !self.stopping() {
            self.pulse.step();
            self.take_events();
            if self.looked_at_devices.elapsed() >= LOOK_EVERY {
                self.look_at_devices();
                self.looked_at_devices = Instant::now();
            }
            let worked = matches!(self.link, Link::Up(_)) && self.step();
            self.answer_points();
            self.publish();
            if !worked {
                self.wait(self.until_due().min(Duration::from_millis(200)));
            }
        }
        self.finish_applications();
        if let Some(point) = &self.last_point
            && let Err(error) = self.kept.keep(point, &self.options.state_dir)
        {
            tracing::warn!(%error, "cannot note the last recovery point; after a reboot its age is not known");
        }
        tracing::info!("stopping; tracking goes on in the kernel");
    }

    /// How long until the next point of the stream.
    fn until_due(&self) -> Duration {
        if self.applications.are_busy() || self.group.is_busy() {
            return HOOKS_LOOK;
        }
        if !self.in_order() {
            return Duration::MAX;
        }
        self.ordered.due.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    /// Does one piece of work; false if there is none now.
    fn step(&mut self) -> bool {
        if self.awaited.front().is_some_and(|a| a.since.elapsed() > self.options.stored_max) {
            tracing::error!(
                code = "HW-1483",
                seconds = self.options.stored_max.as_secs(),
                "the collector does not store what it was sent; it is sent again in a new session"
            );
            self.wait_for_link_down();
            return true;
        }
        if self.awaited.len() >= AWAITED_MAX {
            return false;
        }
        // Who has gone was told that it was not done.
        self.point_wanted.retain(|waiting| !waiting.is_closed());
        if self.point_wanted.is_empty() {
            // Whoever asked for an application-consistent one was refused, or has gone.
            self.applications.ask(false);
        }
        self.keep_order();
        let now = Instant::now();
        let applications = self.see_to_applications();
        let due = match (self.see_to_group(&applications), applications) {
            (ForGroup::Freeze, _) => true,
            (ForGroup::Wait, _) | (_, Applications::Wait) => false,
            (_, Applications::Alone) => now >= self.point_due || !self.point_wanted.is_empty(),
            (_, Applications::Freeze) => true,
        };
        self.delta_open = true;
        let worked = if self.in_order() && due {
            self.make_ordered(Make::Frozen);
            self.frozen_point_over();
            true
        } else if self.in_order() && now >= self.ordered.due {
            self.make_ordered(Make::Crash);
            true
        } else if self.ordered.is_pressed() {
            self.make_ordered(Make::Progress);
            true
        } else if due && !self.ordered.is_streaming() && self.points_possible() {
            self.make_point();
            self.frozen_point_over();
            true
        } else {
            self.copy_slice()
        };
        self.delta_open = false;
        worked || self.compare_some()
    }

    /// Whatever came of it, nobody stands still for it any more.
    fn frozen_point_over(&mut self) {
        self.applications.release();
        self.group_freeze_over();
    }

    /// Ends an epoch; disks whose bits can't be trusted become suspect.
    /// Answers those with something in flight.
    fn end_epoch(&mut self) -> Result<Vec<DiskId>, TrackerError> {
        let started = Instant::now();
        let disks = &mut self.disks;
        let end = self.tracker.end_epoch(|id, index, bits| {
            if let Some(disk) = disks.iter_mut().find(|d| d.id() == id) {
                disk.ledger.marked(index, bits);
            }
        })?;
        self.epoch_ended(end, started)
    }

    /// What an epoch's end found, once its bits are in the ledgers.
    fn epoch_ended(&mut self, end: EpochEnd, started: Instant) -> Result<Vec<DiskId>, TrackerError> {
        for disk in &mut self.disks {
            disk.ledger.settle();
        }
        self.metrics.epoch(started.elapsed());
        for (id, fault) in end.faults {
            self.distrust(id, &fault);
        }
        // Until then the tracker tells them again, to the next life of the agent too.
        if self.doubts.written() {
            self.tracker.faults_noted()?;
        }
        Ok(end.unsettled)
    }

    /// A disk's bits are incomplete.
    fn distrust(&mut self, id: DiskId, fault: &Fault) {
        let reason = fault.to_string();
        self.metrics.fault(fault);
        let Some(at) = self.disks.iter().position(|d| d.id() == id) else { return };
        if *fault == Fault::Tampered
            && let Some(device) = self.disks[at].device.clone()
            && let Err(error) = self.begin_tracking(at, device)
        {
            // Comparing what goes on changing unseen would be of no use.
            self.untracked(at, &error);
            self.doubts.raise(id, reason);
            return;
        }
        self.suspect(at, reason);
    }

    /// The vault's copy of a disk can't be trusted, for this reason; whatever happens to this process, that is remembered.
    fn suspect(&mut self, at: usize, reason: String) {
        let disk = &mut self.disks[at];
        let (id, name) = (disk.id(), &disk.protected.name);
        tracing::warn!(disk = %name, id = %id, reason, code = "HW-1460", "disk is suspect: writes may have been missed");
        if !disk.protected.replicated {
            // There is no copy yet that could be compared.
            return self.start_initial(id);
        }
        self.doubts.raise(id, reason.clone());
        disk.state.set(DiskState::Suspect(reason.clone()));
        if self.options.resync_automatically {
            self.start_resync(id, reason);
        }
    }

    /// Takes in what the session has sent, without waiting.
    fn take_link_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.on_link(event);
        }
    }

    /// Takes in what the session and operators have sent, without waiting.
    fn take_events(&mut self) {
        self.take_link_events();
        while let Some((work, answer)) = self.put_off.pop_front() {
            self.on_request(work, answer);
        }
        while let Ok((work, answer)) = self.control.try_recv() {
            self.on_request(work, answer);
        }
        self.take_group_asks();
    }

    /// Waits for something to happen, at most so long.
    fn wait(&mut self, most: Duration) {
        self.pulse.step();
        let runtime = self.runtime.clone();
        enum Woken {
            Link(Option<LinkEvent>),
            Control(Option<Ask>),
            Group,
            Time,
        }
        let woken = runtime.block_on(async {
            tokio::select! {
                event = self.events.recv(), if !self.events.is_closed() => Woken::Link(event),
                ask = self.control.recv(), if !self.control.is_closed() => Woken::Control(ask),
                // What it is, is taken in with the next step.
                () = self.group.asked() => Woken::Group,
                () = tokio::time::sleep(most) => Woken::Time,
            }
        });
        match woken {
            Woken::Link(Some(event)) => self.on_link(event),
            Woken::Control(Some((work, answer))) => self.on_request(work, answer),
            _ => {}
        }
    }

    fn stopping(&self) -> bool {
        self.stop.load(std::sync::atomic::Ordering::Acquire)
    }

    fn disk_mut(&mut self, id: DiskId) -> Option<&mut Disk> {
        self.disks.iter_mut().find(|d| d.id() == id)
    }

    fn save_registry(&self) {
        if let Err(error) = self.registry.save(&self.options.state_dir) {
            tracing::error!(code = "HW-1461", %error, dir = %self.options.state_dir.display(),
                "cannot write the list of protected disks; after a reboot the old one counts");
        }
    }
}
