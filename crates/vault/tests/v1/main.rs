//! A vault of format 1, as it lies in `tests/fixtures/v1`: it is read for ever, and written to. See the README there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod facts;
mod make;

use facts::{Expected, digest_of};
use highwater_delta::*;
use highwater_vault::{KeyRing, KeySource, Vault, VaultKey, local_store, verify};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1")
}

/// A copy that may be written to, since the fixture must stay as it is; version control keeps no modes.
async fn copy() -> (tempfile::TempDir, Vault) {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (fixture(), dir.path());
    copy_dir(&from.join("vault"), &to.join("vault"));
    fs::copy(from.join("vault.key"), to.join("vault.key")).unwrap();
    fs::set_permissions(to.join("vault.key"), fs::Permissions::from_mode(0o600)).unwrap();
    let key = VaultKey::load(&to.join("vault.key")).unwrap();
    let vault = Vault::open(local_store(&to.join("vault")).unwrap(), &key).await.unwrap();
    (dir, vault)
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

fn expected() -> Expected {
    serde_json::from_slice(&fs::read(fixture().join("expected.json")).unwrap()).unwrap()
}

/// Everything that was written is there, byte for byte.
async fn holds(vault: &Vault, expected: &Expected) {
    assert_eq!(vault.id(), expected.vault);
    for (name, text) in &expected.control {
        assert_eq!(vault.control_get(name).await.unwrap().unwrap().as_slice(), text.as_bytes(), "{name}");
    }
    let ids: Vec<MachineId> = expected.machines.iter().map(|machine| machine.machine).collect();
    assert_eq!(vault.machines().await.unwrap(), ids);
    for machine in &expected.machines {
        let state = vault.machine(machine.machine).await.unwrap();
        assert_eq!(state.host_name, machine.host_name);
        for point in &machine.commits {
            let commit = point.commit;
            match &point.info {
                Some(info) => assert_eq!(state.point(commit).unwrap().info, *info, "{commit}"),
                None => assert!(state.point(commit).is_err(), "{commit} is no point"),
            }
            assert_eq!(state.commit_of(point.delta), point.remembered.then_some(commit), "{commit}");
            for content in &point.disks {
                let found = digest_of(vault, machine.machine, content.disk, commit).await;
                assert_eq!(found, *content, "commit {commit} of {}", state.host_name);
            }
        }
    }
}

#[tokio::test]
async fn all_points_are_read_byte_for_byte() {
    let (_dir, vault) = copy().await;
    let expected = expected();
    holds(&vault, &expected).await;
    for machine in &expected.machines {
        let state = vault.machine(machine.machine).await.unwrap();
        assert_eq!(state.last_commit, machine.commits.last().unwrap().commit);
        assert_eq!((state.last_record, state.epoch), (machine.last_record, machine.epoch));
        assert_eq!((&state.disks, &state.former_disks), (&machine.disks, &machine.former_disks));
        let points = machine.commits.iter().filter(|commit| commit.info.is_some()).count();
        assert_eq!(state.points.len(), points);
    }
    let report = verify::verify_vault(&vault).await.unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    assert_eq!((report.machines, report.checkpoints), (2, 2));
    assert_eq!(report.control_documents, expected.control.len() as u64);
    assert_eq!(report.orphans.len(), 1, "{:?}", report.orphans);
}

#[tokio::test]
async fn it_is_written_to_and_all_that_was_stays() {
    let (_dir, vault) = copy().await;
    let expected = expected();
    for machine in &expected.machines {
        let disk = machine.disks[0].disk;
        let last = machine.commits.last().unwrap();
        let before = digest_of(&vault, machine.machine, disk, last.commit).await;
        let mut writer = vault.writer(machine.machine).await.unwrap();
        let takeovers = writer.state().last_record - machine.last_record;
        assert_eq!(takeovers, u64::from(machine.interrupted), "what was interrupted is taken over");
        // A delta that was stored long ago is known, and changes nothing.
        writer.begin(last.delta).await.unwrap();
        assert_eq!(writer.commit(CommitKind::Partial).await.unwrap(), last.commit);

        let block = [0xa5; BLOCK_BYTES];
        let extents = [
            Extent { start: Block(0), count: 1, fill: Fill::Zero },
            Extent { start: Block(3), count: 1, fill: Fill::Data },
        ];
        let mut chunk = Vec::new();
        encode_chunk(disk, &extents, &block, &writer.hash_key(), 1, &mut chunk).unwrap();
        writer.begin(DeltaId::new()).await.unwrap();
        writer.push(chunk.into()).await.unwrap();
        let size_bytes = machine.disks[0].size_bytes;
        let info = PointInfo {
            consistency: Consistency::Filesystem,
            taken_at_ms: 9,
            freeze_us: 8,
            disks: vec![PointDisk { disk, size_bytes }],
        };
        let commit = writer.commit(CommitKind::Point(info)).await.unwrap();
        assert_eq!(commit, CommitId(machine.last_record + takeovers + 1));

        let map = vault.block_map(machine.machine, disk, commit).await.unwrap();
        let mut read = vec![1; 4 * BLOCK_BYTES];
        map.read(BlockRange::new(0, 4), &mut read).await.unwrap();
        assert_eq!(read[..BLOCK_BYTES], [0; BLOCK_BYTES]);
        assert_eq!(read[3 * BLOCK_BYTES..], block);
        let after = digest_of(&vault, machine.machine, disk, commit).await;
        assert_ne!(after.blake3, before.blake3);
        assert_eq!(after.size_bytes, before.size_bytes);
    }
    holds(&vault, &expected).await;
    let report = verify::verify_vault(&vault).await.unwrap();
    assert!(report.is_clean() && report.orphans.is_empty(), "{report:?}");
}

#[tokio::test]
async fn it_gets_further_keys_and_can_lose_its_file() {
    let (dir, _) = copy().await;
    let store = || local_store(&dir.path().join("vault")).unwrap();
    let (old, new) =
        (KeySource::File(dir.path().join("vault.key")), KeySource::File(dir.path().join("new.key")));
    let mut ring = KeyRing::open(store(), &old).await.unwrap();
    let first = ring.wrappings()[0].id;
    ring.add(&new, "new").await.unwrap();
    for source in [&old, &new] {
        let vault = Vault::unlock(store(), source).await.unwrap();
        holds(&vault, &expected()).await;
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    }
    ring.remove(first).await.unwrap();
    assert_eq!(Vault::unlock(store(), &old).await.unwrap_err().code(), 1226);
    holds(&Vault::unlock(store(), &new).await.unwrap(), &expected()).await;
}

#[tokio::test]
async fn another_key_is_refused() {
    let (dir, _) = copy().await;
    let store = local_store(&dir.path().join("vault")).unwrap();
    let other = VaultKey::generate().unwrap();
    assert_eq!(Vault::open(store, &other).await.unwrap_err().code(), 1204);
}

/// How the fixture was made. It refuses to do it again: what it would prove is that a program reads what it wrote itself.
#[tokio::test]
#[ignore = "the fixture is made once"]
async fn make_the_fixture() {
    assert!(!fixture().join("vault").exists(), "the fixture is there, and must stay as it is");
    make::make(&fixture()).await;
}
