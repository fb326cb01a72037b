//! A store that fails, and collectors that die: at every call.

use super::support::*;
use crate::groups::{Decision, Group, PENDING_MAX, Report};
use crate::tests::support::{Faulty, When, memory, runtime};
use crate::{MachineState, Vault};
use highwater_delta::*;
use highwater_group::Marker;

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
