//! A store that fails, and collectors that die: at every call.

use super::support::*;
use crate::groups::{Decision, Group, PENDING_MAX, Report, decide};
use crate::tests::support::{Faulty, When, memory, runtime};
use crate::{MachineState, Vault};
use highwater_delta::*;
use highwater_group::Marker;
use object_store::ObjectStoreExt;

struct Place {
    site: Site,
    faulty: std::sync::Arc<Faulty>,
    group: Group,
    marker: Marker,
    reports: Vec<(MachineState, Report)>,
}

/// Two members with points; nothing is reported yet.
async fn place() -> Place {
    let faulty = Faulty::new(memory());
    let site = Site::on(faulty.clone(), 2).await;
    let group = site.group("shop", &[1, 2]).await;
    let marker = marker(2, 1);
    let mut reports = Vec::new();
    for n in [1, 2] {
        let commit = site.point(n, Consistency::Filesystem).await;
        let state = site.vault.machine(machine(n)).await.unwrap();
        reports.push((state, report(&group, marker, commit)));
    }
    Place { site, faulty, group, marker, reports }
}

/// The machines whose reports are in the vault.
async fn reported(vault: &Vault) -> usize {
    vault.control_list("group-kept").await.unwrap().len()
}

async fn decision(place: &Place) -> Option<Decision> {
    place.site.another().await.decision(place.group.id, place.marker).await.unwrap()
}

/// All reports are made, one call fails, and whoever made it is not seen again. What then is in the vault is finished by the next.
#[test]
fn a_crash_between_any_two_steps_is_made_good_by_a_sweep() {
    runtime().block_on(async {
        for when in [When::Before, When::After] {
            for n in 1.. {
                let place = place().await;
                let vault = place.site.another().await;
                place.faulty.fail_call(Some((n, when)));
                let (mut ended, mut said) = (true, 0);
                for (state, report) in &place.reports {
                    if vault.keep_marker(state, *report).await.is_err() {
                        ended = false;
                        break;
                    }
                    said += 1;
                }
                place.faulty.fail_call(None);
                let before = decision(&place).await;
                let there = reported(&place.site.vault).await;
                if let Some(Decision::Complete(done)) = &before {
                    assert_eq!(done.members.len(), 2);
                } else {
                    assert!(there >= said, "a report that was taken is there");
                }
                let next = place.site.another().await;
                next.sweep_groups().await.unwrap();
                let after = decision(&place).await;
                match (&before, there) {
                    (Some(_), _) => assert_eq!(after, before),
                    (None, 2) => assert!(matches!(after, Some(Decision::Complete(_))), "call {n}, {when:?}"),
                    (None, _) => assert_eq!(after, None, "nobody decides without all reports"),
                }
                place.site.later(PENDING_MAX.as_millis() as u64 + 60_000);
                next.sweep_groups().await.unwrap();
                match decision(&place).await {
                    Some(Decision::Complete(_)) => assert!(after.is_some()),
                    Some(Decision::Revoked(_)) => assert!(after.is_none() && there > 0),
                    None => assert!(before.is_none() && there == 0),
                }
                assert_eq!(reported(&place.site.vault).await, 0);
                if ended {
                    assert!(n > 8, "{n}");
                    break;
                }
            }
        }
    });
}

/// One call fails, and what failed is said again.
#[test]
fn a_report_that_failed_can_be_said_again() {
    runtime().block_on(async {
        for when in [When::Before, When::After] {
            let mut n = 0;
            loop {
                n += 1;
                let place = place().await;
                let vault = place.site.another().await;
                place.faulty.fail_call(Some((n, when)));
                let mut failed = 0;
                for (state, report) in &place.reports {
                    while vault.keep_marker(state, *report).await.is_err() {
                        failed += 1;
                        assert!(failed < 9);
                    }
                }
                place.faulty.fail_call(None);
                let Some(Decision::Complete(done)) = decision(&place).await else { panic!("{n}") };
                assert_eq!(done.members.len(), 2);
                vault.sweep_groups().await.unwrap();
                assert_eq!(reported(&place.site.vault).await, 0);
                if failed == 0 {
                    break;
                }
            }
        }
    });
}

/// One member never says so: whatever fails, the marker is no point.
#[test]
fn without_all_reports_there_is_no_point_whatever_fails() {
    runtime().block_on(async {
        for when in [When::Before, When::After] {
            for n in 1.. {
                let place = place().await;
                let vault = place.site.another().await;
                place.faulty.fail_call(Some((n, when)));
                let (state, report) = &place.reports[0];
                let mut failed = vault.keep_marker(state, *report).await.is_err();
                failed |= vault.sweep_groups().await.is_err();
                failed |= vault.withdraw_marker(machine(2), place.group.id, place.marker).await.is_err();
                failed |= vault.sweep_groups().await.is_err();
                place.faulty.fail_call(None);
                let decided = decision(&place).await;
                assert!(!matches!(decided, Some(Decision::Complete(_))), "call {n}, {when:?}");
                if !failed {
                    assert!(matches!(decided, Some(Decision::Revoked(_))));
                    break;
                }
            }
        }
    });
}

/// One machine's address cannot be read: the others' can, and its own when it has said it again.
#[test]
fn a_damaged_address_is_none() {
    runtime().block_on(async {
        let site = Site::new(2).await;
        for n in [1, 2] {
            site.vault.set_group_address(machine(n), &format!("host-{n}:20004")).await.unwrap();
        }
        damage(&site, &site.vault.control_list(&format!("group-addresses/{}", machine(1))).await.unwrap()[0])
            .await;
        let vault = site.another().await;
        let known = vault.group_addresses().await.unwrap();
        assert_eq!(known, [(machine(2), "host-2:20004".to_owned())].into());
        vault.set_group_address(machine(1), "host-1:20004").await.unwrap();
        assert_eq!(vault.group_addresses().await.unwrap().len(), 2);
    });
}

/// Overwrites a document with something that cannot be read.
async fn damage(site: &Site, name: &str) {
    let path = object_store::path::Path::from(format!("control/{name}"));
    assert!(site.store.head(&path).await.is_ok(), "{name} is not there");
    site.store.put(&path, vec![7; 100].into()).await.unwrap();
}

#[test]
fn a_damaged_document_stops_nothing_but_what_it_says() {
    runtime().block_on(async {
        let site = Site::new(2).await;
        let group = site.group("shop", &[1, 2]).await;
        let first = site.made(&group, &[1, 2], 1).await;
        let name = crate::groups::cache::decision_name(group.id, first);
        damage(&site, &name).await;
        let site = Site { vault: site.another().await, ..site };
        let second = site.made(&group, &[1, 2], 2).await;
        let points = async || {
            let points = site.another().await.group_points(group.id).await.unwrap();
            points.iter().map(|point| point.marker).collect::<Vec<_>>()
        };
        assert_eq!(points().await, [second]);
        let health = site.vault.group_health(group.id).await.unwrap();
        assert!(health.newest_ms.is_some() && health.damaged.len() == 1, "{health:?}");
        site.vault.tidy_groups().await.unwrap();
        // Its points are not let go.
        assert!(crate::groups::Shared::load(&site.vault, machine(1)).await.unwrap_err().is_damage());

        // Of the damaged one itself nothing is decided again.
        let commit = site.point(1, Consistency::Filesystem).await;
        let state = site.vault.machine(machine(1)).await.unwrap();
        let error = site.vault.keep_marker(&state, report(&group, first, commit)).await.unwrap_err();
        assert!(matches!(error, crate::VaultError::Marker { .. }), "{error}");
        assert!(!site.vault.withdraw_marker(machine(1), group.id, first).await.unwrap());
        assert!(site.vault.decision(group.id, first).await.unwrap_err().is_damage());

        // One of a decision that is damaged, one that is damaged itself, and one that is not.
        let left = decide::report_name(group.id, first, machine(1));
        site.vault.control_create(&left, b"{}").await.unwrap();
        for n in [3, 4] {
            site.vault.keep_marker(&state, report(&group, marker(1, n), commit)).await.unwrap();
        }
        damage(&site, &decide::report_name(group.id, marker(1, 3), machine(1))).await;
        let pending = site.vault.group_pending(group.id).await.unwrap();
        assert_eq!(pending.iter().map(|p| p.marker).collect::<Vec<_>>(), [marker(1, 4)]);
        let swept = site.vault.sweep_groups().await.unwrap();
        assert_eq!((swept.damaged.len(), swept.made.len(), swept.revoked.len()), (2, 0, 0), "{swept:?}");
        site.later(PENDING_MAX.as_millis() as u64 + 60_000);
        let swept = site.another().await.sweep_groups().await.unwrap();
        assert_eq!(swept.revoked, [(group.id, marker(1, 3)), (group.id, marker(1, 4))]);
        assert_eq!(site.vault.control_list("group-kept").await.unwrap(), [left]);
        assert!(site.vault.decision(group.id, first).await.unwrap_err().is_damage());
    });
}
