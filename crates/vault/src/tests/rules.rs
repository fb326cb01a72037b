//! The rules of the vault, one by one.

use super::support::*;
use crate::{DiskRecord, Vault, VaultError, VaultKey, local_store, recover, verify};
use highwater_delta::*;
use object_store::{ObjectStoreExt, path::Path};
use std::{os::unix::fs::PermissionsExt, sync::Arc};

#[test]
fn a_vault_is_made_once_and_opens_with_its_key_only() {
    runtime().block_on(async {
        let store = memory();
        assert!(matches!(Vault::open(store.clone(), &key()).await, Err(VaultError::NotAVault)));
        let (vault, key1) = vault_on(store.clone()).await;
        assert!(matches!(Vault::create(store.clone(), &key1).await, Err(VaultError::Exists)));
        assert!(matches!(Vault::open(store.clone(), &key()).await, Err(VaultError::WrongKey)));
        let same = Vault::open(store, &key1).await.unwrap();
        assert_eq!(same.id(), vault.id());
        assert_eq!(same.machines().await.unwrap(), [machine()]);
        assert_eq!(same.machine(machine()).await.unwrap().host_name, "web-1");
        let stranger = MachineId::new();
        assert!(matches!(same.machine(stranger).await, Err(VaultError::UnknownMachine(m)) if m == stranger));
    });
}

#[test]
fn registering_again_changes_nothing() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        let before = vault.hash_key(machine()).await.unwrap();
        vault.register_machine(machine(), "other").await.unwrap();
        assert_eq!(vault.hash_key(machine()).await.unwrap(), before);
        assert!(vault.register_machine(MachineId::new(), &"x".repeat(256)).await.is_err());
        let second = MachineId::new();
        vault.register_machine(second, "db-1").await.unwrap();
        assert_ne!(vault.hash_key(second).await.unwrap(), before);
    });
}

#[test]
fn key_files_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vault.key");
    let key = key();
    key.save(&path).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(VaultKey::load(&path).unwrap() == key);
    assert!(matches!(key.save(&path), Err(VaultError::KeyFile { .. })), "an existing key is not overwritten");
    for mode in [0o640, 0o604, 0o620] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert!(matches!(VaultKey::load(&path), Err(VaultError::KeyFile { .. })), "{mode:o}");
    }
    let other = dir.path().join("other");
    for text in ["", "highwater-vault-key-1 00", "nonsense\n"] {
        std::fs::write(&other, text).unwrap();
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(VaultKey::load(&other), Err(VaultError::KeyFile { .. })), "{text}");
    }
    assert_eq!(format!("{key:?}"), "VaultKey(…)");
}

#[test]
fn control_documents_are_created_once() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        assert!(vault.control_create("ca/1", b"secret").await.unwrap());
        assert!(!vault.control_create("ca/1", b"other").await.unwrap());
        assert!(vault.control_create("tokens/a", b"").await.unwrap());
        assert_eq!(vault.control_get("ca/1").await.unwrap().unwrap().as_slice(), b"secret");
        assert!(vault.control_get("ca/2").await.unwrap().is_none());
        assert_eq!(vault.control_list("ca").await.unwrap(), ["ca/1"]);
        assert_eq!(vault.control_list("").await.unwrap(), ["ca/1", "tokens/a"]);
        for bad in ["", "/", "../x", "a//b", "a b", "ü"] {
            assert!(matches!(vault.control_create(bad, b"").await, Err(VaultError::Name(_))), "{bad}");
        }
    });
}

#[test]
fn the_slower_of_two_writers_is_fenced() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        let mut slow = vault.writer(machine()).await.unwrap();
        let mut fast = vault.writer(machine()).await.unwrap();
        assert_eq!(deliver(&mut fast, 0, &[1]).await.unwrap(), CommitId(1));
        assert!(matches!(deliver(&mut slow, 0, &[2]).await, Err(VaultError::Fenced(_))));
        assert!(matches!(slow.begin(DeltaId::new()).await, Err(VaultError::Fenced(_))));
        assert_eq!(deliver(&mut fast, 3, &[3]).await.unwrap(), CommitId(2));
        let read = read_all(&vault, disk(10), CommitId(2)).await.unwrap();
        assert_eq!(read[..B], content(1));
        let report = verify::verify_vault(&vault).await.unwrap();
        assert!(report.is_clean() && report.orphans.is_empty(), "{report:?}");
    });
}

#[test]
fn a_new_writer_takes_over_from_one_that_left_segments() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        let mut first = vault.writer(machine()).await.unwrap();
        deliver(&mut first, 0, &[1]).await.unwrap();
        // A finished segment whose commit never came: what a crash leaves.
        first.begin(DeltaId::new()).await.unwrap();
        let hash = first.hash_key();
        first.push(chunk(disk(10), 0, &[2], &hash)).await.unwrap();
        first.finish_segment_for_test().await;
        assert_eq!(verify::verify_vault(&vault).await.unwrap().orphans.len(), 1);

        let mut second = vault.writer(machine()).await.unwrap();
        assert_eq!(verify::verify_vault(&vault).await.unwrap().orphans.len(), 0);
        assert!(matches!(first.commit(point(64)).await, Err(VaultError::Fenced(_))));
        assert_eq!(second.state().last_commit, CommitId(1));
        let commit = deliver(&mut second, 5, &[3]).await.unwrap();
        assert_eq!(commit, CommitId(3), "the takeover has number 2");
        let read = read_all(&vault, disk(10), commit).await.unwrap();
        assert_eq!((&read[..B], &read[5 * B..6 * B]), (&content(1)[..], &content(3)[..]));
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    });
}

#[test]
fn chunks_are_refused_that_do_not_fit() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        let hash = writer.hash_key();
        let good = || chunk(disk(10), 0, &[1], &hash);
        assert!(matches!(writer.push(good()).await, Err(VaultError::Order(_))));
        writer.begin(DeltaId::new()).await.unwrap();
        assert!(matches!(writer.push(good()).await, Err(VaultError::UnknownDisk(_))));
        writer.set_disks(records(10)).unwrap();
        assert!(matches!(
            writer.push(chunk(disk(10), 9, &[1, 2], &hash)).await,
            Err(VaultError::BeyondDisk { block: 10, blocks: 10, .. })
        ));
        assert!(matches!(writer.push(good().slice(1..)).await, Err(VaultError::Chunk(_))));
        assert!(matches!(writer.begin(DeltaId::new()).await, Err(VaultError::Order(_))));
        // Refused chunks leave the delta as it was.
        writer.push(good()).await.unwrap();
        assert!(matches!(writer.commit(point(11)).await, Err(VaultError::Order(_))));
        writer.commit(point(10)).await.unwrap();
        assert!(matches!(writer.commit(point(10)).await, Err(VaultError::Order(_))));
        let twice = vec![records(1)[0].clone(), records(1)[0].clone()];
        assert!(matches!(writer.set_disks(twice), Err(VaultError::Name(_))));
        let many = (0..300)
            .map(|n: u32| DiskRecord { disk: DiskId::new(), name: n.to_string(), size_bytes: 1 })
            .collect();
        assert!(matches!(writer.set_disks(many), Err(VaultError::Limit(_))));
    });
}

#[test]
fn a_store_that_overwrites_is_refused() {
    runtime().block_on(async {
        let store = memory();
        let careless = Faulty::new(store.clone());
        careless.create_overwrites(true);
        let made = Vault::create(careless.clone(), &key()).await;
        assert!(matches!(made, Err(VaultError::NoCreateIfAbsent(_))));
        assert!(store.head(&Path::from("vault.json")).await.is_err(), "nothing is left");
        // One that lies there already, and whose store was exchanged.
        let (vault, key) = vault_on(store).await;
        vault.probe().await.unwrap();
        let moved = Vault::open(careless, &key).await.unwrap();
        assert!(matches!(moved.probe().await, Err(VaultError::NoCreateIfAbsent(_))));
    });
}

#[test]
fn a_point_is_recovered_to_a_sparse_file() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (vault, _) = vault_on(local_store(&dir.path().join("vault")).unwrap()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        let size_bytes = 5000 * B as u64 - 1000;
        let hash = writer.hash_key();
        let disks = vec![DiskRecord { disk: disk(10), name: "sda".into(), size_bytes }];
        writer.set_disks(disks).unwrap();
        writer.begin(DeltaId::new()).await.unwrap();
        for (start, version) in [(0, 4), (2047, 5), (2048, 6)] {
            writer.push(chunk(disk(10), start, &[version], &hash)).await.unwrap();
        }
        let mut last = content(8);
        last[B - 1000..].fill(0);
        let extent = Extent { start: Block(4999), count: 1, fill: Fill::Data };
        let mut out = Vec::new();
        encode_chunk(disk(10), &[extent], &last, &hash, 1, &mut out).unwrap();
        writer.push(out.into()).await.unwrap();
        let covered = vec![PointDisk { disk: disk(10), size_bytes }];
        let info =
            PointInfo { consistency: Consistency::Crash, taken_at_ms: 1, freeze_us: 0, disks: covered };
        let commit = writer.commit(CommitKind::Point(info)).await.unwrap();

        let path = dir.path().join("sda.img");
        let target = recover::Target::File(path.clone());
        let recover = async |options| {
            recover::recover_disk(&vault, writer.state(), disk(10), commit, &target, options, Arc::new(()))
                .await
        };
        let report = recover(recover::Options::default()).await.unwrap();
        assert_eq!((report.size_bytes, report.written_bytes), (size_bytes, 4 * B as u64 - 1000));
        let got = std::fs::read(&path).unwrap();
        let mut expected = vec![0; size_bytes as usize];
        for (start, version) in [(0, 4), (2047, 5), (2048, 6)] {
            expected[start * B..][..B].copy_from_slice(&content(version));
        }
        expected[4999 * B..].copy_from_slice(&last[..B - 1000]);
        assert!(got == expected);
        let allocated = std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512;
        assert!(allocated < 1 << 20, "{allocated} bytes are allocated");
        assert!(matches!(recover(recover::Options::default()).await, Err(VaultError::Target { .. })));
        assert!(std::fs::read(&path).unwrap() == expected);
        let not_a_device = recover::Target::Device(path);
        assert!(matches!(not_a_device.check(1), Err(VaultError::Target { .. })));
    });
}

#[test]
fn a_local_store_refuses_to_replace_and_keeps_its_objects() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (vault, key) = vault_on(local_store(dir.path()).unwrap()).await;
        let commit = deliver(&mut vault.writer(machine()).await.unwrap(), 2, &[1, 2]).await.unwrap();
        drop(vault);
        let vault = Vault::open(local_store(dir.path()).unwrap(), &key).await.unwrap();
        let read = read_all(&vault, disk(10), commit).await.unwrap();
        assert_eq!(read[2 * B..3 * B], content(1));
        let machine_dir = dir.path().join(format!("machines/{}", machine()));
        assert!(machine_dir.join("manifest/00000000000000000001").is_file());
    });
}

#[test]
fn a_machine_cannot_have_had_disks_without_end() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        let fresh = |count: usize| -> Vec<DiskRecord> {
            let record = |_| DiskRecord { disk: DiskId::new(), name: "d".into(), size_bytes: 4096 };
            (0..count).map(record).collect()
        };
        let mut last = Vec::new();
        for _ in 0..crate::DISKS_EVER_MAX / crate::DISKS_MAX {
            last = fresh(crate::DISKS_MAX);
            writer.set_disks(last.clone()).unwrap();
            writer.begin(DeltaId::new()).await.unwrap();
            writer.commit(CommitKind::Partial).await.unwrap();
        }
        assert_eq!(writer.state().former_disks.len(), crate::DISKS_EVER_MAX - crate::DISKS_MAX);
        assert!(matches!(writer.set_disks(fresh(1)), Err(VaultError::Limit(_))));
        // Those that it has or had may come and go, and it goes on.
        last.truncate(10);
        last.push(writer.state().former_disks[0].clone());
        writer.set_disks(last).unwrap();
        writer.begin(DeltaId::new()).await.unwrap();
        writer.commit(CommitKind::Partial).await.unwrap();
        let state = vault.machine(machine()).await.unwrap();
        assert_eq!(state.disks.len() + state.former_disks.len(), crate::DISKS_EVER_MAX);
        assert!(state.memory_bytes() > 4096 * 40 && state.memory_bytes() < 2 << 20);
    });
}

#[test]
fn a_state_grows_to_its_limit_and_what_is_stored_stays_readable() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        const MAX: u64 = 48 << 10;
        let mut writer = vault.writer_within(machine(), MAX).await.unwrap();
        let mut stored = 0;
        let refused = loop {
            match deliver(&mut writer, 0, &[1]).await {
                Ok(_) => stored += 1,
                Err(error) => break error,
            }
            assert!(writer.state().memory_bytes() <= MAX);
            assert!(stored < 1000);
        };
        let VaultError::StateFull { bytes, bytes_max: MAX, .. } = refused else { panic!("{refused}") };
        assert!(bytes > MAX && bytes < MAX + 1024 && refused.code() == 1223 && refused.is_retryable());
        assert!(stored > 50, "{stored}");
        writer.abort().await.unwrap();
        drop(writer);
        // What it takes to load is told before, and enough.
        let state = vault.machine_within(machine(), MAX).await.unwrap();
        assert_eq!(state.points.len(), stored);
        assert!(vault.load_bytes(machine(), MAX).await.unwrap() >= state.memory_bytes());
        assert!(vault.load_bytes(machine(), u64::MAX).await.unwrap() >= state.memory_bytes());
        let lower = state.memory_bytes() - 1;
        for refused in [
            vault.machine_within(machine(), lower).await.err(),
            vault.writer_within(machine(), lower).await.err(),
            // Of a checkpoint that is larger than all that is allowed, nothing is read.
            vault.load_bytes(machine(), 1000).await.err(),
        ] {
            assert_eq!(refused.unwrap().code(), 1223);
        }
        // With a higher limit it goes on.
        let mut writer = vault.writer(machine()).await.unwrap();
        deliver(&mut writer, 0, &[2]).await.unwrap();
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    });
}

#[test]
fn a_checkpoint_that_is_too_large_is_passed_over_and_not_read() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (vault, _) = vault_on(local_store(dir.path()).unwrap()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        for _ in 0..3 {
            deliver(&mut writer, 0, &[1]).await.unwrap();
        }
        let checkpoints = dir.path().join(format!("machines/{}/checkpoint", machine()));
        std::fs::create_dir_all(&checkpoints).unwrap();
        let huge = std::fs::File::create(checkpoints.join(format!("{:020}", 2))).unwrap();
        huge.set_len(10 << 30).unwrap();
        let bytes = vault.load_bytes(machine(), crate::STATE_BYTES_MAX).await.unwrap();
        assert!(bytes < 1 << 20, "{bytes}");
        assert_eq!(vault.machine(machine()).await.unwrap().points.len(), 3);
    });
}
