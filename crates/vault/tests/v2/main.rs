//! A vault of format 2, as it lies in `tests/fixtures/v2`: it is read for ever, and written to and maintained. See the README there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../v1/facts.rs"]
#[allow(dead_code, reason = "the other fixture has more of them")]
mod facts;
mod make;
mod pack;

use facts::{Content, digest_of};
use highwater_delta::*;
use highwater_vault::{
    Clock, Hold, KeySource, Vault, keys::Passphrase, maintain, maintain::Settings, verify,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// When the fixture's time began, in milliseconds since 1970.
const START_MS: u64 = 1_795_000_000_000;
/// It protects nothing.
const PASSPHRASE: &[u8] = b"correct horse battery staple";

/// What is known of it, told by the model that wrote it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Fixture {
    vault: VaultId,
    /// When it was left.
    now_ms: u64,
    /// Of each machine the points that are kept.
    points: BTreeMap<MachineId, Vec<(CommitId, Vec<Content>)>>,
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v2")
}

fn expected() -> Fixture {
    serde_json::from_slice(&fs::read(fixture().join("expected.json")).unwrap()).unwrap()
}

/// A copy in memory, at the time at which it was left.
async fn copy(passphrase: bool) -> Vault {
    let store = pack::unpack(&fs::read(fixture().join("vault.pack")).unwrap()).await;
    // Version control keeps no modes.
    let key = tempfile::NamedTempFile::new().unwrap();
    fs::write(key.path(), fs::read(fixture().join("vault.key")).unwrap()).unwrap();
    fs::set_permissions(key.path(), fs::Permissions::from_mode(0o600)).unwrap();
    let source = match passphrase {
        true => KeySource::Passphrase(Passphrase::new(PASSPHRASE).unwrap()),
        false => KeySource::File(key.path().to_owned()),
    };
    let now_ms = expected().now_ms;
    Vault::unlock(store, &source).await.unwrap().with_clock(Clock::new(move || now_ms))
}

/// All points that were kept are there, byte for byte; answers how many there are.
async fn holds(vault: &Vault, expected: &Fixture) -> usize {
    assert_eq!(vault.id(), expected.vault);
    let machines: Vec<MachineId> = expected.points.keys().copied().collect();
    assert_eq!(vault.machines().await.unwrap(), machines);
    let mut all = 0;
    for (machine, points) in &expected.points {
        for (point, disks) in points {
            vault.machine(*machine).await.unwrap().point(*point).unwrap();
            for content in disks {
                assert_eq!(digest_of(vault, *machine, content.disk, *point).await, *content, "{point}");
            }
        }
        all += points.len();
    }
    all
}

#[tokio::test]
async fn all_points_are_read_byte_for_byte() {
    let (vault, expected) = (copy(false).await, expected());
    assert!(holds(&vault, &expected).await > 60);
    let (long, short) = (MachineId::from_bytes([1; 16]), MachineId::from_bytes([2; 16]));
    let state = vault.machine(long).await.unwrap();
    assert_eq!(state.points.len(), expected.points[&long].len());
    // It has what the format has.
    assert!(state.last_record > 2048 && state.shortcuts.len() > 2 && !state.trash.is_empty());
    assert!(state.holds.values().any(|held| held.hold == Hold::Legal && held.reason.starts_with("case")));
    assert!(state.holds.values().any(|held| held.hold == Hold::Pin));
    assert_eq!(vault.machine(short).await.unwrap().points.len(), 3);
    assert!(vault.is_erased(MachineId::from_bytes([3; 16])).await.unwrap());
    let report = verify::verify_vault(&vault).await.unwrap();
    assert!(report.is_clean() && report.strangers.is_empty(), "{:?} {:?}", report.problems, report.strangers);
    assert_eq!((report.machines, report.orphans.len()), (2, 1));
    assert!(report.records < 1200, "records that were deleted are not missed: {}", report.records);
}

#[tokio::test]
async fn it_is_opened_by_its_passphrase() {
    assert_eq!(copy(true).await.id(), expected().vault);
}

#[tokio::test]
async fn it_is_written_to_and_maintained_and_all_that_is_kept_stays() {
    let (vault, expected) = (copy(false).await, expected());
    for machine in expected.points.keys() {
        let mut writer = vault.writer(*machine).await.unwrap();
        let disks = writer.state().disks.clone();
        let covered =
            |disk: &highwater_vault::DiskRecord| PointDisk { disk: disk.disk, size_bytes: disk.size_bytes };
        let info = PointInfo {
            consistency: Consistency::Application,
            taken_at_ms: 9,
            freeze_us: 8,
            disks: disks.iter().map(covered).collect(),
        };
        writer.set_disks(disks).unwrap();
        writer.begin(DeltaId::new()).await.unwrap();
        let commit = writer.commit(CommitKind::Point(info)).await.unwrap();
        let settings = Settings { skew_max: None, ..Settings::default() };
        maintain::machine(&vault, *machine, &settings, &()).await.unwrap();
        let state = vault.machine(*machine).await.unwrap();
        assert_eq!(state.points.last().unwrap().id, commit);
    }
    holds(&vault, &expected).await;
    let report = verify::verify_vault(&vault).await.unwrap();
    assert!(report.is_clean() && report.orphans.is_empty(), "{report:?}");
}

/// How the fixture was made. It refuses to do it again: what it would prove is that a program reads what it wrote itself.
#[tokio::test]
#[ignore = "the fixture is made once"]
async fn make_the_fixture() {
    assert!(!fixture().join("vault.pack").exists(), "the fixture is there, and must stay as it is");
    make::make(&fixture()).await;
}
