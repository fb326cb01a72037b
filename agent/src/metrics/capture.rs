//! Metrics of write-ordered capture.

use crate::control::status::CaptureStatus;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// Kinds of leaving write-ordered mode that are told of from the first day on.
const KINDS: [&str; 13] = [
    "overflow",
    "skipped",
    "stalled",
    "unreadable",
    "unsupported",
    "unverified",
    "disconnected",
    "disks-changed",
    "not-entered",
    "unproved",
    "reader-ended",
    "suspect",
    "failed",
];

type Labels = Vec<(&'static str, String)>;

/// All of them.
#[derive(Default)]
pub(super) struct Capture {
    left: Family<Labels, Counter>,
    again: Family<Labels, Counter>,
    active: Gauge,
    possible: Gauge,
    ring_size: Gauge,
    ring_filled: Gauge,
    buffers_size: Gauge,
    buffered: Gauge,
    captured: Gauge,
    coalesced: Gauge,
    writes: Gauge,
    lost: Gauge,
    misses: Gauge,
    completed: Gauge,
}

impl Capture {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "capture_left",
            "Times that write-ordered mode was left or could not be entered, by kind",
            self.left.clone(),
        );
        r.register(
            "capture_blocks_again",
            "Captured blocks that were read again: writes that overlapped in flight or failed (healed), and changes that the stream lacked (lacking)",
            self.again.clone(),
        );
        for kind in KINDS {
            let _ = self.left.get_or_create(&vec![("kind", kind.to_owned())]);
        }
        r.register("capture_active", "1 while all disks are in write-ordered mode", self.active.clone());
        r.register(
            "capture_possible",
            "0 where it is switched off, or impossible on this machine",
            self.possible.clone(),
        );
        r.register_with_unit("capture_ring_size", "Size of the ring", Unit::Bytes, self.ring_size.clone());
        r.register_with_unit(
            "capture_ring_filled",
            "Bytes in the ring now",
            Unit::Bytes,
            self.ring_filled.clone(),
        );
        r.register_with_unit(
            "capture_buffers_size",
            "Most memory of what is held of the stream beside the ring",
            Unit::Bytes,
            self.buffers_size.clone(),
        );
        r.register_with_unit(
            "capture_buffered",
            "Bytes held of the stream now",
            Unit::Bytes,
            self.buffered.clone(),
        );
        r.register_with_unit(
            "capture_captured",
            "Bytes of payload captured since the stream began",
            Unit::Bytes,
            self.captured.clone(),
        );
        r.register_with_unit(
            "capture_coalesced",
            "Bytes left of them after the last write of each block between points has won, since the stream began",
            Unit::Bytes,
            self.coalesced.clone(),
        );
        r.register(
            "capture_writes",
            "Writes captured since the stream began, in records",
            self.writes.clone(),
        );
        r.register(
            "capture_lost_records",
            "Records that the stream lacks, since the programs were loaded",
            self.lost.clone(),
        );
        r.register(
            "capture_misses",
            "Events that single copies of the capture program missed",
            self.misses.clone(),
        );
        r.register(
            "capture_completed_blocks",
            "Blocks written in part whose rest was read from the disk, since the stream began",
            self.completed.clone(),
        );
    }

    pub(super) fn left(&self, kind: &str) {
        self.left.get_or_create(&vec![("kind", kind.to_owned())]).inc();
    }
    pub(super) fn again(&self, healed: u64, lacking: u64) {
        for (kind, blocks) in [("healed", healed), ("lacking", lacking)] {
            self.again.get_or_create(&vec![("kind", kind.to_owned())]).inc_by(blocks);
        }
    }
    pub(super) fn publish(&self, status: &CaptureStatus) {
        let set = |gauge: &Gauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.active, status.active.into());
        set(&self.possible, status.unavailable.is_none().into());
        set(&self.ring_size, status.ring_bytes);
        set(&self.ring_filled, status.ring_filled_bytes);
        set(&self.buffers_size, status.buffer_bytes);
        set(&self.buffered, status.buffered_bytes);
        set(&self.captured, status.captured_bytes);
        set(&self.coalesced, status.coalesced_bytes);
        set(&self.writes, status.writes);
        set(&self.lost, status.lost_records);
        set(&self.misses, status.misses);
        set(&self.completed, status.completed_blocks);
    }
}
