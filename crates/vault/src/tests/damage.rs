//! Damaged, shortened, exchanged and missing objects: always a typed error, never a panic, never wrong content.

use super::support::*;
use crate::{Vault, VaultKey, verify};
use futures::TryStreamExt;
use highwater_delta::*;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use std::sync::Arc;

/// A vault with every kind of object.
async fn sample() -> (Arc<dyn ObjectStore>, VaultKey, Vec<Path>) {
    let store = memory();
    let (vault, key) = vault_on(store.clone()).await;
    vault.control_create("ca/1", b"a certificate authority").await.unwrap();
    let mut writer = vault.writer(machine()).await.unwrap();
    for n in 0..64 {
        deliver(&mut writer, n % 50, &[n as u32 + 1, 0, 3]).await.unwrap();
    }
    let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
    let all: Vec<Path> = listed.into_iter().map(|meta| meta.location).collect();
    let of = |part: &str| {
        all.iter().filter(|p| p.as_ref().contains(part)).min().unwrap_or_else(|| panic!("{part}")).clone()
    };
    let kinds =
        ["vault.json", "keys/", "/key", "manifest/", "checkpoint/", "segments/", "control/"].map(of).to_vec();
    (store, key, kinds)
}

/// Whether a check of everything finds damage.
async fn found(store: &Arc<dyn ObjectStore>, key: &VaultKey) -> bool {
    let Ok(vault) = Vault::open(store.clone(), key).await else { return true };
    let report = verify::verify_vault(&vault).await.expect("damage is no failure of the store");
    // What can still be read must be right.
    for commit in [1, 30, 64] {
        if let Ok(read) = read_all(&vault, disk(10), CommitId(commit)).await {
            let at = (commit - 1) as usize % 50;
            assert_eq!(read[at * B..][..B], content(commit as u32), "wrong content was returned");
        }
    }
    !report.is_clean()
}

#[test]
fn every_flipped_bit_is_found() {
    runtime().block_on(async {
        let (store, key, kinds) = sample().await;
        assert!(!found(&store, &key).await, "undamaged");
        for path in kinds {
            let good = store.get(&path).await.unwrap().bytes().await.unwrap();
            let step = (good.len() * 8 / 40).max(1) | 1;
            for bit in (0..good.len() * 8).step_by(step).chain([good.len() * 8 - 1]) {
                let mut bad = good.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                store.put(&path, bad.into()).await.unwrap();
                assert!(found(&store, &key).await, "bit {bit} of {path}");
            }
            store.put(&path, good.into()).await.unwrap();
        }
        assert!(!found(&store, &key).await, "undamaged again");
    });
}

#[test]
fn every_truncation_and_loss_is_found() {
    runtime().block_on(async {
        let (store, key, kinds) = sample().await;
        for path in kinds {
            let good = store.get(&path).await.unwrap().bytes().await.unwrap();
            let lens = (0..good.len()).step_by(good.len() / 12 + 1).chain([good.len() - 1]);
            for len in lens {
                store.put(&path, good.slice(..len).into()).await.unwrap();
                assert!(found(&store, &key).await, "{len} bytes of {path}");
            }
            let long = [&good[..], &[0]].concat();
            store.put(&path, long.into()).await.unwrap();
            assert!(found(&store, &key).await, "a byte more of {path}");
            let optional = path.as_ref().contains("checkpoint") || path.as_ref().contains("control");
            if !optional {
                store.delete(&path).await.unwrap();
                assert!(found(&store, &key).await, "loss of {path}");
            }
            store.put(&path, good.into()).await.unwrap();
        }
    });
}

#[test]
fn exchanged_objects_are_found() {
    runtime().block_on(async {
        let (store, key, _) = sample().await;
        let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
        for part in ["manifest/", "segments/"] {
            let mut of: Vec<_> = listed.iter().filter(|m| m.location.as_ref().contains(part)).collect();
            of.sort_by_key(|m| m.location.to_string());
            let (a, b) = (&of[5].location, &of[6].location);
            let (good_a, good_b) = (
                store.get(a).await.unwrap().bytes().await.unwrap(),
                store.get(b).await.unwrap().bytes().await.unwrap(),
            );
            store.put(a, good_b.clone().into()).await.unwrap();
            store.put(b, good_a.clone().into()).await.unwrap();
            assert!(found(&store, &key).await, "{a} and {b} exchanged");
            store.put(a, good_a.into()).await.unwrap();
            store.put(b, good_b.into()).await.unwrap();
        }
        assert!(!found(&store, &key).await);
    });
}

#[test]
fn a_hole_in_the_history_is_refused_and_not_cut_off() {
    runtime().block_on(async {
        let (store, key, _) = sample().await;
        let vault = Vault::open(store.clone(), &key).await.unwrap();
        let mut writer = vault.writer(machine()).await.unwrap();
        deliver(&mut writer, 0, &[1]).await.unwrap();
        deliver(&mut writer, 0, &[2]).await.unwrap();
        let newest = *vault.checkpoint_numbers(machine()).await.unwrap().last().unwrap();
        while vault.machine(machine()).await.unwrap().last_record < newest + 2 {
            deliver(&mut writer, 0, &[3]).await.unwrap();
        }
        store.delete(&crate::store::manifest_path(machine(), newest + 1)).await.unwrap();
        assert_eq!(vault.machine(machine()).await.unwrap_err().code(), 1207);
        assert_eq!(vault.writer(machine()).await.unwrap_err().code(), 1207);
    });
}
