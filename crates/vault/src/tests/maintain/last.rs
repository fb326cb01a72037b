//! What can still be read is not given up, and what is whole is not called damaged, whatever else cannot be read.

use super::*;
use crate::{
    recover::{Options, Target, recover_disk},
    runs::{Kind, Run},
    store::{manifest_path, object_path},
};

/// Blocks of the first disk that cannot be read, by point.
async fn lacking(model: &Model) -> BTreeMap<CommitId, u64> {
    // With caches of its own.
    let vault = Vault::open(model.faulty.clone(), &model.key).await.unwrap();
    let mut all = BTreeMap::new();
    for point in model.state().await.points {
        let map = vault.block_map(machine(), disk(10), point.id).await.unwrap();
        let mut rest = vec![0; BLOCKS as usize * B];
        let lacking = map.read_rest(BlockRange::new(0, BLOCKS), &mut rest).await.unwrap();
        all.insert(point.id, lacking.blocks.iter().map(|(from, to)| to - from).sum());
    }
    all
}

/// A history with merged runs beneath shortcuts.
async fn grown() -> Model {
    let mut model = Model::new().await;
    model.records_for = Duration::from_secs(360_000_000);
    for i in 0..40_u32 {
        let runs = vec![(0, u64::from(i * 7 % 60), (i * 9..i * 9 + 20).map(|v| v + 1).collect())];
        model.deliver(runs, (1, u64::from(i * 5 % 70), 3), true).await;
        model.clock.fetch_add(20 * MINUTE_MS, SeqCst);
        if i % 9 == 8 {
            assert!(!model.maintain(None).await);
        }
    }
    model
}

#[test]
fn what_only_a_shortcut_still_says_is_not_merged_away() {
    runtime().block_on(async {
        for nth in 0.. {
            let mut model = grown().await;
            let state = model.state().await;
            let is_under = |run: &&Run| {
                run.is_merged() && state.shortcuts.iter().any(|s| s.from <= run.from && run.to <= s.to)
            };
            let Some(run) = state.runs.iter().filter(is_under).nth(nth) else {
                assert!(nth > 2, "{nth} runs were lost in turn");
                break;
            };
            for map in run.objects() {
                let path = object_path(machine(), Kind::Map, map.id);
                model.vault.store().delete(&path).await.unwrap();
            }
            let before = lacking(&model).await;
            let settings = Settings { grace: Duration::ZERO, ..model.settings() };
            let mut told = 0;
            for _ in 0..8 {
                model.deliver(vec![(0, 90, vec![1])], (1, 0, 1), true).await;
                model.clock.fetch_add(60 * MINUTE_MS, SeqCst);
                told += u32::from(model.round(&settings).await.is_err());
            }
            for (point, lost) in lacking(&model).await {
                if let Some(was) = before.get(&point) {
                    assert!(lost <= *was, "run to {}, point {point}: {was} lacked, now {lost}", run.to);
                }
            }
            assert!(told > 0, "run to {}: nobody was told", run.to);
        }
    });
}

#[test]
fn what_was_merged_meanwhile_is_not_taken_for_damage() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        model.records_for = Duration::from_secs(36_000);
        for i in 0..30_u32 {
            model.deliver(vec![(0, u64::from(i * 3 % 80), vec![i + 1, 2, 3])], (1, 0, 1), true).await;
            model.clock.fetch_add(MINUTE_MS, SeqCst);
        }
        let old = model.state().await;
        let point = *model.points.keys().next_back().unwrap();
        // A recovery takes long: points expire, runs are merged, the trash is swept.
        let settings = Settings { grace: Duration::ZERO, ..model.settings() };
        model.clock.fetch_add(900 * MINUTE_MS, SeqCst);
        for _ in 0..3 {
            model.round(&settings).await.unwrap();
            model.clock.fetch_add(MINUTE_MS, SeqCst);
        }
        // And something is damaged that stayed where it was, so that not only what is gone meanwhile cannot be read.
        let newest = object_path(machine(), Kind::Segment, old.runs.last().unwrap().objects()[0].id);
        model.vault.store().put(&newest, vec![0; 5000].into()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let target = Target::File(dir.path().join("disk"));
        let options = Options { skip_damaged: true, ..Options::default() };
        let vault = Vault::open(model.faulty.clone(), &model.key).await.unwrap();
        let report =
            recover_disk(&vault, &old, disk(10), point, &target, options, Arc::new(())).await.unwrap();
        assert!(report.lacking.bytes <= 3 * B as u64, "{:?}", report.lacking);
    });
}

#[test]
fn a_number_far_away_keeps_verify_no_longer_than_others() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        model.pass(5).await;
        let path = manifest_path(machine(), u64::MAX);
        model.vault.store().put(&path, "x".into()).await.unwrap();
        let before = model.faulty.calls();
        let report = verify::verify_vault(&model.vault).await.unwrap();
        let calls = model.faulty.calls() - before;
        assert!(
            calls < 200 && (1..5).contains(&report.problems.len()),
            "{calls} calls, {:?}",
            report.problems
        );
    });
}

/// A store that does not answer says nothing of what it holds, in whatever words.
#[test]
fn an_outage_is_no_damage() {
    runtime().block_on(async {
        let model = grown().await;
        let point = *model.points.keys().next_back().unwrap();
        for n in 1.. {
            // With caches of its own.
            let vault = Vault::open(model.faulty.clone(), &model.key).await.unwrap();
            let map = vault.block_map(machine(), disk(10), point).await.unwrap();
            let mut rest = vec![0; BLOCKS as usize * B];
            model.faulty.fail_call(Some((n, When::Before)));
            let read = map.read_rest(BlockRange::new(0, BLOCKS), &mut rest).await;
            model.faulty.fail_call(None);
            match read {
                Err(VaultError::Store(_)) => {}
                Err(error) => panic!("call {n}: {error}"),
                Ok(lacking) => {
                    assert!(lacking.blocks.is_empty(), "call {n}: {lacking:?}");
                    assert!(n > 3, "{n} calls");
                    break;
                }
            }
        }
    });
}
