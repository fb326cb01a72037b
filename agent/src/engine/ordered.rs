//! Write-ordered mode: entering and leaving it.
//!
//! **Entering.** Capture begins, for all disks at once; then what is pending is read, live, while the stream is kept. Writes that
//! were submitted before and end later are in no record: they are marked when they complete, nothing captured explains
//! the mark, and so they are read too (`ordered/epoch.rs`). Once all is read, at a position P of the stream, each position from P on
//! is crash-consistent: the reads saw at most what the stream has up to P, and the stream repeats it in order.
//!
//! **Leaving.** For whatever reason: capture ends, and all that is pending is read as in bitmap mode. A granule leaves pending
//! only when a delta is stored that has the stream up to a position behind every change to it, so nothing is lost. The way
//! back is the way in; if it is lost again soon, it is tried ever more rarely.

mod epoch;
mod point;

pub(super) use point::Make;

use super::{Engine, disk::Disk, protect::operator, state::DiskState};
use crate::{
    capture::{
        CaptureError, Layout, Loss, StreamPosition, StreamReader, Tap, assemble::CapturedDisk,
        pool::BlockPool,
    },
    device::{BlockDevice, Hook},
    error::{Coded, OperatorError},
    source::BufferPool,
    tracker::{TrackerError, barrier::Barrier, probe::Kernel, quiet::monotonic_ns},
};
use highwater_delta::{BlockRange, DiskId};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

/// The first wait before write-ordered mode is entered again, and the longest.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_LONGEST: Duration = Duration::from_secs(300);
/// After so long without being lost, the next loss is taken for the first.
const STEADY: Duration = Duration::from_secs(120);
/// How long writes that were under way when capture began are waited for, on devices that do not tell which blocks completed.
const SUBMITTED_MAX: Duration = Duration::from_secs(5);
/// A write that has been under way for longer is one whose completion was not shown.
const UNDER_WAY_MAX: Duration = Duration::from_secs(60);
/// Between the begin of capture and the first point: what was under way on other devices when it began is over by then.
const ENTRY_GRACE: Duration = Duration::from_secs(1);
/// The smallest ring that is tried.
const RING_BYTES_MIN: usize = 1 << 20;
/// Buffers for reading single blocks.
const FETCH_BYTES: usize = 1 << 20;

/// What the operator chose of capture.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Whether writes are to be captured at all.
    pub enabled: bool,
    /// The ring, a power of two.
    pub ring_bytes: usize,
    /// What is held of the stream beside the ring.
    pub buffer_bytes: u64,
    /// Copies of the program; `None`: what the kernel needs.
    pub copies: Option<usize>,
    /// Between crash-consistent points.
    pub point_interval: Duration,
    /// Between times that a known page is read back through the way of capture.
    pub verify_interval: Duration,
}

/// Why write-ordered mode was left, or not entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// A word for metrics.
    pub kind: &'static str,
    /// For operators.
    pub reason: String,
    /// When.
    pub at: SystemTime,
}

/// What an operator can do about a kind of leaving; none: nothing.
pub(super) fn advice(kind: &str) -> Option<&'static str> {
    match kind {
        "overflow" => Some(
            "raise capture.memory if it goes on; see whether the link, its bandwidth limit or the collector is too slow",
        ),
        "unreadable" => Some("see the state of the disks"),
        "unsupported" => Some(
            "set capture.mode = \"off\" if it goes on: zoned devices and inline encryption are replicated by bitmaps",
        ),
        "unverified" => Some("report it, with the kernel's version"),
        "reader-ended" => Some("see that the machine has memory and tasks left"),
        _ => None,
    }
}

/// The programs and the reader, once they are loaded.
struct Live {
    tap: Tap,
    reader: StreamReader,
    barrier: Barrier,
}

/// What holds while the stream is kept.
struct Streaming {
    since: Instant,
    disks: Vec<(DiskId, BlockDevice)>,
    /// Reads of the disks saw at most what the stream has up to here: no position before is a state of them.
    floor: StreamPosition,
    /// All that the ledgers call covered lies before this position.
    covered_to: StreamPosition,
    /// What completed since the stream began is read, whether a record explains it or not: no window was explained yet, or
    /// only too soon.
    first_window: bool,
    /// When the last point of it was committed.
    committed: Option<Instant>,
    /// A known page was read back.
    verified: Instant,
    /// What lies on the disks was looked at.
    surveyed: Option<Instant>,
}

/// Write-ordered mode as the engine has it.
pub(super) struct Ordered {
    options: CaptureOptions,
    live: Option<Live>,
    streaming: Option<Streaming>,
    unavailable: Option<OperatorError>,
    retry_at: Instant,
    retry_after: Duration,
    pub(super) due: Instant,
    /// How often it was left, by kind.
    pub(super) drops: BTreeMap<&'static str, u64>,
    /// The last time.
    pub(super) last_drop: Option<Dropped>,
}

impl Ordered {
    pub(super) fn new(options: CaptureOptions) -> Self {
        let unavailable = (!options.enabled).then(|| {
            operator(
                1493,
                "capture is switched off".into(),
                "Set capture.mode = \"automatic\" to switch it on",
            )
        });
        Self {
            options,
            live: None,
            streaming: None,
            unavailable,
            retry_at: Instant::now(),
            retry_after: RETRY_FIRST,
            due: Instant::now(),
            drops: BTreeMap::new(),
            last_drop: None,
        }
    }

    /// Whether the stream is kept.
    pub(super) fn is_streaming(&self) -> bool {
        self.streaming.is_some()
    }
    /// Whether the stream of this disk is kept.
    pub(super) fn captures(&self, disk: DiskId) -> bool {
        self.streaming.as_ref().is_some_and(|s| s.disks.iter().any(|(id, _)| *id == disk))
    }
    /// Why it can never be entered on this machine; none if it can.
    pub(super) fn unavailable(&self) -> Option<&OperatorError> {
        self.unavailable.as_ref()
    }
    /// How long until it is tried again.
    pub(super) fn retry_in(&self) -> Option<Duration> {
        let wait = self.retry_at.saturating_duration_since(Instant::now());
        (self.streaming.is_none() && self.unavailable.is_none() && !wait.is_zero()).then_some(wait)
    }
    /// The programs' side and the reader's.
    pub(super) fn figures(&self) -> Option<(&Tap, &StreamReader)> {
        self.live.as_ref().map(|live| (&live.tap, &live.reader))
    }
    /// The limits.
    pub(super) fn options(&self) -> &CaptureOptions {
        &self.options
    }
    /// Whether so much of the stream is held that some should be sent.
    pub(super) fn is_pressed(&self) -> bool {
        self.streaming.is_some() && self.live.as_ref().is_some_and(|live| live.reader.is_pressed())
    }

    /// Ranges of a disk are about to be read by the engine.
    pub(super) fn will_read(&self, disk: DiskId, ranges: &[BlockRange]) {
        if let (Some(_), Some(live)) = (&self.streaming, &self.live) {
            live.reader.will_read(disk, ranges);
        }
    }
    /// Ranges of a disk were read by the engine: no earlier position is a state of it now.
    pub(super) fn was_read(&mut self, disk: DiskId, ranges: &[BlockRange]) {
        if let (Some(streaming), Some(live)) = (&mut self.streaming, &self.live) {
            streaming.floor = streaming.floor.max(live.reader.position());
            live.reader.forget(disk, ranges);
        }
    }
    /// These ranges of a disk are not replicated.
    pub(super) fn set_skip(&self, disk: DiskId, skip: Vec<BlockRange>) {
        if let (Some(_), Some(live)) = (&self.streaming, &self.live) {
            live.reader.set_skip(disk, skip);
        }
    }
}

/// Why it was not entered.
#[derive(Debug, thiserror::Error)]
enum EnterError {
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    #[error("the reader could not be started: {0}")]
    Start(#[from] std::io::Error),
    #[error("the stream is not read")]
    Stalled,
    #[error("writes that were submitted before take too long")]
    UnderWay,
    #[error("the captured stream is not complete: {0}")]
    Lost(Loss),
}

impl Engine {
    /// Enters write-ordered mode where that is possible and not so yet, and leaves it where it cannot go on.
    pub(super) fn keep_order(&mut self) {
        let wanted = self.capturable();
        if let Some(streaming) = &self.ordered.streaming {
            let same = streaming.disks == wanted;
            let broken = self.ordered.live.as_ref().and_then(|live| live.reader.take_broken());
            if let Some((id, error)) = broken {
                self.leave_order("unreadable", &format!("disk {id}: {error}"));
                self.unreadable(id, &error);
            } else if self.ordered.live.as_ref().is_some_and(|live| live.reader.has_ended()) {
                self.leave_order("reader-ended", "a thread that reads the stream has ended");
                self.ordered.live = None;
            } else if !same {
                self.leave_order("disks-changed", "the disks that are captured changed");
            }
        }
        self.look_for_losses();
        self.verify_capture();
        if self.ordered.streaming.is_some()
            || self.ordered.unavailable.is_some()
            || wanted.is_empty()
            || Instant::now() < self.ordered.retry_at
        {
            return;
        }
        match self.enter_order(wanted) {
            Ok(()) => {}
            Err(EnterError::Capture(error)) if self.ordered.live.is_none() => {
                let error = error.operator();
                tracing::warn!(
                    code = format!("HW-{}", error.code),
                    cause = error.cause,
                    "writes cannot be captured in order; replication goes on in bitmap mode"
                );
                self.ordered.unavailable = Some(error);
            }
            Err(error) => {
                let kind = if let EnterError::Lost(loss) = &error { loss.as_str() } else { "not-entered" };
                self.leave_order(kind, &error.to_string());
            }
        }
    }

    /// What is lost already need not be found only when the next point is made; and a window is proved while it can be.
    fn look_for_losses(&mut self) {
        let (Some(live), Some(_)) = (&mut self.ordered.live, &self.ordered.streaming) else { return };
        match live.tap.look(&live.barrier) {
            Ok(None) => {}
            Ok(Some(loss)) => {
                self.leave_order(loss.as_str(), &EnterError::Lost(loss).to_string());
            }
            Err(error) => {
                let error = error.operator();
                self.leave_order("unproved", &error.to_string());
            }
        }
    }

    /// Now and then a known page is read back through the capture path. If that fails, nothing that is captured on this machine is
    /// believed any more.
    fn verify_capture(&mut self) {
        let (Some(live), Some(streaming)) = (&mut self.ordered.live, &mut self.ordered.streaming) else {
            return;
        };
        let Some((_, device)) = streaming.disks.first() else { return };
        if streaming.verified.elapsed() < self.ordered.options.verify_interval {
            return;
        }
        streaming.verified = Instant::now();
        if let Err(error) = live.tap.verify(&live.reader, device) {
            let wrong = matches!(error, CaptureError::Bases(_));
            let ids: Vec<DiskId> = streaming.disks.iter().map(|(id, _)| *id).collect();
            let error = error.operator();
            if wrong {
                tracing::error!(
                    code = format!("HW-{}", error.code),
                    cause = error.cause,
                    "writes are not captured any more until the agent starts anew; the disks are compared with the vault"
                );
                self.ordered.unavailable = Some(error.clone());
            }
            self.leave_order("unverified", &error.to_string());
            if wrong {
                // What was stored since the last time may be wrong too, and is marked nowhere.
                for id in ids {
                    self.start_resync(id, error.to_string());
                }
            }
        }
    }

    /// The disks whose writes are to be captured: all that are tracked and not in doubt.
    fn capturable(&self) -> Vec<(DiskId, BlockDevice)> {
        let may = |disk: &&Disk| {
            matches!(
                disk.state.state(),
                DiskState::InitialReplication
                    | DiskState::Bitmap
                    | DiskState::WriteOrdered
                    | DiskState::Resynchronizing(_)
            )
        };
        self.disks.iter().filter(may).filter_map(|d| Some((d.id(), d.device.clone()?))).collect()
    }

    fn enter_order(&mut self, disks: Vec<(DiskId, BlockDevice)>) -> Result<(), EnterError> {
        let started = Instant::now();
        self.pulse.work();
        if self.ordered.live.is_none()
            && let Some((_, device)) = disks.first()
        {
            self.ordered.live = Some(load(&self.ordered.options, device)?);
        }
        let Some(live) = self.ordered.live.as_mut() else { return Err(EnterError::Stalled) };
        let captured = (self.disks.iter())
            .filter_map(|disk| {
                let (id, device) = disks.iter().find(|(id, _)| *id == disk.id())?;
                Some(CapturedDisk {
                    id: *id,
                    dev: device.whole_kernel_dev(),
                    start: device.start_sector * 512,
                    bytes: device.size_bytes,
                    by_bio: device.hook == Hook::Bio,
                    skip: disk.blocks(disk.ledger.skipped()),
                })
            })
            .collect();
        live.reader.begin(captured, disks.iter().cloned().collect());
        live.tap.begin(disks.iter().map(|(_, device)| device.whole_kernel_dev()), &live.barrier)?;
        let began_ns = monotonic_ns();
        for (id, _) in disks.iter().filter(|(_, device)| device.hook == Hook::Bio) {
            let until = Instant::now() + SUBMITTED_MAX;
            let from_ns = began_ns.saturating_sub(UNDER_WAY_MAX.as_nanos() as u64);
            while self.tracker.submitted_between(*id, from_ns, began_ns)? > 0 {
                if Instant::now() >= until {
                    return Err(EnterError::UnderWay);
                }
                self.pulse.work();
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
        // What was marked so far is read, whether it was captured or not.
        self.end_epoch()?;
        let Some(live) = self.ordered.live.as_ref() else { return Err(EnterError::Stalled) };
        let position = live.reader.position();
        if live.reader.explain(position, epoch::EXPLAIN_MAX).is_none() {
            return Err(live.tap.lost_so_far()?.map_or(EnterError::Stalled, EnterError::Lost));
        }
        let names = disks.len();
        self.ordered.streaming = Some(Streaming {
            since: Instant::now(),
            disks,
            floor: position,
            covered_to: position,
            first_window: true,
            committed: None,
            verified: Instant::now(),
            surveyed: None,
        });
        let pending: u64 = self.disks.iter().map(Disk::to_send_bytes).sum();
        tracing::info!(
            disks = names,
            pending_bytes = pending,
            took_ms = started.elapsed().as_millis() as u64,
            "writes are captured in order; what is pending is read"
        );
        Ok(())
    }

    /// Goes back to bitmap mode: everything that is not stored is read from the disks.
    pub(super) fn leave_order(&mut self, kind: &'static str, reason: &str) {
        if let Some(live) = self.ordered.live.as_mut() {
            live.tap.end();
            live.reader.end();
        }
        let was = self.ordered.streaming.take();
        let ordered = &mut self.ordered;
        // Nothing that another try could meet again.
        let harmless = matches!(kind, "disks-changed" | "disconnected");
        if harmless || was.as_ref().is_some_and(|s| s.since.elapsed() > STEADY) {
            ordered.retry_after = RETRY_FIRST;
        }
        ordered.retry_at = Instant::now();
        if !harmless {
            ordered.retry_at += ordered.retry_after;
            ordered.retry_after = (ordered.retry_after * 2).min(RETRY_LONGEST);
        }
        *ordered.drops.entry(kind).or_default() += 1;
        ordered.last_drop = Some(Dropped { kind, reason: reason.to_owned(), at: SystemTime::now() });
        self.metrics.left_order(kind);
        let wait = ordered.retry_at.saturating_duration_since(Instant::now());
        let retry_s = wait.as_millis().div_ceil(1000) as u64;
        let action = advice(kind).unwrap_or("nothing has to be done");
        if harmless {
            tracing::info!(
                code = "HW-1494",
                kind,
                reason,
                "write-ordered mode is left; it is entered again as soon as it can be"
            );
        } else if ordered.unavailable.is_some() {
            tracing::warn!(
                code = "HW-1494",
                kind,
                reason,
                action,
                "write-ordered mode is left for good; nothing is lost"
            );
        } else {
            tracing::warn!(
                code = "HW-1494",
                kind,
                reason,
                action,
                retry_s,
                "write-ordered mode is left; nothing is lost, and it is entered again"
            );
        }
        if was.is_some() {
            self.forget_taken();
            for disk in &mut self.disks {
                if *disk.state.state() == DiskState::WriteOrdered {
                    disk.state.set(DiskState::Bitmap);
                }
            }
        }
    }

    /// The session has ended: what is under way will not be acknowledged, so the stream cannot go on from it.
    pub(super) fn lose_order(&mut self) {
        if self.ordered.streaming.is_some() {
            self.leave_order("disconnected", "the session with the collector ended");
        }
    }
}

/// Loads the programs with the largest ring that the kernel gives, finds its memory, and starts the reader.
fn load(options: &CaptureOptions, device: &BlockDevice) -> Result<Live, EnterError> {
    let kernel = Kernel::probe()?;
    let layout = Layout::of(&kernel)?;
    let barrier = Barrier::new(kernel.preemptible_tracepoints)?;
    drop(kernel);
    let mut ring_bytes = options.ring_bytes;
    let (mut tap, mut ring) = loop {
        match Tap::load(layout.clone(), options.copies, ring_bytes) {
            Err(CaptureError::Kernel { cause, .. })
                if ring_bytes > RING_BYTES_MIN && options.ring_bytes > RING_BYTES_MIN =>
            {
                tracing::warn!(
                    ring_bytes,
                    cause,
                    "the kernel refuses a ring of this size; half of it is tried"
                );
                ring_bytes /= 2;
            }
            other => break other?,
        }
    };
    let found = tap.prepare(&mut ring, device)?;
    crate::memory::give_back();
    let pool = BlockPool::new(options.buffer_bytes);
    let reader = StreamReader::start(ring, pool, BufferPool::new(FETCH_BYTES))?;
    tracing::info!(?found, copies = tap.copies(), ring_bytes, "writes can be captured");
    Ok(Live { tap, reader, barrier })
}
