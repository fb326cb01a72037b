//! Verifications in parts, samples and at a pace; and maps that are authentic and wrong.

use super::{maintain::merged, support::*};
use crate::{
    Kind, Pace, Vault, VaultError,
    maps::{Fill as Full, MapWriter, Merge, Source},
    record::{KIND_MAINTAINER, KIND_MERGED, MergedBody, Replaces},
    runs::Content,
    verify::{self, Pass, Report, Sample, Settings, Watch, resume},
};
use async_trait::async_trait;
use highwater_delta::*;
use object_store::{ObjectStore, ObjectStoreExt};
use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

/// Ends a verification after so many objects.
struct Until(AtomicU64);
#[async_trait]
impl Watch for Until {
    async fn done(&self, _: &Pass) -> crate::Result<()> {
        match self.0.fetch_sub(1, SeqCst) {
            0 => Err(VaultError::Order("enough")),
            _ => Ok(()),
        }
    }
}

/// The counts, which do not depend on how often it was interrupted.
fn counts(report: &Report) -> Report {
    Report { orphans: vec![], ..report.clone() }
}

/// One verification to its end, through a file each time that it is interrupted, after so many objects each.
async fn in_steps(vault: &Vault, step: u64, sample: Option<Sample>) -> (Report, u32) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    for n in 1.. {
        let known = resume::load(&path, vault, None, Some(sample)).unwrap();
        let mut pass = known.unwrap_or_else(|| Pass::new(vault, None, sample));
        let watch = Until(AtomicU64::new(step));
        match pass.run(vault, &Settings::default(), &watch).await {
            Ok(report) => return (report, n),
            Err(error) => assert!(matches!(error, VaultError::Order("enough")), "{error}"),
        }
        resume::save(&path, &pass).unwrap();
    }
    unreachable!()
}

#[test]
fn an_interrupted_one_goes_on_and_reads_everything_once() {
    runtime().block_on(async {
        let (store, vault) = merged().await;
        let whole = verify::verify_vault(&vault).await.unwrap();
        assert!(whole.is_clean() && whole.maps > 5 && whole.segments > 5 && whole.entries > 50, "{whole:?}");
        for step in [1, 2, 3, 7, 1000] {
            let (report, runs) = in_steps(&vault, step, None).await;
            assert_eq!(counts(&report), counts(&whole), "{step} at once");
            assert!(step > 10 || runs > 5, "{step}: {runs}");
        }
        // Damage is found at whatever place it was interrupted, and told once.
        let all: Vec<_> = futures::TryStreamExt::try_collect::<Vec<_>>(store.list(None)).await.unwrap();
        for meta in all
            .iter()
            .filter(|m| ["segments", "rewritten", "maps"].iter().any(|d| m.location.as_ref().contains(d)))
        {
            let good = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
            let mut bad = good.to_vec();
            bad[good.len() / 2] ^= 16;
            store.put(&meta.location, bad.into()).await.unwrap();
            let (report, _) = in_steps(&vault, 2, None).await;
            let whole = verify::verify_vault(&vault).await.unwrap();
            let trashed = vault.machine(machine()).await.unwrap().trash;
            let unused = trashed.iter().any(|t| meta.location.as_ref().contains(&t.object.id.to_string()));
            assert_eq!(whole.is_clean(), unused, "{}", meta.location);
            assert_eq!(counts(&report), counts(&whole), "{}", meta.location);
            store.put(&meta.location, good.into()).await.unwrap();
        }
    });
}

#[test]
fn samples_read_each_object_now_and_then_and_miss_no_absent_one() {
    runtime().block_on(async {
        let (store, vault) = merged().await;
        let whole = verify::verify_vault(&vault).await.unwrap();
        let mut seen = HashSet::new();
        for seed in 0..20 {
            let sample = Sample::new(30.0, seed).unwrap();
            let (report, _) = in_steps(&vault, 3, Some(sample)).await;
            assert!(report.is_clean(), "{:?}", report.problems);
            assert_eq!(report.segments + report.maps + report.not_read, whole.segments + whole.maps);
            seen.insert((report.segments, report.bytes));
            assert_eq!(in_steps(&vault, 50, Some(sample)).await.0, report, "by its seed");
        }
        assert!(seen.len() > 5, "{seen:?}");
        let some = store.list(Some(&crate::store::object_dir(machine(), Kind::Rewritten)));
        let some: Vec<_> = futures::TryStreamExt::try_collect::<Vec<_>>(some).await.unwrap();
        let state = vault.machine(machine()).await.unwrap();
        let used = |m: &object_store::ObjectMeta| {
            !state.trash.iter().any(|t| m.location.as_ref().contains(&t.object.id.to_string()))
        };
        let path = some.iter().find(|m| used(m)).unwrap().location.clone();
        let good = store.get(&path).await.unwrap().bytes().await.unwrap();
        let least = Sample::new(0.0001, 1).unwrap();
        store.put(&path, good.slice(..good.len() - 1).into()).await.unwrap();
        assert!(!in_steps(&vault, 9, Some(least)).await.0.is_clean());
        store.delete(&path).await.unwrap();
        assert!(!in_steps(&vault, 9, Some(least)).await.0.is_clean());
    });
}

#[test]
fn a_file_of_something_else_is_refused() {
    runtime().block_on(async {
        let (_, vault) = merged().await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let load = |vault: &Vault, machine, sample| {
            resume::load(&path, vault, machine, Some(sample)).map_err(|e| e.code())
        };
        assert_eq!(load(&vault, None, None).unwrap(), None);
        let pass = Pass::new(&vault, None, None);
        resume::save(&path, &pass).unwrap();
        assert_eq!(load(&vault, None, None).unwrap(), Some(pass));
        let (other, _) = vault_on(memory()).await;
        assert_eq!(load(&other, None, None), Err(1251));
        assert_eq!(load(&vault, Some(machine()), None), Err(1251));
        assert_eq!(load(&vault, None, Some(Sample::new(5.0, 1).unwrap())), Err(1251));
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert!(load(&vault, None, None).is_err(), "byte {at}: {}", String::from_utf8_lossy(&bad));
        }
        for len in 0..good.len() - 1 {
            std::fs::write(&path, &good[..len]).unwrap();
            assert_eq!(load(&vault, None, None), Err(1250), "{len} bytes");
        }
        resume::remove(&path).unwrap();
        resume::remove(&path).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn it_reads_no_faster_than_it_may() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (_, vault) = merged().await;
        let whole = verify::verify_vault(&vault).await.unwrap();
        let pace = Arc::new(Pace::new(None));
        let settings = Settings { pace: pace.clone() };
        Pass::new(&vault, None, None).run(&vault, &settings, &()).await.unwrap();
        assert!(pace.bytes() >= whole.bytes, "all that is read is counted");
        tokio::time::pause();
        let begun = tokio::time::Instant::now();
        let settings = Settings { pace: Arc::new(Pace::new(Some(whole.bytes / 60))) };
        Pass::new(&vault, None, None).run(&vault, &settings, &()).await.unwrap();
        assert!(begun.elapsed() > Duration::from_secs(59), "{:?}", begun.elapsed());
    });
}

/// Replaces the newest merged run by maps that are not as they should be, through a record as any other.
async fn lie(vault: &Vault, change: impl Fn(&mut crate::segment::Entry, &mut Vec<BlockHash>) -> bool) {
    let mut journal = crate::journal::Journal::open(vault.clone(), machine(), u64::MAX).await.unwrap();
    assert!(journal.put_after_others(KIND_MAINTAINER, &[], |_| true).await.unwrap());
    let run = journal.state.runs.iter().rev().find(|run| run.is_merged()).unwrap().clone();
    let Content::Maps { maps, held } = &run.content else { unreachable!() };
    let sources = maps.iter().map(|map| Source::new(Kind::Map, map.clone())).collect();
    let pace = Pace::new(None);
    let mut stream = Merge::new(vault.store(), machine(), &journal.keys, &pace, sources);
    let mut writer = MapWriter::new(vault, machine(), &journal.keys, Full::DEFAULT).unwrap();
    let (mut live, mut changed) = (vec![], false);
    while let Some(piece) = stream.next().await.unwrap() {
        let (mut entry, mut hashes) = (piece.entry, piece.hashes().to_vec());
        live.resize(stream.rows().len(), 0);
        if entry.fill == Fill::Data {
            live[entry.segment as usize] += u64::from(entry.count);
            changed = changed || change(&mut entry, &mut hashes);
        }
        entry.hash_at = 0;
        writer.push(piece.disk, entry, &hashes).await.unwrap();
    }
    assert!(changed);
    let rows: Vec<_> = (stream.rows().iter().cloned().zip(live))
        .map(|(row, live)| crate::maps::SegmentRow { live, ..row })
        .collect();
    let (mut map, upload) = writer.close(&rows).await.unwrap();
    upload.complete().await.unwrap();
    map.commit = run.to;
    let newest = map.id;
    let replaces = Some(Replaces { held: *held, dead: vec![], moved: true });
    let body = MergedBody { from: run.from, to: run.to, maps: vec![map], replaces, newest };
    let body = postcard::to_stdvec(&body).unwrap();
    assert!(journal.put_after_others(KIND_MERGED, &body, |_| true).await.unwrap());
}

#[test]
fn a_map_that_lies_is_found_without_a_read() {
    runtime().block_on(async {
        type Change = fn(&mut crate::segment::Entry, &mut Vec<BlockHash>) -> bool;
        let changes: [(&str, Change); 5] = [
            ("hash", |_, hashes| {
                hashes[0].0[3] ^= 1;
                true
            }),
            ("offset", |entry, _| {
                entry.offset += 1;
                true
            }),
            ("frame", |entry, _| {
                entry.frame += 1;
                true
            }),
            ("payload", |entry, _| {
                entry.payload_block ^= 1;
                true
            }),
            ("length", |entry, _| {
                entry.len += 1;
                true
            }),
        ];
        for (name, change) in changes {
            let (_, vault) = merged().await;
            lie(&vault, |_, _| true).await;
            assert!(verify::verify_vault(&vault).await.unwrap().is_clean(), "told as it is");
            lie(&vault, change).await;
            let report = verify::verify_vault(&vault).await.unwrap();
            let found = report.problems.iter().any(|p| p.cause.contains("what it says of block"));
            assert!(found, "{name}: {:?}", report.problems);
            assert!(report.damaged.iter().all(|d| d.object.kind == Kind::Map), "{name}");
        }
    });
}

#[test]
fn strangers_are_told() {
    runtime().block_on(async {
        let (store, vault) = merged().await;
        let dir = format!("machines/{}", machine());
        let names = ["segments/x.seg", "maps/y", "z", "manifest/1", "key/a"];
        for name in names {
            store.put(&format!("{dir}/{name}").into(), "x".into()).await.unwrap();
        }
        let report = verify::verify_vault(&vault).await.unwrap();
        assert!(report.is_clean());
        assert_eq!(report.strangers.len(), names.len(), "{:?}", report.strangers);
    });
}
