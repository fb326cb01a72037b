//! What Prometheus reads. Names begin with `highwater_collector_`, units are base units.

mod groups;
mod relay;

pub use groups::GroupMetrics;
pub use relay::RelayMetrics;

use crate::clock::now_ms;
use crate::lock::locked;
use highwater_delta::{Consistency, MachineId};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};
use prometheus_client::registry::Registry;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Mutex, atomic::AtomicU64};
use std::time::Duration;

/// What a commit made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Progress only.
    Partial,
    /// A recovery point of this consistency.
    Crash,
    /// A recovery point of this consistency.
    Filesystem,
    /// A recovery point of this consistency.
    Application,
}

impl EncodeLabelValue for Kind {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Self::Partial => "partial",
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        })
    }
}

impl From<Consistency> for Kind {
    fn from(consistency: Consistency) -> Self {
        match consistency {
            Consistency::Crash => Self::Crash,
            Consistency::Filesystem => Self::Filesystem,
            Consistency::Application => Self::Application,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CommitLabel {
    kind: Kind,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: String,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MachineLabel {
    machine: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UseLabel {
    r#use: &'static str,
}

/// How the memory of [`crate::memory`] stands.
#[derive(Clone, Default)]
pub struct MemoryMetrics {
    budget: Family<UseLabel, Gauge>,
    used: Family<UseLabel, Gauge>,
    waits: Counter,
    resident: Gauge,
}

impl MemoryMetrics {
    /// So much there is.
    pub fn budget(&self, r#use: &'static str, bytes: u64) {
        self.budget.get_or_create(&UseLabel { r#use }).set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
    /// So much of it is taken.
    #[must_use]
    pub fn used(&self, r#use: &'static str) -> Gauge {
        self.used.get_or_create(&UseLabel { r#use }).clone()
    }
    /// A session had to wait.
    pub fn waited(&self) {
        self.waits.inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("memory_budget_bytes", "Bytes that sessions may use", self.budget.clone());
        registry.register("memory_used_bytes", "Bytes that sessions have taken", self.used.clone());
        registry.register("memory_waits", "Times that a session waited for memory", self.waits.clone());
        registry.register("resident_bytes", "Memory of the process", self.resident.clone());
    }
}

/// What [`crate::maintenance`] has done.
#[derive(Clone, Default)]
pub struct MaintenanceMetrics {
    expired: Counter,
    merged: Counter,
    written: Counter,
    deleted: Counter,
    locked: Counter,
    failures: Counter,
}

impl MaintenanceMetrics {
    /// A machine was maintained.
    pub fn done(&self, report: &highwater_vault::maintain::Report) {
        self.expired.inc_by(report.expired);
        self.merged.inc_by(report.merged_runs);
        self.written.inc_by(report.written_bytes);
        self.deleted.inc_by(report.deleted_bytes);
        self.locked.inc_by(report.locked);
    }
    /// It failed.
    pub fn failed(&self) {
        self.failures.inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "points_expired",
            "Recovery points that policies no longer keep",
            self.expired.clone(),
        );
        registry.register("runs_merged", "Stretches of history merged into others", self.merged.clone());
        registry.register(
            "maintenance_written_bytes",
            "Bytes that maintenance wrote: with stored_bytes, the write amplification",
            self.written.clone(),
        );
        registry.register("deleted_bytes", "Bytes that maintenance deleted", self.deleted.clone());
        registry.register(
            "objects_locked",
            "Objects that the bucket was asked to lock, each once in a generation",
            self.locked.clone(),
        );
        registry.register("maintenance_failures", "Machines whose maintenance failed", self.failures.clone());
    }
}

/// What [`crate::verification`] has found.
#[derive(Clone, Default)]
pub struct VerificationMetrics {
    ended: Gauge<f64, AtomicU64>,
    problems: Gauge,
    objects: Counter,
    bytes: Counter,
    failures: Counter,
}

impl VerificationMetrics {
    /// So much more was read.
    pub fn read(&self, objects: u64, bytes: u64) {
        self.objects.inc_by(objects);
        self.bytes.inc_by(bytes);
    }
    /// So many problems are known.
    pub fn found(&self, problems: usize) {
        self.problems.set(i64::try_from(problems).unwrap_or(i64::MAX));
    }
    /// All was read, at this time in milliseconds since 1970.
    pub fn ended(&self, at_ms: u64, problems: usize) {
        self.ended.set(at_ms as f64 / 1000.0);
        self.found(problems);
    }
    /// It was broken off, and goes on later.
    pub fn failed(&self) {
        self.failures.inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "verified_timestamp_seconds",
            "When the vault was last read back as a whole, or the whole of a sample; 0: not yet",
            self.ended.clone(),
        );
        registry.register(
            "verification_problems",
            "What was found damaged in the vault, by this verification or the last; must be 0",
            self.problems.clone(),
        );
        registry.register("verified_objects", "Segments and maps read back", self.objects.clone());
        registry.register("verified_bytes", "Bytes of segments and maps read back", self.bytes.clone());
        registry.register(
            "verification_failures",
            "Times that the store broke a verification off",
            self.failures.clone(),
        );
    }
}

/// How the cache of [`crate::cache`] stands.
#[derive(Clone, Default)]
pub struct CacheMetrics {
    budget: Gauge,
    used: Gauge,
    spooled: Counter,
    waited: Counter<f64, AtomicU64>,
    errors: Counter,
}

impl CacheMetrics {
    /// So much there is.
    pub fn budget(&self, bytes: u64) {
        self.budget.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
    /// So much of it is taken.
    pub fn used(&self, bytes: u64) {
        self.used.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
    /// As it was told last.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::try_from(self.used.get()).unwrap_or_default()
    }
    /// Chunks were put there.
    pub fn spooled(&self, bytes: u64) {
        self.spooled.inc_by(bytes);
    }
    /// All that was put there so far.
    #[must_use]
    pub fn spooled_bytes(&self) -> u64 {
        self.spooled.get()
    }
    /// A session waited for the store, since the cache took no more.
    pub fn waited(&self, time: Duration) {
        self.waited.inc_by(time.as_secs_f64());
    }
    /// The disk failed.
    pub fn failed(&self) {
        self.errors.inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("cache_budget_bytes", "Bytes that the cache may take", self.budget.clone());
        registry.register("cache_used_bytes", "Bytes that the cache takes", self.used.clone());
        registry.register(
            "cache_spooled_bytes",
            "Chunk bytes put into the cache, since the store lagged",
            self.spooled.clone(),
        );
        registry.register(
            "cache_wait_seconds",
            "Time that sessions waited for the store while the cache took no more",
            self.waited.clone(),
        );
        registry.register("cache_errors", "Failures of the cache's disk", self.errors.clone());
    }
}

/// Resident bytes of this process; 0 where the system does not tell.
#[must_use]
pub fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<i64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// All metrics of a collector.
pub struct Metrics {
    registry: Registry,
    /// Of the memory.
    pub memory: MemoryMetrics,
    /// Of relays.
    pub relays: RelayMetrics,
    /// Of groups.
    pub groups: GroupMetrics,
    /// Of the cache.
    pub cache: CacheMetrics,
    /// Of maintenance.
    pub maintenance: MaintenanceMetrics,
    /// Of verification.
    pub verification: VerificationMetrics,
    sessions: Gauge,
    deltas_open: Gauge,
    window: Gauge,
    bytes_received: Counter,
    chunks_received: Counter,
    bytes_stored: Counter,
    commits: Family<CommitLabel, Counter>,
    commit_seconds: Histogram,
    refusals: Family<CodeLabel, Counter>,
    words_passed_over: Family<CodeLabel, Counter>,
    vault_errors: Counter,
    enrolments: Counter,
    renewals: Counter,
    revocations_unread: Counter,
    lines_left_out: Counter,
    rpo_age: Family<MachineLabel, Gauge<f64, AtomicU64>>,
    state_ratio: Family<MachineLabel, Gauge<f64, AtomicU64>>,
    last_points_ms: Mutex<HashMap<MachineId, u64>>,
}

/// Counts a session for as long as it lives.
pub struct SessionGauge(Gauge);

impl Drop for SessionGauge {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        // 5 ms to 82 s.
        let buckets = prometheus_client::metrics::histogram::exponential_buckets(0.005, 2.0, 15);
        let mut metrics = Self {
            registry: Registry::with_prefix("highwater_collector"),
            memory: MemoryMetrics::default(),
            relays: RelayMetrics::default(),
            groups: GroupMetrics::default(),
            cache: CacheMetrics::default(),
            maintenance: MaintenanceMetrics::default(),
            verification: VerificationMetrics::default(),
            sessions: Gauge::default(),
            deltas_open: Gauge::default(),
            window: Gauge::default(),
            bytes_received: Counter::default(),
            chunks_received: Counter::default(),
            bytes_stored: Counter::default(),
            commits: Family::default(),
            commit_seconds: Histogram::new(buckets),
            refusals: Family::default(),
            words_passed_over: Family::default(),
            vault_errors: Counter::default(),
            enrolments: Counter::default(),
            renewals: Counter::default(),
            revocations_unread: Counter::default(),
            lines_left_out: Counter::default(),
            rpo_age: Family::default(),
            state_ratio: Family::default(),
            last_points_ms: Mutex::default(),
        };
        let registry = &mut metrics.registry;
        metrics.memory.register(registry);
        metrics.relays.register(registry);
        metrics.groups.register(registry);
        metrics.cache.register(registry);
        metrics.maintenance.register(registry);
        metrics.verification.register(registry);
        registry.register("sessions", "Machines connected now", metrics.sessions.clone());
        registry.register("deltas_open", "Deltas begun and not yet closed", metrics.deltas_open.clone());
        registry.register(
            "window_used_bytes",
            "Chunk bytes taken over and not yet acknowledged as received",
            metrics.window.clone(),
        );
        registry.register("received_bytes", "Chunk bytes received", metrics.bytes_received.clone());
        registry.register("received_chunks", "Chunks received", metrics.chunks_received.clone());
        registry.register(
            "stored_bytes",
            "Bytes of segments committed to the vault",
            metrics.bytes_stored.clone(),
        );
        registry.register(
            "commits",
            "Commits by what they made: progress only, or a recovery point of a consistency",
            metrics.commits.clone(),
        );
        registry.register(
            "commit_duration_seconds",
            "Time from the end of a delta until the vault has it durably",
            metrics.commit_seconds.clone(),
        );
        registry.register(
            "refusals",
            "Sessions and handshakes ended by an error, by its code",
            metrics.refusals.clone(),
        );
        registry.register(
            "group_words_passed_over",
            "Words of machines on groups that were not taken, by the code of why; the session went on",
            metrics.words_passed_over.clone(),
        );
        registry.register(
            "vault_errors",
            "Sessions ended by an error of the vault",
            metrics.vault_errors.clone(),
        );
        registry.register("enrolments", "Machines enrolled", metrics.enrolments.clone());
        registry.register("certificate_renewals", "Machines' certificates renewed", metrics.renewals.clone());
        registry.register(
            "revocation_read_failures",
            "Times that it could not be read who is revoked; after 30 s of it all sessions are refused",
            metrics.revocations_unread.clone(),
        );
        registry.register(
            "log_lines_left_out",
            "Lines about peers that were not logged, since the same peer had caused too many",
            metrics.lines_left_out.clone(),
        );
        registry.register(
            "rpo_age_seconds",
            "Age of a machine's latest recovery point, by its marker",
            metrics.rpo_age.clone(),
        );
        registry.register(
            "machine_state_ratio",
            "Memory of what is recorded of a machine, as a part of what it may take; at 1 its commits are refused",
            metrics.state_ratio.clone(),
        );
        metrics
    }
}

impl Metrics {
    /// A session begins.
    pub fn session(&self) -> SessionGauge {
        self.sessions.inc();
        SessionGauge(self.sessions.clone())
    }
    /// A delta was begun.
    pub fn delta_opened(&self) {
        self.deltas_open.inc();
    }
    /// A delta was committed or discarded.
    pub fn delta_closed(&self) {
        self.deltas_open.dec();
    }
    /// A chunk came.
    pub fn received(&self, bytes: usize) {
        self.bytes_received.inc_by(bytes as u64);
        self.chunks_received.inc();
    }
    /// A chunk's acknowledgement is due.
    pub fn window(&self, bytes: usize) {
        self.window.inc_by(bytes as i64);
    }
    /// Bytes were acknowledged, or their session has ended.
    pub fn window_returned(&self, bytes: usize) {
        self.window.dec_by(bytes as i64);
    }
    /// A session was ended by a refusal.
    pub fn refused(&self, code: u16) {
        self.refusals.get_or_create(&CodeLabel { code: format!("HW-{code:04}") }).inc();
        if (1200..1300).contains(&code) {
            self.vault_errors.inc();
        }
    }
    /// A machine's word on groups was not taken.
    pub fn word_passed_over(&self, code: u16) {
        self.words_passed_over.get_or_create(&CodeLabel { code: format!("HW-{code:04}") }).inc();
    }
    /// A machine was enrolled.
    pub fn enrolled(&self) {
        self.enrolments.inc();
    }
    /// A machine's certificate was renewed.
    pub fn renewed(&self) {
        self.renewals.inc();
    }
    /// It could not be read who is revoked.
    pub fn revocations_unread(&self) {
        self.revocations_unread.inc();
    }
    /// Counts a line that is left out, and answers what was given.
    pub fn line(&self, said: Option<u64>) -> Option<u64> {
        if said.is_none() {
            self.lines_left_out.inc();
        }
        said
    }
    /// A commit is durable.
    pub fn committed(
        &self,
        machine: MachineId,
        kind: Kind,
        point_ms: Option<u64>,
        took: Duration,
        bytes: u64,
    ) {
        self.commits.get_or_create(&CommitLabel { kind }).inc();
        self.commit_seconds.observe(took.as_secs_f64());
        self.bytes_stored.inc_by(bytes);
        if let Some(taken_at_ms) = point_ms {
            self.last_point(machine, taken_at_ms);
        }
    }
    /// What is recorded of a machine takes this part of what it may.
    pub fn state(&self, machine: MachineId, ratio: f64) {
        self.state_ratio.get_or_create(&MachineLabel { machine: machine.to_string() }).set(ratio);
    }
    /// A machine's latest point is known.
    pub fn last_point(&self, machine: MachineId, taken_at_ms: u64) {
        locked(&self.last_points_ms).insert(machine, taken_at_ms);
    }

    /// In Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        let now = now_ms();
        for (machine, taken_at_ms) in locked(&self.last_points_ms).iter() {
            let label = MachineLabel { machine: machine.to_string() };
            // A machine's clock may be ahead of ours.
            self.rpo_age.get_or_create(&label).set(now.saturating_sub(*taken_at_ms) as f64 / 1000.0);
        }
        self.groups.render(now);
        self.memory.resident.set(resident_bytes());
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = text::encode(&mut text, &self.registry);
        prometheus_text(&text)
    }
}

/// OpenMetrics, as the library writes it, to the older text format, which every Prometheus and promtool read: there
/// a counter's family is named with its `_total`, and help does not end with a full stop added.
fn prometheus_text(open_metrics: &str) -> String {
    let counters: Vec<&str> = open_metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(open_metrics.len() + 64);
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                text.extend(["# ", what, " ", name, "_total ", rest]);
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_named_as_prometheus_wants() {
        let metrics = Metrics::default();
        metrics.received(100);
        metrics.refused(1201);
        metrics.committed(
            MachineId::new(),
            Kind::Filesystem,
            Some(now_ms() - 5000),
            Duration::from_millis(7),
            9,
        );
        let text = metrics.render();
        for line in [
            "# TYPE highwater_collector_received_bytes_total counter",
            "highwater_collector_received_bytes_total 100",
            "highwater_collector_refusals_total{code=\"HW-1201\"} 1",
            "highwater_collector_vault_errors_total 1",
            "highwater_collector_commits_total{kind=\"filesystem\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        let age = text.lines().find(|line| line.starts_with("highwater_collector_rpo_age_seconds{")).unwrap();
        let age: f64 = age.rsplit(' ').next().unwrap().parse().unwrap();
        assert!((5.0..60.0).contains(&age));
        assert!(!text.contains("EOF"));
    }
}
