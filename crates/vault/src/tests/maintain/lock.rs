//! What the store has locked is enough to recover every immutable point, whoever deletes all else.

use super::*;
use crate::{
    Store,
    policy::Immutable,
    store::{ObjectLock, vault_path},
};
use futures::TryStreamExt;
use object_store::{ObjectStore, memory::InMemory, path::Path};
use std::{collections::HashMap, sync::Mutex};

const HOUR_MS: u64 = 60 * MINUTE_MS;
const PROMISED_MS: u64 = 6 * HOUR_MS;

/// Remembers locks, and refuses some.
#[derive(Debug, Default)]
struct Book {
    until_ms: Mutex<HashMap<Path, u64>>,
    asked: AtomicU64,
    /// The n-th that is asked for is refused.
    refuse: AtomicU64,
}

#[async_trait::async_trait]
impl ObjectLock for Book {
    async fn check(&self) -> Result<(), VaultError> {
        Ok(())
    }
    async fn retain(&self, path: &Path, until_ms: u64) -> Result<(), VaultError> {
        if self.asked.fetch_add(1, SeqCst) + 1 == self.refuse.load(SeqCst) {
            return Err(VaultError::NoObjectLock("a test".to_owned()));
        }
        let mut known = self.until_ms.lock().unwrap();
        let known = known.entry(path.clone()).or_default();
        *known = until_ms.max(*known);
        Ok(())
    }
}

async fn locking() -> (Model, Arc<Book>) {
    let mut model = Model::new().await;
    model.records_for = Duration::from_secs(3600);
    let book = Arc::new(Book::default());
    let store = Store::from(model.faulty.clone()).with_lock(book.clone());
    model.vault = timed(Vault::open(store, &model.key).await.unwrap(), &model.clock);
    (model, book)
}

fn rules() -> Rules {
    let keep_for = Duration::from_millis(PROMISED_MS);
    Rules {
        policy: policy(),
        immutable: vec![Immutable { since_ms: 0, until_ms: None, keep_for }],
        ..Rules::default()
    }
}

async fn round(model: &Model, settings: &Settings) -> Result<u64, VaultError> {
    let opened = Maintainer::open(&model.vault, machine(), settings.clone()).await;
    let report = opened.unwrap().filled(Full::TINY).run(&rules(), model.vault.now_ms(), &()).await?;
    Ok(report.locked)
}

/// The vault as it is once all has been deleted that can be at a moment.
async fn ruined(model: &Model, book: &Book, now_ms: u64) -> Vault {
    let (store, left) = (model.vault.store(), Arc::new(InMemory::new()));
    let locked: Vec<Path> = {
        let known = book.until_ms.lock().unwrap();
        known.iter().filter(|(_, until)| **until > now_ms).map(|(path, _)| path.clone()).collect()
    };
    assert!(locked.contains(&vault_path()));
    for path in locked {
        // Locked too late: it was merged away.
        if let Ok(got) = store.get(&path).await {
            left.put(&path, got.bytes().await.unwrap().into()).await.unwrap();
        }
    }
    timed(Vault::open(left as Arc<dyn ObjectStore>, &model.key).await.unwrap(), &model.clock)
}

/// Every point that was stored by then, and is immutable at a moment, reads back.
async fn check(model: &Model, book: &Book, stored_ms: u64, now_ms: u64) -> usize {
    let vault = ruined(model, book, now_ms).await;
    let known = model.state().await;
    let immutable = known.points.iter().filter(|point| {
        point.stored_at_ms <= stored_ms && rules().immutable_until_ms(point.stored_at_ms) > now_ms
    });
    let mut count = 0;
    for point in immutable {
        for d in &model.points[&point.id].1 {
            let read = read_all(&vault, disk(10 + d), point.id).await.unwrap();
            model.check(*d, point.id, &read);
        }
        count += 1;
    }
    count
}

#[test]
fn what_is_locked_is_enough() {
    runtime().block_on(async {
        let (mut model, book) = locking().await;
        let settings = Settings { grace: Duration::ZERO, ..model.settings() };
        let (mut idle, mut locked) = (0, 0);
        // Old content, which all points need.
        model.deliver(vec![(1, 5, (1..30).collect())], (1, 0, 1), true).await;
        for _ in 0..24 {
            model.pass(5).await;
            let (now, before) = (model.vault.now_ms(), book.asked.load(SeqCst));
            let told = round(&model, &settings).await.unwrap();
            assert_eq!(told, book.asked.load(SeqCst) - before);
            locked += told;
            assert!(check(&model, &book, now, now).await > 5);
            // Nobody maintains it any more.
            check(&model, &book, now, now + PROMISED_MS / 2).await;
            check(&model, &book, now, now + PROMISED_MS - HOUR_MS).await;
            idle += round(&model, &settings).await.unwrap();
        }
        let objects = book.until_ms.lock().unwrap().len() as u64;
        println!("{locked} locks of {objects} objects, {idle} in rounds after which there was nothing new");
        // Once more by somebody who knows of none, and from then on no more.
        let stranger = Settings { grace: Duration::ZERO, ..model.settings() };
        let anew = round(&model, &stranger).await.unwrap();
        assert!(anew > 20 && round(&model, &stranger).await.unwrap() == 0);
        // All trash of a store that deletes nothing stays in its books: what is locked is what there was.
        let listed: Vec<_> = model.vault.store().list(None).try_collect().await.unwrap();
        assert!(listed.len() < objects as usize);
        // Points that are promised no more are not locked.
        model.clock.fetch_add(PROMISED_MS + HOUR_MS, SeqCst);
        assert_eq!(round(&model, &settings).await.unwrap(), 0);
    });
}

#[test]
fn a_lock_that_is_refused_is_told_and_tried_again() {
    runtime().block_on(async {
        let (mut model, book) = locking().await;
        let settings = Settings { grace: Duration::ZERO, ..model.settings() };
        model.pass(5).await;
        book.refuse.store(4, SeqCst);
        assert_eq!(round(&model, &settings).await.unwrap_err().code(), 1244);
        // All others were locked, and now it is.
        assert_eq!(round(&model, &settings).await.unwrap(), 1);
        let now = model.vault.now_ms();
        assert_eq!(check(&model, &book, now, now).await, 5);
    });
}

#[test]
fn a_damaged_map_keeps_nothing_else_from_being_locked() {
    runtime().block_on(async {
        let (mut model, book) = locking().await;
        let settings = Settings { grace: Duration::ZERO, ..model.settings() };
        for _ in 0..6 {
            model.pass(5).await;
            round(&model, &settings).await.unwrap();
        }
        let state = model.state().await;
        let map = state.runs.iter().find(|run| run.is_merged()).unwrap().objects()[0].id;
        let path = crate::store::object_path(machine(), crate::Kind::Map, map);
        model.vault.store().delete(&path).await.unwrap();
        model.pass(2).await;
        // By somebody who knows of nothing that is locked.
        let stranger = Settings { grace: Duration::ZERO, ..model.settings() };
        assert!(round(&model, &stranger).await.unwrap_err().is_damage());
        let newest = model.state().await.runs.last().unwrap().objects()[0].id;
        let newest = crate::store::object_path(machine(), crate::Kind::Segment, newest);
        assert!(book.until_ms.lock().unwrap().contains_key(&newest));
    });
}
