//! Random sequences of changes to a vault's keys, by two operators, against a model: which passphrases open it.

use super::{
    keys::{create, documents, open, phrase},
    support::*,
};
use crate::{KeyRing, VaultError, keys::WrappingId};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Step {
    Add(u8),
    Remove(u8),
    Rotate(u8, u8),
    /// The operator looks anew.
    Open(u8),
}

fn step() -> impl Strategy<Value = (bool, Step)> {
    let one = prop_oneof![
        3 => (0..6_u8).prop_map(Step::Add),
        2 => any::<u8>().prop_map(Step::Remove),
        2 => (any::<u8>(), 0..6_u8).prop_map(|(which, new)| Step::Rotate(which, new)),
        2 => any::<u8>().prop_map(Step::Open),
    ];
    (any::<bool>(), one)
}
fn text(n: u8) -> String {
    format!("passphrase number {n}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn keys_are_as_the_model_says(steps in proptest::collection::vec(step(), 1..25)) {
        runtime().block_on(async {
            let store = memory();
            let first = create(&store, &phrase(&text(0))).await;
            // What opens the vault, and how often it was changed.
            let mut model: BTreeMap<WrappingId, u8> = BTreeMap::from([(first.wrappings()[0].id, 0)]);
            let mut number = 1;
            let second = open(&store, &phrase(&text(0))).await.unwrap();
            let mut operators: [KeyRing; 2] = [first, second];
            for (who, step) in steps {
                let ring = &mut operators[usize::from(who)];
                let stale = ring.number() != number;
                let seen: Vec<WrappingId> = ring.wrappings().iter().map(|w| w.id).collect();
                let chosen = |which: u8| seen[usize::from(which) % seen.len()];
                let outcome = match &step {
                    Step::Add(new) => ring.add(&phrase(&text(*new)), "").await.map(|id| { model.insert(id, *new); }),
                    Step::Remove(which) => {
                        let id = chosen(*which);
                        let was = model.contains_key(&id);
                        let done = ring.remove(id).await;
                        if done.is_ok() && was {
                            model.remove(&id);
                        }
                        // It was gone already: nothing was written, and nobody is told of it.
                        if done.is_ok() && !was {
                            number -= 1;
                        }
                        done
                    }
                    Step::Rotate(which, new) => {
                        let id = chosen(*which);
                        ring.rotate(id, &phrase(&text(*new))).await.map(|fresh| {
                            model.remove(&id);
                            model.insert(fresh, *new);
                        })
                    }
                    Step::Open(which) => {
                        let good: Vec<u8> = model.values().copied().collect();
                        *ring = open(&store, &phrase(&text(good[usize::from(*which) % good.len()]))).await.unwrap();
                        number -= 1;
                        Ok(())
                    }
                };
                match outcome {
                    Ok(()) => number += 1,
                    Err(VaultError::KeysChanged) => assert!(stale, "{step:?}"),
                    Err(VaultError::SameSecret(by)) => assert!(seen.contains(&by), "{step:?}"),
                    Err(VaultError::LastWrapping) => assert_eq!(seen.len(), 1),
                    Err(VaultError::Limit(_)) => assert_eq!(seen.len(), 8),
                    Err(error) => panic!("{step:?}: {error}"),
                }
                assert_eq!(documents(&store).await, [format!("keys/{number:020}")], "{step:?}");
            }
            for n in 0..6 {
                let opens = open(&store, &phrase(&text(n))).await;
                assert_eq!(opens.is_ok(), model.values().any(|there| *there == n), "{n}");
            }
            let newest = open(&store, &phrase(&text(*model.values().next().unwrap()))).await.unwrap();
            let there: Vec<WrappingId> = newest.wrappings().iter().map(|w| w.id).collect();
            let mut sorted = there.clone();
            sorted.sort();
            assert_eq!(sorted, model.keys().copied().collect::<Vec<_>>());
        });
    }
}
