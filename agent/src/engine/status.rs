//! Status and metrics, from the engine's own figures.

use super::{Engine, Link, disk::Disk, state::DiskState};
use crate::{
    control::status::{
        CaptureStatus, CollectorStatus, ConnectionState, DiskStatus, PointStatus, Progress, StatusReport,
        TrackerStatus,
    },
    units::Bandwidth,
};
use highwater_abi::class;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

impl Engine {
    pub(super) fn status(&self) -> StatusReport {
        let now = SystemTime::now();
        let in_ms = |at: Instant| match at.checked_duration_since(Instant::now()) {
            Some(ahead) => ms(now + ahead),
            None => ms(now),
        };
        StatusReport {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at_ms: ms(self.metrics.started_at),
            as_of_ms: ms(now),
            machine: self.machine,
            collector: self.collector_status(now),
            last_point: self.last_point.as_ref().map(|p| PointStatus {
                id: p.commit,
                taken_at_ms: p.info.taken_at_ms,
                age_ms: now.duration_since(p.at()).map_or(0, |d| d.as_millis() as u64),
                consistency: p.info.consistency,
                freeze_us: p.info.freeze_us,
            }),
            next_point_at_ms: self.points_possible().then(|| in_ms(self.point_due)),
            bandwidth: Bandwidth(self.throttle.rate_per_s()),
            guardian_pid: self.guardian.pid(),
            disks: self.disks.iter().map(|d| self.disk_status(d, now)).collect(),
            capture: self.capture_status(self.in_order().then(|| in_ms(self.ordered.due))),
            group: self.group_status.get(),
            guests: self.guest_statuses.clone(),
            notes: self.notes(),
        }
    }

    fn capture_status(&self, next_point_at_ms: Option<u64>) -> CaptureStatus {
        let ordered = &self.ordered;
        let mut status = CaptureStatus {
            active: self.in_order(),
            entering: ordered.is_streaming() && !self.in_order(),
            retry_at_ms: ordered.retry_in().map(|wait| ms(SystemTime::now() + wait)),
            unavailable: ordered.unavailable().map(ToString::to_string),
            left: ordered.drops.iter().map(|(kind, times)| ((*kind).to_owned(), *times)).collect(),
            last_left: ordered.last_drop.as_ref().map(|d| format!("{}: {}", d.kind, d.reason)),
            last_left_at_ms: ordered.last_drop.as_ref().map(|d| ms(d.at)),
            last_left_action: ordered
                .last_drop
                .as_ref()
                .and_then(|d| super::ordered::advice(d.kind))
                .map(str::to_owned),
            buffer_bytes: ordered.options().buffer_bytes,
            next_point_at_ms,
            ..CaptureStatus::default()
        };
        let Some((tap, reader)) = ordered.figures() else { return status };
        let figures = reader.figures();
        status.ring_bytes = reader.producer().size_bytes();
        status.ring_filled_bytes = reader.producer().filled_bytes();
        status.buffered_bytes = reader.pool().used_bytes();
        status.captured_bytes = figures.bytes;
        status.coalesced_bytes = figures.sealed_bytes;
        status.writes = figures.records;
        status.completed_blocks = figures.completed_blocks;
        status.overlaps = figures.overlaps;
        status.doubtful_blocks = reader.doubtful() as u64;
        status.copies = tap.copies() as u32;
        if let Ok(counters) = tap.counters() {
            status.lost_records = counters.dropped + counters.faults + counters.unsupported;
        }
        status.misses = tap.misses().unwrap_or(0);
        status
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![];
        if self.machine.is_none() {
            notes.push(
                "This machine is not enrolled: run `highwater-agent enroll URL -` with a token.".into(),
            );
        }
        if let Some(why) = &self.applications.trouble {
            notes.push(format!("HW-1498: the last application-consistent point was none: {why}"));
        }
        if let Some(doubt) = self.disks.iter().find(|d| !d.state.state().allows_points()) {
            let state = doubt.state.state();
            notes.push(format!(
                "No recovery points are made: disk {} is {}.",
                doubt.protected.name,
                state.kind()
            ));
        }
        for disk in self.disks.iter().filter(|d| matches!(d.state.state(), DiskState::Unreadable(_))) {
            notes.push(format!(
                "Disk {} cannot be read: recovery points are made without it.",
                disk.protected.name
            ));
        }
        notes.extend(
            self.point_trouble.iter().map(|t| format!("The last attempt at a recovery point failed: {t}")),
        );
        for disk in &self.disks {
            if *disk.state.state() == DiskState::Bitmap
                && !disk.has_filesystem
                && self.options.freeze_hook.is_none()
            {
                notes.push(format!(
                    "Disk {} has no mounted filesystem: in bitmap mode it gets points only when nothing writes to it as a round ends.",
                    disk.protected.name
                ));
            }
        }
        notes
    }

    fn collector_status(&self, now: SystemTime) -> CollectorStatus {
        let mut status =
            CollectorStatus { endpoint: self.options.endpoint.clone(), ..CollectorStatus::default() };
        match &self.link {
            Link::Up(session) => {
                status.state = ConnectionState::Connected;
                status.since_ms = ms(now - session.since.elapsed());
                status.last_error = self.refusal.as_ref().map(ToString::to_string);
            }
            Link::Down(None) => {
                status.since_ms = ms(self.metrics.started_at);
                status.state = if self.machine.is_some() {
                    ConnectionState::Connecting
                } else {
                    ConnectionState::NotEnrolled
                };
            }
            Link::Down(Some(down)) => {
                status.state =
                    if down.critical { ConnectionState::Critical } else { ConnectionState::BackingOff };
                status.since_ms = ms(now - down.at.elapsed());
                status.failures = down.failures as u32;
                status.retry_at_ms = Some(ms(now + down.retry_in.saturating_sub(down.at.elapsed())));
                status.last_error = Some(format!("HW-{}: {}. {}", down.code, down.cause, down.action));
            }
        }
        status
    }

    fn disk_status(&self, disk: &Disk, now: SystemTime) -> DiskStatus {
        let id = disk.id();
        let figures = self.tracker.figures(id).unwrap_or_default();
        let kernel = figures.kernel;
        let pending = disk.bytes(disk.ledger.to_send().count() + disk.ledger.under_way());
        DiskStatus {
            id,
            name: disk.protected.name.clone(),
            path: disk.device.as_ref().map(|d| d.path.display().to_string()),
            identity: disk.protected.identity.to_string(),
            size_bytes: disk.size_bytes(),
            state: disk.state.state().kind(),
            reason: disk.state.state().reason().map(str::to_owned),
            since_ms: ms(now - disk.state.lasted()),
            dirty_bytes: disk.bytes(self.tracker.dirty_now(id).unwrap_or(0)),
            pending_bytes: pending,
            progress: progress(disk),
            churn_bytes_per_s: self.metrics.churn(id),
            tracker: TrackerStatus {
                writes: figures.counters.events[class::WRITE],
                sectors_written: figures.counters.sectors[class::WRITE],
                sectors_discarded: figures.counters.sectors[class::DISCARD],
                kernel_sectors_written: kernel.map(|k| k[class::WRITE]),
                kernel_sectors_discarded: kernel.map(|k| k[class::DISCARD]),
                misses: figures.misses,
                copies: self.tracker.copies() as u32,
            },
            swap_bytes: disk.bytes(disk.ledger.skipped().iter().map(|r| r.count).sum()),
            has_filesystem: disk.has_filesystem,
        }
    }

    /// Brings the metrics up to date, at most every second.
    pub(super) fn publish(&mut self) {
        if !self.metrics.publish_due() {
            return;
        }
        let report = self.status();
        let rows: Vec<_> = (self.disks.iter().zip(&report.disks))
            .map(|(d, status)| {
                let figures = self.tracker.figures(d.id()).unwrap_or_default();
                (status.clone(), d.state.spent(), figures)
            })
            .collect();
        let connected = matches!(self.link, Link::Up(_));
        let age = self.last_point.as_ref().and_then(|p| SystemTime::now().duration_since(p.at()).ok());
        self.metrics.publish(&rows, connected, age, self.pool.allocated_bytes());
        self.metrics.captured(&report.capture);
        self.metrics.grouped(report.group.as_ref());
        self.board.put(report);
    }
}

fn progress(disk: &Disk) -> Option<Progress> {
    let copying = matches!(disk.state.state(), DiskState::InitialReplication | DiskState::Resynchronizing(_));
    let (began, total) = disk.copy_began.filter(|_| copying)?;
    let left = disk.ledger.to_send().count() + disk.ledger.under_way();
    let done = total.saturating_sub(left);
    let seconds = began.elapsed().as_secs_f64();
    let rate = if seconds > 0.0 { disk.bytes(done) as f64 / seconds } else { 0.0 };
    let eta = (rate > 0.0).then(|| (disk.bytes(left) as f64 / rate) as u64);
    Some(Progress {
        done_bytes: disk.bytes(done),
        total_bytes: disk.bytes(total),
        bytes_per_s: rate as u64,
        eta_s: eta,
    })
}

pub(super) fn ms(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}
