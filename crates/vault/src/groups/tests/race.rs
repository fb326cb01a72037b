//! Several collectors at once.

use super::support::*;
use crate::VaultError;
use crate::groups::{Decision, Group, Outcome, Times};
use crate::tests::support::{Faulty, SLOW, memory, runtime};
use highwater_delta::*;

#[test]
fn whoever_races_for_a_machine_or_a_name_one_gets_it() {
    runtime().block_on(async {
        let site = Site::new(6).await;
        let mut tasks = Vec::new();
        for n in 1..=5 {
            let vault = site.another().await;
            // All want machine 6, two of each the same name.
            let group = Group::new(&format!("g{}", n % 3), vec![machine(n), machine(6)], Times::default());
            tasks.push(tokio::spawn(async move { vault.change_groups(|_| Ok(group.clone())).await }));
        }
        let mut made = Vec::new();
        for task in tasks {
            match task.await.unwrap() {
                Ok(group) => made.push(group),
                Err(error) => assert!(matches!(error, VaultError::Group(_)), "{error}"),
            }
        }
        assert_eq!(made.len(), 1);
        let groups = site.another().await.groups().await.unwrap();
        assert_eq!(groups.living(), [&made[0]]);
    });
}

/// A contradicting document, as no release of this program makes one: the older claim holds, for everybody.
#[test]
fn the_older_claim_holds() {
    runtime().block_on(async {
        let site = Site::new(2).await;
        let first = site.group("one", &[1]).await;
        let second = Group { epoch: 1, ..Group::new("two", vec![machine(1), machine(2)], Times::default()) };
        site.vault.control_create("groups/00000002", &serde_json::to_vec(&second).unwrap()).await.unwrap();
        for vault in [&site.vault, &site.another().await] {
            assert_eq!(vault.groups().await.unwrap().living(), [&first]);
        }
        assert_eq!(site.group("two", &[2]).await.epoch, 1);
    });
}

#[test]
fn reports_and_withdrawals_that_race_lead_to_one_decision() {
    runtime().block_on(async {
        let site = Site::new(3).await;
        let group = site.group("shop", &[1, 2, 3]).await;
        let (mut complete, mut revoked) = (0, 0);
        for round in 1..=60 {
            let marker = marker(1, round);
            let mut tasks = Vec::new();
            for n in 1..=3 {
                let commit = site.point(n, Consistency::Filesystem).await;
                let vault = site.another().await;
                let state = vault.machine(machine(n)).await.unwrap();
                let report = report(&group, marker, commit);
                let group = group.id;
                tasks.push(tokio::spawn(async move {
                    // One of three takes back what it said, sometimes at the same time.
                    if n == 3 && round % 2 == 0 {
                        let other = vault.clone();
                        let withdrawn = tokio::spawn(async move {
                            for _ in 0..round / 4 {
                                tokio::task::yield_now().await;
                            }
                            other.withdraw_marker(machine(3), group, marker).await.unwrap()
                        });
                        for _ in 0..60 - round {
                            tokio::task::yield_now().await;
                        }
                        return (vault.keep_marker(&state, report).await, withdrawn.await.unwrap());
                    }
                    (vault.keep_marker(&state, report).await, false)
                }));
            }
            let (mut made, mut withdrawn) = (Vec::new(), false);
            for task in tasks {
                let (kept, took) = task.await.unwrap();
                withdrawn |= took;
                match kept {
                    Ok(Outcome::Made(done)) => made.push(done),
                    Ok(_) | Err(VaultError::Marker { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            let swept = site.vault.sweep_groups().await.unwrap();
            assert!(swept.revoked.is_empty() && made.len() + swept.made.len() + usize::from(withdrawn) == 1);
            for vault in [&site.vault, &site.another().await] {
                match vault.decision(group.id, marker).await.unwrap().unwrap() {
                    Decision::Complete(done) => {
                        assert!(!withdrawn && (made.is_empty() || made == [done]));
                        complete += 1;
                    }
                    Decision::Revoked(by) => {
                        assert_eq!((withdrawn, by.by), (true, Some(machine(3))));
                        revoked += 1;
                    }
                }
            }
        }
        assert!(complete >= 60 && revoked > 0, "{complete} {revoked}");
        assert!(site.vault.control_list("group-kept").await.unwrap().is_empty());
    });
}

/// The reports of all are read, and a member withdraws before that is written.
#[test]
fn whoever_decides_second_decides_nothing() {
    runtime().block_on(async {
        let faulty = Faulty::new(memory());
        let site = Site::on(faulty.clone(), 2).await;
        let group = site.group("shop", &[1, 2]).await;
        let marker = marker(1, 1);
        let mut reports = Vec::new();
        for n in [1, 2] {
            let commit = site.point(n, Consistency::Filesystem).await;
            let state = site.vault.machine(machine(n)).await.unwrap();
            reports.push((state, report(&group, marker, commit)));
        }
        site.vault.keep_marker(&reports[0].0, reports[0].1).await.unwrap();
        faulty.slow_puts(true);
        let (keeps, withdraws) = (site.another().await, site.another().await);
        withdraws.groups().await.unwrap();
        let (kept, withdrawn) = tokio::join!(keeps.keep_marker(&reports[1].0, reports[1].1), async {
            // Its report is there after the first put, and the decision after the second.
            tokio::time::sleep(SLOW / 2).await;
            withdraws.withdraw_marker(machine(1), group.id, marker).await
        });
        faulty.slow_puts(false);
        assert_eq!((kept.unwrap(), withdrawn.unwrap()), (Outcome::Known, true));
        let decision = site.another().await.decision(group.id, marker).await.unwrap();
        assert!(matches!(decision, Some(Decision::Revoked(_))), "{decision:?}");
    });
}
