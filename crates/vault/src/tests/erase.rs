//! Erasing a machine: unreadable from then on, for everybody, and nothing else is touched.

use super::support::*;
use crate::{Clock, Hold, Vault, VaultError, erase, maintain, policy, verify};
use futures::TryStreamExt;
use highwater_delta::*;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use std::{sync::Arc, time::Duration};

fn other() -> MachineId {
    MachineId::from_bytes([2; 16])
}

async fn all(store: &Arc<dyn ObjectStore>, prefix: &str) -> Vec<(Path, bytes::Bytes)> {
    let dir = Path::from(prefix);
    let listed: Vec<_> = store.list((!prefix.is_empty()).then_some(&dir)).try_collect().await.unwrap();
    let mut objects = Vec::new();
    for meta in listed {
        let bytes = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
        objects.push((meta.location, bytes));
    }
    objects
}
fn place() -> String {
    format!("machines/{}", machine())
}

/// A vault with two machines, the first with two points.
async fn sample(store: &Arc<dyn ObjectStore>) -> (Vault, crate::VaultKey) {
    let (vault, key) = vault_on(store.clone()).await;
    vault.register_machine(other(), "db-1").await.unwrap();
    let mut writer = vault.writer(machine()).await.unwrap();
    deliver(&mut writer, 0, &[1, 2]).await.unwrap();
    deliver(&mut writer, 1, &[3]).await.unwrap();
    (vault, key)
}

#[test]
fn an_erased_machine_is_gone_whoever_holds_copies_of_its_data() {
    runtime().block_on(async {
        let store = memory();
        let (vault, key) = sample(&store).await;
        let copy = all(&store, &place()).await;
        let plan = erase::plan(&vault, machine()).await.unwrap();
        assert_eq!((plan.host_name.as_deref(), plan.points, plan.begun), (Some("web-1"), Some(2), false));
        assert_eq!(plan.objects, copy.len() as u64);
        let report = erase::erase(&vault, machine()).await.unwrap();
        assert_eq!((report.deleted, report.deleted_bytes, report.left), (plan.objects, plan.bytes, 0));
        assert!(all(&store, &place()).await.is_empty());

        let vault = Vault::open(store.clone(), &key).await.unwrap();
        assert_eq!(vault.machines().await.unwrap(), [other()]);
        assert_eq!(vault.erased_machines().await.unwrap(), [machine()]);
        // Everything but its key is brought back from a copy.
        for (path, bytes) in copy.iter().filter(|(path, _)| path.filename() != Some("key")) {
            store.put(path, bytes.clone().into()).await.unwrap();
        }
        assert!(matches!(vault.machine(machine()).await, Err(VaultError::Erased(_))));
        assert!(matches!(vault.writer(machine()).await, Err(VaultError::Erased(_))));
        assert!(matches!(vault.register_machine(machine(), "web-1").await, Err(VaultError::Erased(_))));
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
        // Again: what is there goes; then there is nothing to do.
        assert_eq!(erase::erase(&vault, machine()).await.unwrap().deleted, copy.len() as u64 - 1);
        assert_eq!(erase::erase(&vault, machine()).await.unwrap().deleted, 0);
        assert_eq!(vault.host_name(other()).await.unwrap(), "db-1");
        let nobody = MachineId::from_bytes([3; 16]);
        assert!(matches!(erase::erase(&vault, nobody).await, Err(VaultError::UnknownMachine(_))));
        assert!(!vault.is_erased(nobody).await.unwrap());
    });
}

#[test]
fn a_machine_that_must_be_kept_is_not_erased() {
    runtime().block_on(async {
        let store = memory();
        let (vault, _) = sample(&store).await;
        let before = all(&store, &place()).await.len();
        let hold = async |hold| {
            maintain::set_hold(&vault, machine(), CommitId(1), hold, "a court".to_owned()).await.unwrap();
        };
        hold(Some(Hold::Legal)).await;
        let refused = erase::erase(&vault, machine()).await.unwrap_err();
        assert!(refused.code() == 1234 && refused.to_string().contains("legal hold"), "{refused}");
        assert!(all(&store, &place()).await.len() > before && !vault.is_erased(machine()).await.unwrap());
        hold(None).await;
        hold(Some(Hold::Pin)).await;
        let strict = policy::Policy { immutable_for: Duration::from_secs(3600), ..policy::Policy::default() };
        policy::set_policy(&vault, Some(machine()), Some(strict), vault.now_ms()).await.unwrap();
        let refused = erase::plan(&vault, machine()).await.unwrap_err();
        assert!(refused.code() == 1234 && refused.to_string().contains("immutable"), "{refused}");
        let later = vault.now_ms() + 3_700_000;
        erase::may_erase(&vault, machine(), later).await.unwrap();
        assert!(erase::erase(&vault, machine()).await.is_err());
        vault.machine(machine()).await.unwrap();
    });
}

/// By a clock that runs ahead, nothing is immutable any more.
#[test]
fn a_machine_is_not_erased_by_a_wrong_clock_nor_after_a_hold_came_in_between() {
    runtime().block_on(async {
        let store = memory();
        let (vault, _) = sample(&store).await;
        let strict = policy::Policy { immutable_for: Duration::from_secs(3600), ..policy::Policy::default() };
        policy::set_policy(&vault, Some(machine()), Some(strict), vault.now_ms()).await.unwrap();
        let ahead = vault.clone().with_clock(Clock::new(|| Clock::default().now_ms() + 7_200_000));
        for refused in
            [erase::plan(&ahead, machine()).await.err(), erase::erase(&ahead, machine()).await.err()]
        {
            assert!(matches!(refused, Some(VaultError::Clock(7100..7300))), "{refused:?}");
        }
        // What was asked before allowed it.
        assert_eq!(erase::begin(&vault, machine()).await.unwrap_err().code(), 1234);
        assert!(!vault.is_erased(machine()).await.unwrap());
        vault.writer(machine()).await.unwrap();
    });
}

#[test]
fn what_a_session_still_stores_is_deleted_the_next_time() {
    runtime().block_on(async {
        let store = memory();
        let (vault, _) = sample(&store).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        erase::erase(&vault, machine()).await.unwrap();
        // It has the keys in its memory, and its session has not ended yet.
        let _ = deliver(&mut writer, 0, &[9]).await;
        assert!(!all(&store, &place()).await.is_empty());
        assert!(matches!(vault.machine(machine()).await, Err(VaultError::Erased(_))));
        erase::erase(&vault, machine()).await.unwrap();
        assert!(all(&store, &place()).await.is_empty());
    });
}

/// The n-th call fails: all is readable, or it is begun; and doing it again does the rest.
async fn one(n: u64, when: When) -> bool {
    let inner = memory();
    let (vault, key) = sample(&inner).await;
    let faulty = Faulty::new(inner.clone());
    let handle = Vault::open(faulty.clone(), &key).await.unwrap();
    faulty.fail_call(Some((n, when)));
    let outcome = erase::erase(&handle, machine()).await;
    let reached = faulty.calls() >= n;
    faulty.fail_call(None);
    let begun = vault.is_erased(machine()).await.unwrap();
    if outcome.is_ok() {
        assert!(begun && all(&inner, &place()).await.is_empty(), "call {n}");
    }
    if !begun {
        assert_eq!(vault.machine(machine()).await.unwrap().points.len(), 2, "call {n}");
        let read = read_all(&vault, disk(10), CommitId(2)).await.unwrap();
        assert_eq!(read[..2 * B], [content(1), content(3)].concat());
    } else {
        assert!(matches!(vault.writer(machine()).await, Err(VaultError::Erased(_))), "call {n}");
    }
    // The key goes before anything else does.
    let key_there = inner.head(&crate::store::key_path(machine())).await.is_ok();
    assert!(!key_there || vault.machine(machine()).await.is_ok(), "call {n}");
    erase::erase(&vault, machine()).await.unwrap();
    assert!(all(&inner, &place()).await.is_empty() && vault.is_erased(machine()).await.unwrap());
    assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    assert_eq!(vault.machines().await.unwrap(), [other()]);
    reached
}

#[test]
fn a_failure_of_any_call_is_made_good_by_doing_it_again() {
    runtime().block_on(async {
        for when in [When::Before, When::After] {
            let mut n = 1;
            while one(n, when).await {
                n += 1;
                assert!(n < 100);
            }
            assert!(n > 10, "only {n} calls were tried");
        }
    });
}
