//! A bit of each byte of an object of every kind is flipped: there is none that does not matter.

use super::{maintain::merged_with_key, support::*};
use crate::{
    Kind, Vault,
    maps::rows,
    policy::{self, Policy},
    repair,
    segment::SegmentReader,
    verify,
};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use std::{sync::Arc, time::Duration};

/// Which bit of a byte: each byte another one.
fn bit(at: usize) -> u8 {
    1 << ((at * 5 + at / 8) % 8)
}

async fn paths(store: &dyn ObjectStore) -> Vec<Path> {
    let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
    listed.into_iter().map(|meta| meta.location).collect()
}

#[test]
fn of_a_vault_that_was_not_merged() {
    runtime().block_on(async {
        let store = memory();
        let (vault, key) = vault_on(store.clone()).await;
        policy::set_policy(&vault, Some(machine()), Some(Policy::default()), vault.now_ms()).await.unwrap();
        vault.control_create("ca/1", b"a certificate authority").await.unwrap();
        let mut writer = vault.writer(machine()).await.unwrap();
        for n in 0..3 {
            deliver(&mut writer, n, &[n as u32 + 1, 0]).await.unwrap();
        }
        let (keys, host) = vault.machine_keys(machine()).await.unwrap();
        let state = vault.load_state(machine(), &keys, host, crate::vault::Begin::Checkpoint).await.unwrap();
        let path = crate::store::checkpoint_path(machine(), 3);
        let plain = crate::state::encode(&state).unwrap();
        let sealed = crate::seal::seal(&keys.manifest, &path, &plain).unwrap();
        store.put(&path, sealed.into()).await.unwrap();
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
        let mut bytes = 0;
        for path in paths(&*store).await {
            let good = store.get(&path).await.unwrap().bytes().await.unwrap();
            for at in 0..good.len() {
                let mut bad = good.to_vec();
                bad[at] ^= bit(at);
                store.put(&path, bad.into()).await.unwrap();
                let clean = match Vault::open(store.clone(), &key).await {
                    Ok(vault) => verify::verify_vault(&vault).await.unwrap().is_clean(),
                    Err(_) => false,
                };
                assert!(!clean, "byte {at} of {path}");
                bytes += 1;
            }
            store.put(&path, good.into()).await.unwrap();
        }
        assert!(bytes > 2000, "{bytes}");
    });
}

#[test]
fn of_maps_and_of_segments_that_were_written_anew() {
    runtime().block_on(async {
        let (store, vault, _) = merged_with_key().await;
        let state = vault.machine(machine()).await.unwrap();
        let (keys, _) = vault.machine_keys(machine()).await.unwrap();
        let run = state.runs.iter().find(|run| run.is_merged()).unwrap();
        let map = &run.objects()[0];
        let reader = SegmentReader::new(vault.store().clone(), machine(), &keys, Kind::Map, map).unwrap();
        let row = rows(&reader).await.unwrap().into_iter().find(|row| row.kind == Kind::Rewritten).unwrap();
        let reader =
            SegmentReader::new(vault.store().clone(), machine(), &keys, row.kind, &row.reference()).unwrap();
        let rewritten = reader.reference_of_trailer().await.unwrap();
        for (kind, object) in [(Kind::Map, map), (Kind::Rewritten, &rewritten)] {
            let path = crate::store::object_path(machine(), kind, object.id);
            let good = store.get(&path).await.unwrap().bytes().await.unwrap();
            verify::check_object(&vault, machine(), kind, object).await.unwrap();
            for at in 0..good.len() {
                let mut bad = good.to_vec();
                bad[at] ^= bit(at);
                store.put(&path, bad.into()).await.unwrap();
                let found = verify::check_object(&vault, machine(), kind, object).await.unwrap_err();
                assert_eq!(found.code(), 1206, "byte {at} of {path}: {found}");
            }
            store.put(&path, good.into()).await.unwrap();
        }
    });
}

/// A record that is damaged or gone: found; readers have all, by a checkpoint behind it, or nothing.
#[test]
fn records_are_needed_only_where_no_checkpoint_is_behind_them() {
    runtime().block_on(async {
        let store: Arc<dyn ObjectStore> = memory();
        let (vault, key) = vault_on(store.clone()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        for n in 0..18 {
            deliver(&mut writer, n, &[n as u32 + 1]).await.unwrap();
        }
        let newest = vault.checkpoint_numbers(machine()).await.unwrap().pop().unwrap();
        assert!((6..17).contains(&newest));
        let whole = vault.machine(machine()).await.unwrap();
        let settings = repair::Settings { grace: Duration::ZERO, ..repair::Settings::default() };
        // That the last record was there is not known to the vault: only what lies behind one tells that it is missing.
        for number in [1, 5, newest, newest + 1, 17] {
            let path = crate::store::manifest_path(machine(), number);
            let good = store.get(&path).await.unwrap().bytes().await.unwrap();
            for gone in [true, false] {
                let mut bad = good.to_vec();
                bad[50] ^= 4;
                match gone {
                    true => store.delete(&path).await.unwrap(),
                    false => drop(store.put(&path, bad.into()).await.unwrap()),
                }
                let vault = Vault::open(store.clone(), &key).await.unwrap();
                let found = verify::verify_vault(&vault).await.unwrap();
                assert!(!found.is_clean(), "record {number}");
                // What is not known to be nobody's is not called so.
                assert!(found.orphans.is_empty());
                let planned = repair::plan(&vault, machine(), &found.damaged, &settings).await;
                let repaired = repair::machine(&vault, machine(), &found.damaged, &settings).await;
                if number <= newest {
                    assert!(vault.machine(machine()).await.unwrap() == whole, "record {number}");
                    assert!(planned.unwrap().losses.points.is_empty());
                    assert_eq!((repaired.unwrap().losses.whole, found.points), (18, 18));
                } else {
                    let code = vault.machine(machine()).await.err().map_or(0, |error| error.code());
                    assert_eq!(code, if gone { 1207 } else { 1206 }, "record {number}");
                    assert_eq!(planned.err().map_or(0, |error| error.code()), code, "record {number}");
                    assert_eq!(repaired.err().map_or(0, |error| error.code()), code, "record {number}");
                }
                store.put(&path, good.clone().into()).await.unwrap();
            }
        }
        assert!(vault.machine(machine()).await.unwrap() == whole);
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean(), "nothing was deleted");
    });
}
