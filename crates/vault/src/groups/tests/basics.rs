//! The rules, one by one.

use super::support::*;
use crate::groups::{Decision, Group, Groups, Outcome, PENDING_MAX, Times};
use crate::{VaultError, tests::support::runtime};
use highwater_delta::*;
use std::collections::HashSet;

#[test]
fn a_marker_that_all_keep_is_a_point_of_the_group() {
    runtime().block_on(async {
        let site = Site::new(3).await;
        let group = site.group("shop", &[2, 1]).await;
        assert_eq!((group.epoch, &group.members[..]), (1, &[machine(1), machine(2)][..]));
        let marker = marker(1, 1);
        let commits =
            [site.point(1, Consistency::Application).await, site.point(2, Consistency::Filesystem).await];
        let first = site.vault.machine(machine(1)).await.unwrap();
        let outcome = site.vault.keep_marker(&first, report(&group, marker, commits[0])).await.unwrap();
        assert_eq!(outcome, Outcome::Waiting(1));
        assert!(site.vault.group_points(group.id).await.unwrap().is_empty());
        let pending = site.vault.group_pending(group.id).await.unwrap();
        assert_eq!((pending[0].marker, &pending[0].missing[..]), (marker, &[machine(2)][..]));
        site.later(5000);
        let second = site.another().await;
        let state = second.machine(machine(2)).await.unwrap();
        let outcome = second.keep_marker(&state, report(&group, marker, commits[1])).await.unwrap();
        let Outcome::Made(done) = outcome else { panic!("{outcome:?}") };
        assert_eq!(done.consistency, Consistency::Filesystem);
        for vault in [&site.vault, &second] {
            let points = vault.group_points(group.id).await.unwrap();
            assert_eq!((points.len(), points[0].marker, &points[0].done), (1, marker, &done));
            assert_eq!(points[0].done.commit_of(machine(2)), Some(commits[1]));
        }
        assert!(site.vault.control_list("group-kept").await.unwrap().is_empty());
        // Said again, it changes nothing.
        let outcome = site.vault.keep_marker(&first, report(&group, marker, commits[0])).await.unwrap();
        assert_eq!(outcome, Outcome::Known);
        assert!(!site.vault.withdraw_marker(machine(2), group.id, marker).await.unwrap());
        assert_eq!(site.vault.group_points(group.id).await.unwrap().len(), 1);
        let _ = (HashSet::<u8>::new(), PENDING_MAX, Groups::default(), Times::default());
        let _ = |group: Group, error: VaultError, decision: Decision| (group, error, decision);
    });
}
