use super::*;
use crate::{
    config::Bandwidth,
    control::status::{CollectorStatus, DiskState, PointStatus, Progress, TrackerStatus},
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
        notes: vec!["a note".into()],
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
