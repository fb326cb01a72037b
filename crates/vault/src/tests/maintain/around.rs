//! What cannot be read, or not be deleted, keeps nothing else from being maintained.

use super::*;
use crate::runs::Kind;
use highwater_faults::Keeps;

impl Model {
    pub(super) async fn round(&self, settings: &Settings) -> Result<crate::maintain::Report, VaultError> {
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let opened = Maintainer::open(&self.vault, machine(), settings.clone()).await;
        opened.unwrap().filled(Full::TINY).run(&rules, self.vault.now_ms(), &()).await
    }
}

#[test]
fn damage_keeps_nothing_else_from_being_merged() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        model.records_for = Duration::from_secs(3600);
        model.pass(50).await;
        let damaged = model.state().await.runs[20].objects()[0].id;
        let path = crate::store::object_path(machine(), Kind::Segment, damaged);
        model.vault.store().delete(&path).await.unwrap();
        let settings = Settings { grace: Duration::ZERO, ..model.settings() };
        let error = model.round(&settings).await.unwrap_err();
        assert_eq!(error.code(), 1207, "{error}");
        let runs = model.state().await.runs.len();
        assert!(runs < 30, "{runs} runs");
        // Once it is known where it is it is not tried again, and all that comes later is merged as ever.
        for _ in 0..12 {
            model.pass(20).await;
            model.round(&settings).await.unwrap();
        }
        let state = model.state().await;
        assert!(state.runs.len() < 30, "{} runs", state.runs.len());
        assert!(state.runs.iter().any(|run| run.objects().iter().any(|object| object.id == damaged)));
        // By another process it is.
        let anew = Settings { grace: Duration::ZERO, ..model.settings() };
        model.pass(20).await;
        assert_eq!(model.round(&anew).await.unwrap_err().code(), 1207);
        let report = verify::verify_vault(&model.vault).await.unwrap();
        assert_eq!(report.orphans, Vec::<String>::new());
        let of_it = |problem: &verify::Problem| problem.cause.contains(&damaged.to_string());
        assert!(report.problems.iter().all(of_it), "{:?}", report.problems);
        // Every point that has nothing of it is whole.
        for point in model.state().await.points.iter().rev().take(5) {
            let read = read_all(&model.vault, disk(10), point.id).await.unwrap();
            model.check(0, point.id, &read);
        }
    });
}

#[test]
fn what_cannot_be_deleted_keeps_nothing_from_being_merged() {
    for keeps in [Keeps::Denied, Keeps::InWords, Keeps::Failing] {
        runtime().block_on(async {
            let mut model = Model::new().await;
            model.records_for = Duration::from_secs(3600);
            let settings = Settings { grace: Duration::ZERO, ..model.settings() };
            model.pass(40).await;
            model.round(&settings).await.unwrap();
            assert!(!model.state().await.trash.is_empty());
            model.faulty.keeps(Some(keeps));
            model.pass(40).await;
            let before = model.state().await;
            let done = model.round(&settings).await;
            let after = model.state().await;
            assert!(after.points.len() < before.points.len() && after.runs.len() < before.runs.len());
            match done {
                Ok(report) => assert!(report.kept_by_store > 0 && keeps != Keeps::Failing, "{report:?}"),
                Err(error) => assert!(keeps == Keeps::Failing, "{error}"),
            }
            // A machine whose last delta was cut off goes on all the same.
            model.writer.begin(DeltaId::new()).await.unwrap();
            let hash = model.writer.hash_key();
            model.writer.push(chunk(disk(10), 0, &[1], &hash)).await.unwrap();
            model.writer.finish_segment_for_test().await;
            model.writer = model.vault.writer(machine()).await.unwrap();
            model.pass(1).await;
            model.faulty.keeps(None);
            model.round(&Settings { grace: Duration::ZERO, ..model.settings() }).await.unwrap();
            model.finish_with_orphans(1).await;
        });
    }
}
