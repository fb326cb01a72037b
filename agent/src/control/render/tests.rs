use super::*;
use crate::{
    control::status::{CollectorStatus, DiskState, PointStatus, Progress, TrackerStatus},
    units::Bandwidth,
};
use highwater_delta::{CommitId, Consistency, DiskId};

pub(in crate::control) fn report() -> StatusReport {
    let disk = DiskStatus {
        id: DiskId::from_bytes([7; 16]),
        name: "data".into(),
        path: Some("/dev/loop3".into()),
        identity: "file /x (inode 3)".into(),
        size_bytes: 64 << 30,
        state: DiskState::InitialReplication,
        reason: Some("protected just now".into()),
        since_ms: 1_000,
        dirty_bytes: 5 << 20,
        pending_bytes: 0,
        progress: Some(Progress {
            done_bytes: 16 << 30,
            total_bytes: 64 << 30,
            bytes_per_s: 100 << 20,
            eta_s: Some(3725),
        }),
        churn_bytes_per_s: 1536,
        tracker: TrackerStatus {
            sectors_written: 8,
            kernel_sectors_written: Some(16),
            kernel_sectors_discarded: Some(0),
            ..TrackerStatus::default()
        },
        swap_bytes: 0,
        has_filesystem: true,
    };
    StatusReport {
        agent_version: "0.1.0".into(),
        pid: 9,
        started_at_ms: 0,
        as_of_ms: 60_000,
        machine: None,
        collector: CollectorStatus {
            endpoint: Some("dr.example:9443".into()),
            state: ConnectionState::BackingOff,
            since_ms: 0,
            failures: 2,
            retry_at_ms: Some(181_000),
            last_error: Some("HW-1101: refused".into()),
        },
        last_point: Some(PointStatus {
            id: CommitId(12),
            taken_at_ms: 31_000,
            age_ms: 30_000,
            consistency: Consistency::Filesystem,
            freeze_us: 12_340,
        }),
        next_point_at_ms: None,
        bandwidth: Bandwidth(None),
        guardian_pid: Some(10),
        disks: vec![disk],
        capture: Default::default(),
        group: None,
        guests: vec![],
        notes: vec!["a note".into()],
    }
}

#[test]
fn tells_how_guests_stood_at_the_last_point() {
    let guest = |name: &str, frozen_at_ms, trouble: Option<&str>| GuestStatus {
        name: name.into(),
        frozen_at_ms,
        trouble: trouble.map(str::to_owned),
    };
    let guests = vec![
        guest("web", Some(59_000), None),
        guest("db", Some(59_000), Some("HW-1445: no answer. Look")),
        guest("new", None, None),
    ];
    let text = render(&StatusReport { guests, ..report() }, 61_000);
    for part in [
        "guest      web: stood still for the point of 2s ago",
        "guest      db: did NOT stand still 2s ago: HW-1445: no answer. Look",
        "guest      new: no point with a freeze yet",
    ] {
        assert!(text.contains(part), "missing {part:?} in\n{text}");
    }
}

#[test]
fn shows_what_an_operator_needs() {
    let text = render(&report(), 61_000);
    for part in [
        "agent      0.1.0 (pid 9), up 1m 1s",
        "dr.example:9443: backing off for 1m 1s, 2 failures, next try in 2m",
        "last point 12 of 30s ago, filesystem-consistent, frozen 12.3 ms",
        "data  /dev/loop3  64 GiB  initial-replication  5 MiB",
        "data: 16 GiB of 64 GiB (25 %), 100 MiB/s, 1h 2m left",
        "the tracker saw 8 sectors, the kernel counted 16",
        "! a note",
    ] {
        assert!(text.contains(part), "missing {part:?} in\n{text}");
    }
}

#[test]
fn the_json_form_survives_a_round_trip() {
    let text = serde_json::to_string(&report()).expect("serialises");
    assert!(text.contains("\"state\":\"initial-replication\"") && text.contains("\"dirty-bytes\":5242880"));
    assert_eq!(serde_json::from_str::<StatusReport>(&text).expect("parses"), report());
}

#[test]
fn a_copy_that_has_just_begun_is_told_as_such() {
    let mut status = report();
    status.collector.failures = 1;
    status.disks[0].progress = Some(Progress { total_bytes: 64 << 30, ..Progress::default() });
    let text = render(&status, 4_000);
    assert!(text.contains("(0 %), just begun") && text.contains(" 1 failure,"), "{text}");
    assert!(render(&status, 61_000).contains("0 B/s, no end in sight"));
}

#[test]
fn tells_how_write_ordered_mode_stands() {
    use crate::control::status::CaptureStatus;
    let told = |capture: CaptureStatus| {
        let text = render(&StatusReport { capture, ..report() }, 61_000);
        let lines = text.lines().skip_while(|line| !line.starts_with("capture"));
        lines.take_while(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect::<String>()
    };
    let running = CaptureStatus {
        ring_bytes: 32 << 20,
        buffer_bytes: 64 << 20,
        captured_bytes: 3 << 20,
        coalesced_bytes: 1 << 20,
        ..CaptureStatus::default()
    };
    assert_eq!(
        told(CaptureStatus { active: true, next_point_at_ms: Some(63_500), ..running.clone() }),
        "capture    in order: ring 0 B of 32 MiB, buffers 0 B of 64 MiB; 3 MiB captured, 1 MiB sent; \
         next point in 3s, if something is written\n"
    );
    assert!(
        told(CaptureStatus { entering: true, ..running })
            .contains("in order soon, what is pending is read: ring")
    );
    let left = CaptureStatus {
        left: [("disks-changed".to_owned(), 1), ("overflow".to_owned(), 2)].into(),
        last_left: Some("overflow: the ring overflowed".into()),
        last_left_at_ms: Some(51_000),
        last_left_action: Some("raise capture.memory".into()),
        retry_at_ms: Some(62_001),
        ..CaptureStatus::default()
    };
    assert_eq!(
        told(left),
        "capture    not now: tried again in 2s\n           \
         left since the agent started: disks-changed 1, overflow 2\n           \
         the last time 10s ago: HW-1494 overflow: the ring overflowed\n           \u{2192} raise capture.memory\n"
    );
    let off = CaptureStatus {
        unavailable: Some("HW-1493: capture is switched off".into()),
        ..CaptureStatus::default()
    };
    assert_eq!(told(off), "capture    none: HW-1493: capture is switched off\n");
}
