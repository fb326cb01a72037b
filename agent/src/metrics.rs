//! Prometheus metrics of the agent. Counters are raised where things happen; gauges are set once a second by the engine.
//! Names: `highwater_agent_*`, base units.

mod capture;
mod consistency;

pub(crate) use consistency::MarkerStage;

use crate::{
    control::status::{CaptureStatus, DiskState as Kind, DiskStatus},
    group::GroupStatus,
    tracker::{DeviceFigures, Fault},
};
use highwater_abi::class;
use highwater_delta::{DiskId, PointInfo};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, Instant, SystemTime},
};

type Labels = Vec<(&'static str, String)>;
type Float = Gauge<f64, AtomicU64>;

const PUBLISH_EVERY: Duration = Duration::from_secs(1);
/// Weight of the newest second in the churn.
const CHURN_WEIGHT: f64 = 0.2;

/// Kinds of changes that are told apart, as labels.
const CLASSES: [(&str, usize); 2] = [("write", class::WRITE), ("discard", class::DISCARD)];

/// All of them.
pub struct Metrics {
    /// When the agent was started.
    pub started_at: SystemTime,
    registry: Registry,
    chunks_sent: Counter,
    bytes_read: Counter,
    bytes_sent: Counter,
    blocks_compared: Counter,
    blocks_different: Counter,
    resyncs: Counter,
    background_compared: Counter,
    background_different: Counter,
    points: Family<Labels, Counter>,
    errors: Family<Labels, Counter>,
    disconnects: Family<Labels, Counter>,
    faults: Family<Labels, Counter>,
    freeze: Histogram,
    epoch: Histogram,
    stored_after: Histogram,
    rounds: Histogram,
    connected: Gauge,
    point_age: Float,
    buffers: Gauge,
    dirty: Family<Labels, Gauge>,
    pending: Family<Labels, Gauge>,
    size: Family<Labels, Gauge>,
    churn: Family<Labels, Gauge>,
    state: Family<Labels, Gauge>,
    state_seconds: Family<Labels, Float>,
    tracker_writes: Family<Labels, Gauge>,
    tracker_sectors: Family<Labels, Gauge>,
    kernel_sectors: Family<Labels, Gauge>,
    misses: Family<Labels, Gauge>,
    failed: Family<Labels, Gauge>,
    compared: Family<Labels, Gauge>,
    capture: capture::Capture,
    consistency: consistency::Consistency,
    inner: Mutex<Inner>,
}

struct Inner {
    published: Instant,
    churn: HashMap<DiskId, Churn>,
    /// Disks that have series.
    shown: HashMap<DiskId, String>,
}

struct Churn {
    at: Instant,
    sectors: u64,
    bytes_per_s: f64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn seconds(first: f64, count: u16) -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(first, 2.0, count))
}

impl Metrics {
    /// Registers all of them.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            started_at: SystemTime::now(),
            registry: Registry::with_prefix("highwater_agent"),
            chunks_sent: Counter::default(),
            bytes_read: Counter::default(),
            bytes_sent: Counter::default(),
            blocks_compared: Counter::default(),
            blocks_different: Counter::default(),
            resyncs: Counter::default(),
            background_compared: Counter::default(),
            background_different: Counter::default(),
            points: Family::default(),
            errors: Family::default(),
            disconnects: Family::default(),
            faults: Family::default(),
            freeze: seconds(0.001, 15),
            epoch: seconds(0.0005, 14),
            stored_after: seconds(0.01, 16),
            rounds: Histogram::new((0..9).map(f64::from)),
            connected: Gauge::default(),
            point_age: Float::default(),
            buffers: Gauge::default(),
            dirty: Family::default(),
            pending: Family::default(),
            size: Family::default(),
            churn: Family::default(),
            state: Family::default(),
            state_seconds: Family::default(),
            tracker_writes: Family::default(),
            tracker_sectors: Family::default(),
            kernel_sectors: Family::default(),
            misses: Family::default(),
            failed: Family::default(),
            compared: Family::default(),
            capture: capture::Capture::default(),
            consistency: consistency::Consistency::default(),
            inner: Mutex::new(Inner {
                published: Instant::now(),
                churn: HashMap::new(),
                shown: HashMap::new(),
            }),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("chunks_sent", "Chunks handed to the session", self.chunks_sent.clone());
        r.register_with_unit("read", "Bytes read from protected disks", Unit::Bytes, self.bytes_read.clone());
        r.register_with_unit(
            "sent",
            "Bytes of encoded chunks handed to the session",
            Unit::Bytes,
            self.bytes_sent.clone(),
        );
        r.register(
            "blocks_compared",
            "Blocks compared with the vault's hashes",
            self.blocks_compared.clone(),
        );
        r.register(
            "blocks_different",
            "Blocks found different from the vault's",
            self.blocks_different.clone(),
        );
        r.register(
            "resynchronizations",
            "Comparisons of a whole disk with the vault begun",
            self.resyncs.clone(),
        );
        r.register(
            "background_blocks_compared",
            "Blocks compared with the vault in the background",
            self.background_compared.clone(),
        );
        r.register(
            "background_blocks_healed",
            "Blocks of which the vault had another content than the disk, though nothing was written; they are sent again",
            self.background_different.clone(),
        );
        r.register("points", "Recovery points stored, by consistency", self.points.clone());
        r.register("errors", "Warnings and errors logged, by code", self.errors.clone());
        r.register("disconnects", "Ended sessions and failed attempts, by code", self.disconnects.clone());
        r.register("tracking_faults", "Findings that made a disk suspect, by kind", self.faults.clone());
        r.register_with_unit(
            "freeze",
            "Time that filesystems were frozen for a point",
            Unit::Seconds,
            self.freeze.clone(),
        );
        r.register_with_unit(
            "epoch_end",
            "Time to end an epoch of all disks",
            Unit::Seconds,
            self.epoch.clone(),
        );
        r.register_with_unit(
            "point_stored_after",
            "From a point's marker to its acknowledgement as stored",
            Unit::Seconds,
            self.stored_after.clone(),
        );
        r.register("rounds", "Live rounds before a freeze", self.rounds.clone());
        r.register("connected", "1 while a session with the collector is up", self.connected.clone());
        r.register_with_unit(
            "rpo_age",
            "Age of the last stored point's marker; -1 before the first",
            Unit::Seconds,
            self.point_age.clone(),
        );
        r.register_with_unit("buffers", "Bytes of read buffers allocated", Unit::Bytes, self.buffers.clone());
        r.register_with_unit(
            "disk_dirty",
            "Bytes marked in the current epoch",
            Unit::Bytes,
            self.dirty.clone(),
        );
        r.register_with_unit(
            "disk_pending",
            "Bytes of ended epochs not known to be stored",
            Unit::Bytes,
            self.pending.clone(),
        );
        r.register_with_unit("disk_size", "Size of the disk", Unit::Bytes, self.size.clone());
        r.register("disk_churn_bytes_per_second", "Bytes written per second lately", self.churn.clone());
        r.register("disk_state", "1 for the state that the disk is in", self.state.clone());
        r.register_with_unit(
            "disk_state_time",
            "Time spent in each state since the agent started",
            Unit::Seconds,
            self.state_seconds.clone(),
        );
        r.register(
            "tracker_writes",
            "Completed writes seen by the tracker, by class",
            self.tracker_writes.clone(),
        );
        r.register("tracker_sectors", "Sectors seen by the tracker, by class", self.tracker_sectors.clone());
        r.register(
            "kernel_sectors",
            "Sectors counted by the kernel since the device appeared, by class",
            self.kernel_sectors.clone(),
        );
        r.register(
            "tracker_misses",
            "Events that single copies of the tracking programs missed",
            self.misses.clone(),
        );
        r.register("tracker_failed_writes", "Writes that the device reported as failed", self.failed.clone());
        r.register(
            "tracker_compared",
            "1 if the tracker's counts are held against the kernel's",
            self.compared.clone(),
        );
        self.capture.register(r);
        self.consistency.register(r);
    }

    /// The text that Prometheus scrapes.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.chunks_sent.inc();
        self.bytes_sent.inc_by(bytes as u64);
    }
    pub(crate) fn read(&self, bytes: usize) {
        self.bytes_read.inc_by(bytes as u64);
    }
    pub(crate) fn compared(&self, blocks: u64, different: u64) {
        if blocks > 0 {
            self.blocks_compared.inc_by(blocks);
            self.blocks_different.inc_by(different);
        }
    }
    pub(crate) fn background_compared(&self, blocks: u64) {
        self.background_compared.inc_by(blocks);
    }
    pub(crate) fn background_different(&self, blocks: u64) {
        self.background_different.inc_by(blocks);
    }
    pub(crate) fn left_order(&self, kind: &str) {
        self.capture.left(kind);
    }
    pub(crate) fn read_again(&self, healed: u64, lacking: u64) {
        self.capture.again(healed, lacking);
    }
    pub(crate) fn captured(&self, status: &CaptureStatus) {
        self.capture.publish(status);
    }
    pub(crate) fn marker(&self, stage: MarkerStage) {
        self.consistency.marker(stage);
    }
    pub(crate) fn guest(&self, name: &str, stood_still: bool) {
        self.consistency.guest(name, stood_still);
    }
    pub(crate) fn grouped(&self, group: Option<&GroupStatus>) {
        self.consistency.publish(group);
    }
    pub(crate) fn resync(&self) {
        self.resyncs.inc();
    }
    pub(crate) fn point(&self, info: &PointInfo, stored_after: Duration) {
        let consistency = format!("{:?}", info.consistency).to_lowercase();
        self.points.get_or_create(&vec![("consistency", consistency)]).inc();
        self.stored_after.observe(stored_after.as_secs_f64());
    }
    /// Something with this code was logged.
    fn error(&self, code: &str) {
        self.errors.get_or_create(&vec![("code", code.to_owned())]).inc();
    }
    pub(crate) fn down(&self, code: u16) {
        self.disconnects.get_or_create(&vec![("code", format!("HW-{code}"))]).inc();
    }
    pub(crate) fn fault(&self, fault: &Fault) {
        let kind = match fault {
            Fault::SkippedEvents => "skipped-events",
            Fault::UnseenSectors(_) => "unseen-sectors",
            Fault::Unmarked(_) => "unmarked",
            Fault::InflightFull(_) => "inflight-full",
            Fault::Passthrough(_) => "passthrough",
            Fault::Tampered => "tampered",
        };
        self.faults.get_or_create(&vec![("kind", kind.to_owned())]).inc();
    }
    pub(crate) fn frozen(&self, lasted: Duration) {
        self.freeze.observe(lasted.as_secs_f64());
    }
    pub(crate) fn epoch(&self, lasted: Duration) {
        self.epoch.observe(lasted.as_secs_f64());
    }
    pub(crate) fn rounds(&self, rounds: u32) {
        self.rounds.observe(f64::from(rounds));
    }

    /// Bytes per second written to a disk lately.
    pub(crate) fn churn(&self, disk: DiskId) -> u64 {
        self.lock().churn.get(&disk).map_or(0, |c| c.bytes_per_s as u64)
    }

    pub(crate) fn publish_due(&self) -> bool {
        let mut inner = self.lock();
        let due = inner.published.elapsed() >= PUBLISH_EVERY;
        if due {
            inner.published = Instant::now();
        }
        due
    }

    pub(crate) fn publish(
        &self,
        rows: &[(DiskStatus, [Duration; Kind::ALL.len()], DeviceFigures)],
        connected: bool,
        age: Option<Duration>,
        buffers: usize,
    ) {
        self.connected.set(i64::from(connected));
        self.point_age.set(age.map_or(-1.0, |a| a.as_secs_f64()));
        self.buffers.set(buffers as i64);
        self.forget_others(rows.iter().map(|(disk, ..)| (disk.id, disk.name.clone())).collect());
        for (disk, spent, figures) in rows {
            let label = |more: &[(&'static str, &str)]| labels(disk.id, &disk.name, more);
            let set = |family: &Family<Labels, Gauge>, labels: &Labels, value: u64| {
                family.get_or_create(labels).set(i64::try_from(value).unwrap_or(i64::MAX));
            };
            let plain = label(&[]);
            set(&self.dirty, &plain, disk.dirty_bytes);
            set(&self.pending, &plain, disk.pending_bytes);
            set(&self.size, &plain, disk.size_bytes);
            set(&self.misses, &plain, figures.misses);
            set(&self.failed, &plain, figures.counters.failed);
            set(&self.compared, &plain, u64::from(figures.compared));
            set(&self.churn, &plain, self.note_churn(disk.id, figures.counters.sectors[class::WRITE]));
            for (name, class) in CLASSES {
                let labels = label(&[("class", name)]);
                set(&self.tracker_writes, &labels, figures.counters.events[class]);
                set(&self.tracker_sectors, &labels, figures.counters.sectors[class]);
            }
            for (name, sectors) in [
                ("write", disk.tracker.kernel_sectors_written),
                ("discard", disk.tracker.kernel_sectors_discarded),
            ] {
                if let Some(sectors) = sectors {
                    set(&self.kernel_sectors, &label(&[("class", name)]), sectors);
                }
            }
            for (kind, spent) in Kind::ALL.iter().zip(spent) {
                let labels = label(&[("state", kind.as_str())]);
                set(&self.state, &labels, u64::from(disk.state == *kind));
                self.state_seconds.get_or_create(&labels).set(spent.as_secs_f64());
            }
        }
    }

    /// Removes the series of disks that are protected no longer, or an alarm about one would never end.
    fn forget_others(&self, now: HashMap<DiskId, String>) {
        let gone: Vec<(DiskId, String)> = {
            let mut inner = self.lock();
            inner.churn.retain(|disk, _| now.contains_key(disk));
            let before = std::mem::replace(&mut inner.shown, now);
            before.into_iter().filter(|(disk, name)| inner.shown.get(disk) != Some(name)).collect()
        };
        for (disk, name) in gone {
            let plain = labels(disk, &name, &[]);
            for family in [
                &self.dirty,
                &self.pending,
                &self.size,
                &self.misses,
                &self.failed,
                &self.compared,
                &self.churn,
            ] {
                family.remove(&plain);
            }
            for (class, _) in CLASSES {
                let labels = labels(disk, &name, &[("class", class)]);
                for family in [&self.tracker_writes, &self.tracker_sectors, &self.kernel_sectors] {
                    family.remove(&labels);
                }
            }
            for kind in Kind::ALL {
                let labels = labels(disk, &name, &[("state", kind.as_str())]);
                self.state.remove(&labels);
                self.state_seconds.remove(&labels);
            }
        }
    }

    fn note_churn(&self, disk: DiskId, sectors: u64) -> u64 {
        let mut inner = self.lock();
        let now = Instant::now();
        let entry = inner.churn.entry(disk).or_insert(Churn { at: now, sectors, bytes_per_s: 0.0 });
        let seconds = now.duration_since(entry.at).as_secs_f64();
        if seconds > 0.0 {
            let rate = sectors.saturating_sub(entry.sectors) as f64 * 512.0 / seconds;
            entry.bytes_per_s += (rate - entry.bytes_per_s) * CHURN_WEIGHT.max(seconds / 10.0).min(1.0);
            (entry.at, entry.sectors) = (now, sectors);
        }
        entry.bytes_per_s as u64
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts what is logged with a code, so that no error is missed.
pub struct CountErrors(pub Arc<Metrics>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for CountErrors {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if *event.metadata().level() <= tracing::Level::WARN {
            event.record(&mut Code(&self.0));
        }
    }
}

struct Code<'a>(&'a Metrics);

impl tracing::field::Visit for Code<'_> {
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        if field.name() == "code" {
            self.0.error(value);
        }
    }
    fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
}

/// Of one disk's series.
fn labels(disk: DiskId, name: &str, more: &[(&'static str, &str)]) -> Labels {
    let mut labels: Labels = vec![("disk", disk.to_string()), ("name", name.to_owned())];
    labels.extend(more.iter().map(|(k, v)| (*k, (*v).to_owned())));
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::status::TrackerStatus;

    fn row(name: &str) -> (DiskStatus, [Duration; Kind::ALL.len()], DeviceFigures) {
        let disk = DiskStatus {
            id: DiskId::new(),
            name: name.into(),
            path: None,
            identity: String::new(),
            size_bytes: 1,
            state: Kind::Error,
            reason: None,
            since_ms: 0,
            dirty_bytes: 0,
            pending_bytes: 0,
            progress: None,
            churn_bytes_per_s: 0,
            tracker: TrackerStatus {
                kernel_sectors_written: Some(1),
                kernel_sectors_discarded: Some(1),
                ..TrackerStatus::default()
            },
            swap_bytes: 0,
            has_filesystem: false,
        };
        (disk, Default::default(), DeviceFigures::default())
    }

    #[test]
    fn what_is_logged_with_a_code_is_counted() {
        use tracing_subscriber::layer::SubscriberExt;
        let metrics = Arc::new(Metrics::new());
        let subscriber = tracing_subscriber::registry().with(CountErrors(metrics.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(code = format!("HW-{}", 1101), "no connection to the collector");
            tracing::error!(code = "HW-1468", "the device is not there");
            tracing::error!(code = "HW-1468", "the device is not there");
            tracing::info!(code = "HW-1104", "no error");
            tracing::warn!(reason = "HW-1460", "no code");
        });
        let text = metrics.text();
        for line in ["errors_total{code=\"HW-1101\"} 1", "errors_total{code=\"HW-1468\"} 2"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(!text.contains("HW-1104") && !text.contains("HW-1460"), "{text}");
    }

    #[test]
    fn an_unprotected_disk_leaves_no_series() {
        let metrics = Metrics::new();
        let (gone, stays) = (row("gone"), row("stays"));
        metrics.publish(&[gone, stays.clone()], false, None, 0);
        assert!(metrics.text().contains("name=\"gone\""));
        metrics.publish(&[stays], false, None, 0);
        let text = metrics.text();
        assert!(!text.contains("name=\"gone\"") && text.contains("name=\"stays\""), "{text}");
        metrics.publish(&[], false, None, 0);
        assert!(!metrics.text().contains("disk=\""), "{}", metrics.text());
    }
}
