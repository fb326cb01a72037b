//! Repair: whatever is damaged, what it calls whole reads back byte for byte, what it calls lost is refused, and nothing that is named goes.

use super::{maintain::merged_with_key, support::*};
use crate::{
    Kind, Vault, VaultKey,
    repair::{self, Losses, Report, Settings},
    store::{What, what_is},
    verify,
};
use futures::TryStreamExt;
use highwater_delta::*;
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory, path::Path};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

type Objects = BTreeMap<Path, bytes::Bytes>;
/// By point and disk.
type Content = BTreeMap<(CommitId, DiskId), Vec<u8>>;

async fn objects(store: &dyn ObjectStore) -> Objects {
    let mut all = Objects::new();
    let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
    for meta in listed {
        let content = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
        all.insert(meta.location, content);
    }
    all
}

async fn store_of(objects: &Objects) -> Arc<InMemory> {
    let store = Arc::new(InMemory::new());
    for (path, content) in objects {
        store.put(path, content.clone().into()).await.unwrap();
    }
    store
}

async fn open(store: Arc<dyn ObjectStore>, key: &VaultKey) -> Vault {
    Vault::open(store, key).await.unwrap()
}

/// Every point's disks.
async fn content(vault: &Vault) -> Content {
    let mut all = Content::new();
    for point in vault.machine(machine()).await.unwrap().points {
        for covered in point.info.disks {
            let read = read_all(vault, covered.disk, point.id).await.unwrap();
            all.insert((point.id, covered.disk), read);
        }
    }
    all
}

fn settings() -> Settings {
    Settings { grace: Duration::ZERO, ..Settings::default() }
}

/// Verifies and repairs.
async fn repaired(vault: &Vault) -> Report {
    let found = verify::verify_vault(vault).await.unwrap();
    repair::machine(vault, machine(), &found.damaged, &settings()).await.unwrap()
}

/// Each block reads back, or is called lost and cannot be read.
async fn check(vault: &Vault, losses: &Losses, expected: &Content, what: &str) {
    let mut missing: BTreeMap<CommitId, BTreeSet<(DiskId, u64)>> = BTreeMap::new();
    for lost in &losses.ranges {
        for (point, disk) in
            expected.keys().filter(|(p, d)| *d == lost.disk && lost.from <= *p && *p <= lost.to)
        {
            let blocks = (lost.first..lost.first + lost.blocks).map(|block| (*disk, block));
            missing.entry(*point).or_default().extend(blocks);
        }
    }
    let counted: Vec<(CommitId, u64)> = losses.points.iter().map(|p| (p.point, p.blocks)).collect();
    let listed: Vec<(CommitId, u64)> = missing.iter().map(|(p, blocks)| (*p, blocks.len() as u64)).collect();
    assert_eq!(counted, listed, "{what}");
    for ((point, disk), good) in expected {
        let map = vault.block_map(machine(), *disk, *point).await.unwrap();
        let is_lost = |block| missing.get(point).is_some_and(|all| all.contains(&(*disk, block)));
        let mut any = false;
        for block in 0..map.blocks() {
            let mut read = vec![0; B];
            let done = map.read(BlockRange::new(block, 1), &mut read).await;
            any |= is_lost(block);
            match done {
                Ok(()) => {
                    assert!(
                        !is_lost(block),
                        "{what}: block {block} of {disk} at {point} is read and called lost"
                    );
                    assert!(
                        read == good[block as usize * B..][..B],
                        "{what}: block {block} of {disk} at {point}"
                    );
                }
                Err(error) => {
                    assert!(is_lost(block), "{what}: block {block} of {disk} at {point}: {error}");
                    assert!([1206, 1207, 1212].contains(&error.code()), "{what}: {error:?}");
                }
            }
        }
        let whole = read_all(vault, *disk, *point).await;
        assert_eq!(whole.is_err(), any, "{what}: {disk} at {point}");
        // At once, what lacks is left out, exactly.
        let mut rest = vec![7; map.blocks() as usize * B];
        let lacking = map.read_rest(BlockRange::new(0, map.blocks()), &mut rest).await.unwrap();
        let told: BTreeSet<u64> = lacking.blocks.iter().flat_map(|(from, to)| *from..*to).collect();
        let expected: BTreeSet<u64> = (0..map.blocks()).filter(|block| is_lost(*block)).collect();
        assert_eq!((&told, lacking.why.is_some()), (&expected, any), "{what}: {disk} at {point}");
        for (block, read) in (0..).zip(rest.chunks(B)) {
            let wanted = if told.contains(&block) { &[0; B][..] } else { &good[block as usize * B..][..B] };
            assert!(read == wanted, "{what}: block {block} of {disk} at {point}, of the rest");
        }
    }
}

#[test]
fn whatever_is_damaged_is_healed_or_told() {
    runtime().block_on(async {
        let (store, vault, key) = merged_with_key().await;
        let (all, expected) = (objects(&*store).await, content(&vault).await);
        let (mut healed, mut lost, mut without) = (BTreeMap::new(), BTreeMap::new(), 0);
        let mut seed = 12345_u64;
        let mut draw = |n: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % n
        };
        for (path, good) in &all {
            let kind = match what_is(machine(), path) {
                What::Object(name) => format!("{:?}", name.kind),
                What::Document if path.as_ref().contains("checkpoint") => "checkpoint".to_owned(),
                _ => continue,
            };
            // Header, trailer, anywhere, short, gone.
            for way in [draw(3), 3 + draw(3)] {
                let mut bad = good.to_vec();
                match way {
                    0 => bad[draw(64)] ^= 1 << draw(8),
                    1 => bad[good.len() - 1 - draw(64)] ^= 1 << draw(8),
                    2 | 3 => bad[64 + draw(good.len() - 64)] ^= 1 << draw(8),
                    _ => bad.truncate(draw(good.len())),
                }
                let broken = store_of(&all).await;
                match way {
                    5 => broken.delete(path).await.unwrap(),
                    _ => drop(broken.put(path, bad.into()).await.unwrap()),
                }
                let what = format!("{path}, way {way}");
                let vault = open(broken.clone(), &key).await;
                let planned = {
                    let found = verify::verify_vault(&vault).await.unwrap();
                    repair::plan(&vault, machine(), &found.damaged, &settings()).await.unwrap()
                };
                check(
                    &open(broken.clone(), &key).await,
                    &planned.losses,
                    &expected,
                    &format!("planned {what}"),
                )
                .await;
                let report = repaired(&vault).await;
                let vault = open(broken.clone(), &key).await;
                check(&vault, &report.losses, &expected, &what).await;
                assert!(report.losses.points.len() <= planned.losses.points.len(), "{what}");
                let after = verify::verify_vault(&vault).await.unwrap();
                let is_whole = report.losses.points.is_empty();
                if is_whole && report.left.is_empty() {
                    assert!(after.is_clean(), "{what}: {:?} {report:?}", after.problems);
                }
                if planned.is_empty() && is_whole {
                    without += 1;
                } else {
                    *if is_whole { &mut healed } else { &mut lost }.entry(kind.clone()).or_insert(0) += 1;
                }
            }
        }
        println!("healed {healed:?}, lost {lost:?}, nothing {without}");
        // Of each kind something can be healed, and of segments not everything.
        for kind in ["Segment", "Rewritten", "Map", "checkpoint"] {
            assert!(healed.get(kind).is_some_and(|n| *n > 3), "{kind}: {healed:?}");
        }
        assert!(lost.contains_key("Segment") && !lost.contains_key("checkpoint"), "{lost:?}");
    });
}

/// What a shortcut still says of a lost map is not given away for something that can be made anew.
#[test]
fn a_repair_of_two_things_costs_nothing() {
    runtime().block_on(async {
        let (store, _, key) = merged_with_key().await;
        let all = objects(&*store).await;
        let of = |wanted: fn(Kind) -> bool| -> Vec<Path> {
            let is =
                |path: &&Path| matches!(what_is(machine(), path), What::Object(name) if wanted(name.kind));
            all.keys().filter(is).cloned().collect()
        };
        let (maps, others) = (of(|kind| kind == Kind::Map), of(|kind| kind != Kind::Map));
        let mut left = 0;
        for (n, map) in maps.iter().enumerate() {
            for other in others.iter().skip(n % 5).step_by(5) {
                let broken = store_of(&all).await;
                broken.delete(map).await.unwrap();
                let mut bad = all[other].to_vec();
                // Its trailer: all its content is there, and moved.
                let at = bad.len() - 30;
                bad[at] ^= 1;
                broken.put(other, bad.into()).await.unwrap();
                let vault = open(broken.clone(), &key).await;
                let found = verify::verify_vault(&vault).await.unwrap();
                let planned = repair::plan(&vault, machine(), &found.damaged, &settings()).await.unwrap();
                let report = repair::machine(&vault, machine(), &found.damaged, &settings()).await.unwrap();
                let blocks = |losses: &Losses| losses.points.iter().map(|point| point.blocks).sum::<u64>();
                assert!(
                    blocks(&report.losses) <= blocks(&planned.losses),
                    "{map}, {other}: {:?}, and {:?} before",
                    report.losses,
                    planned.losses
                );
                left += report.left.len();
            }
        }
        assert!(left > 0);
    });
}

/// What a map says can be believed though its end is damaged: it is made anew from itself, whatever is left of what was merged.
#[test]
fn a_map_of_which_only_the_end_is_damaged_is_made_anew() {
    runtime().block_on(async {
        let (store, vault, key) = merged_with_key().await;
        let (all, expected) = (objects(&*store).await, content(&vault).await);
        let state = vault.machine(machine()).await.unwrap();
        let trashed: Vec<Path> = (state.trash.iter())
            .map(|trashed| crate::store::object_path(machine(), trashed.object.kind, trashed.object.id))
            .collect();
        let maps: Vec<_> = (state.runs.iter().filter(|run| run.is_merged()))
            .flat_map(|run| run.objects().iter().map(|map| map.id))
            .collect();
        assert!(!trashed.is_empty() && !maps.is_empty());
        for id in maps {
            let broken = store_of(&all).await;
            for path in &trashed {
                let _ = broken.delete(path).await;
            }
            let path = crate::store::object_path(machine(), Kind::Map, id);
            let mut bad = all[&path].to_vec();
            let at = bad.len() - 30;
            bad[at] ^= 1;
            broken.put(&path, bad.into()).await.unwrap();
            let report = repaired(&open(broken.clone(), &key).await).await;
            assert_eq!((report.runs, report.left.len()), (1, 0), "{path}: {report:?}");
            let vault = open(broken, &key).await;
            check(&vault, &Losses::default(), &expected, path.as_ref()).await;
            assert!(verify::verify_vault(&vault).await.unwrap().is_clean(), "{path}");
        }
    });
}

#[test]
fn what_was_written_again_is_whole_again() {
    runtime().block_on(async {
        let store = memory();
        let (vault, key) = vault_on(store.clone()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        for n in 1..=20 {
            let start = if n == 12 { 5 } else { 40 };
            deliver(&mut writer, start, &[n, n, n]).await.unwrap();
        }
        deliver(&mut writer, 6, &[77]).await.unwrap();
        let expected = content(&vault).await;
        let state = vault.machine(machine()).await.unwrap();
        let segment = state.runs[11].objects()[0].id;
        store.delete(&crate::store::object_path(machine(), Kind::Segment, segment)).await.unwrap();
        let vault = open(store, &key).await;
        let report = repaired(&vault).await;
        check(&vault, &report.losses, &expected, "one segment").await;
        let blocks: Vec<u64> = report.losses.points.iter().map(|point| point.blocks).collect();
        assert_eq!(blocks, [vec![3; 9], vec![2]].concat());
        assert_eq!((report.losses.whole, report.losses.newest_whole), (11, Some(CommitId(11))));
        assert_eq!(report.left.len(), 1);
    });
}

/// Names that nobody names: older and newer than all that is.
async fn strew(store: &dyn ObjectStore) -> usize {
    let old = SegmentId::from_bytes([1; 16]);
    let mut count = 0;
    for kind in [Kind::Segment, Kind::Rewritten, Kind::Map] {
        for id in [old, SegmentId::new()] {
            store.put(&crate::store::object_path(machine(), kind, id), "stray".into()).await.unwrap();
            count += 1;
        }
    }
    store.put(&format!("machines/{}/segments/x.seg", machine()).into(), "a stranger".into()).await.unwrap();
    count
}

#[test]
fn strays_go_and_what_is_under_way_is_fenced_first() {
    runtime().block_on(async {
        let (store, vault, key) = merged_with_key().await;
        let store = store_of(&objects(&*store).await).await;
        let vault = {
            drop(vault);
            open(store.clone(), &key).await
        };
        let expected = content(&vault).await;
        let count = strew(&*store).await;
        // Young ones stay, and nobody is fenced.
        let mut writer = vault.writer(machine()).await.unwrap();
        let records = vault.machine(machine()).await.unwrap().last_record;
        let report = repair::machine(&vault, machine(), &[], &Settings::default()).await.unwrap();
        assert_eq!((report.deleted, vault.machine(machine()).await.unwrap().last_record), (0, records));
        deliver(&mut writer, 0, &[5]).await.unwrap();
        // A delta is under way.
        let hash = writer.hash_key();
        writer.begin(DeltaId::new()).await.unwrap();
        writer.push(chunk(disk(10), 3, &[9], &hash)).await.unwrap();
        writer.finish_segment_for_test().await;
        let planned = repair::plan(&vault, machine(), &[], &settings()).await.unwrap();
        assert!(planned.strays as usize > count / 2 && planned.left == 0, "{planned:?}");
        let report = repair::machine(&vault, machine(), &[], &settings()).await.unwrap();
        assert_eq!(report.deleted, planned.strays);
        let fenced = writer.commit(point(64)).await.unwrap_err();
        assert_eq!(fenced.code(), 1208, "{fenced}");
        let found = verify::verify_vault(&vault).await.unwrap();
        assert!(found.is_clean() && found.orphans.is_empty(), "{found:?}");
        assert_eq!(found.strangers.len(), 1, "nobody knows what it is");
        let mut writer = vault.writer(machine()).await.unwrap();
        deliver(&mut writer, 0, &[6]).await.unwrap();
        for ((point, disk), good) in &expected {
            assert!(read_all(&vault, *disk, *point).await.unwrap() == *good);
        }
        assert!(repair::plan(&vault, machine(), &[], &settings()).await.unwrap().is_empty());
    });
}

#[test]
fn it_may_fail_at_any_call() {
    runtime().block_on(async {
        let (store, vault, key) = merged_with_key().await;
        let (mut all, expected) = (objects(&*store).await, content(&vault).await);
        let state = vault.machine(machine()).await.unwrap();
        // A checkpoint, a shortcut, the end of a segment; and strays.
        let first = |part: &str| all.keys().find(|path| path.as_ref().contains(part)).unwrap().clone();
        let shortcut = crate::store::object_path(machine(), Kind::Map, state.shortcuts[0].maps[0].id);
        let plain = state.runs.iter().rev().find(|run| !run.is_merged()).unwrap().objects()[0].id;
        let segment = crate::store::object_path(machine(), Kind::Segment, plain);
        for path in [first("checkpoint/"), shortcut, segment] {
            let mut bad = all[&path].to_vec();
            let at = bad.len() - 10;
            bad[at] ^= 1;
            all.insert(path, bad.into());
        }
        for when in [When::Before, When::After] {
            for n in 1.. {
                let inner = store_of(&all).await;
                strew(&*inner).await;
                let faulty = Faulty::new(inner.clone());
                let vault = open(faulty.clone(), &key).await;
                let found = verify::verify_vault(&vault).await.unwrap();
                faulty.fail_call(Some((n, when)));
                let done = repair::machine(&vault, machine(), &found.damaged, &settings()).await;
                let reached = faulty.calls() >= n;
                faulty.fail_call(None);
                assert!(done.is_ok() || reached, "call {n}: {done:?}");
                let vault = open(inner, &key).await;
                let report = repaired(&vault).await;
                assert!(report.losses.points.is_empty() && report.left.is_empty(), "call {n}: {report:?}");
                let found = verify::verify_vault(&vault).await.unwrap();
                assert!(found.is_clean() && found.orphans.is_empty(), "call {n}: {found:?}");
                for ((point, disk), good) in &expected {
                    assert!(read_all(&vault, *disk, *point).await.unwrap() == *good, "call {n}");
                }
                vault.writer(machine()).await.unwrap();
                if !reached {
                    assert!(n > 50, "{n} calls");
                    break;
                }
            }
        }
    });
}

/// Repairs a copy that is damaged in some way: no more is lost afterwards than before.
async fn costs_nothing(broken: Arc<InMemory>, key: &VaultKey, what: &str) -> Report {
    let vault = open(broken, key).await;
    let found = verify::verify_vault(&vault).await.unwrap();
    let planned = repair::plan(&vault, machine(), &found.damaged, &settings()).await.unwrap();
    let report = repair::machine(&vault, machine(), &found.damaged, &settings()).await.unwrap();
    let blocks = |losses: &Losses| losses.points.iter().map(|point| point.blocks).sum::<u64>();
    let (before, after) = (blocks(&planned.losses), blocks(&report.losses));
    assert!(after <= before, "{what}: {before} blocks lacked, now {after}: {report:?}");
    report
}

#[test]
fn a_damaged_shortcut_over_a_lost_map_is_not_given_away() {
    runtime().block_on(async {
        let (store, vault, key) = merged_with_key().await;
        let all = objects(&*store).await;
        let state = vault.machine(machine()).await.unwrap();
        let path = |kind, id| crate::store::object_path(machine(), kind, id);
        let mut left = 0;
        for shortcut in &state.shortcuts {
            let is_under = |run: &&crate::runs::Run| {
                run.is_merged() && shortcut.from <= run.from && run.to <= shortcut.to
            };
            for run in state.runs.iter().filter(is_under) {
                let broken = store_of(&all).await;
                for trashed in &state.trash {
                    let _ = broken.delete(&path(trashed.object.kind, trashed.object.id)).await;
                }
                for map in run.objects() {
                    broken.delete(&path(Kind::Map, map.id)).await.unwrap();
                }
                for map in &shortcut.maps {
                    let path = path(Kind::Map, map.id);
                    let mut bad = all[&path].to_vec();
                    let at = bad.len() - 30;
                    bad[at] ^= 1;
                    broken.put(&path, bad.into()).await.unwrap();
                }
                let what = format!("shortcut to {}, run to {}", shortcut.to, run.to);
                left += costs_nothing(broken, &key, &what).await.left.len();
            }
        }
        assert!(left > 0);
    });
}

#[test]
fn a_map_that_could_not_be_made_anew_after_all_keeps_its_shortcut() {
    runtime().block_on(async {
        let (store, vault, key) = merged_with_key().await;
        let all = objects(&*store).await;
        let state = vault.machine(machine()).await.unwrap();
        let path = |kind, id| crate::store::object_path(machine(), kind, id);
        // As long as they should be, and rotten.
        let trashed: Vec<Path> = (state.trash.iter())
            .filter(|trashed| trashed.object.kind != Kind::Map)
            .map(|trashed| path(trashed.object.kind, trashed.object.id))
            .filter(|path| all.contains_key(path))
            .collect();
        let is_other = |path: &&Path| {
            matches!(what_is(machine(), path), What::Object(name) if name.kind != Kind::Map)
                && !trashed.contains(path)
        };
        let others: Vec<&Path> = all.keys().filter(is_other).collect();
        let is_under = |run: &&crate::runs::Run| {
            run.is_merged() && state.shortcuts.iter().any(|s| s.from <= run.from && run.to <= s.to)
        };
        for run in state.runs.iter().filter(is_under) {
            for other in others.iter().step_by(3) {
                let broken = store_of(&all).await;
                for path in &trashed {
                    let mut bad = all[path].to_vec();
                    bad[100] ^= 1;
                    broken.put(path, bad.into()).await.unwrap();
                }
                for map in run.objects() {
                    broken.delete(&path(Kind::Map, map.id)).await.unwrap();
                }
                let mut bad = all[*other].to_vec();
                let at = bad.len() - 30;
                bad[at] ^= 1;
                broken.put(other, bad.into()).await.unwrap();
                costs_nothing(broken, &key, &format!("run to {}, and {other}", run.to)).await;
            }
        }
    });
}
