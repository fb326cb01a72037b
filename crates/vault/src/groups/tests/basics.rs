//! The rules, one by one.

use super::support::*;
use crate::groups::{
    Answer, Complete, Decision, Group, Of, Outcome, PENDING_MAX, PENDING_OF_MACHINE_MAX, Report, Times, keep,
};
use crate::{VaultError, erase, tests::support::runtime};
use bytes::Bytes;
use futures::TryStreamExt;
use highwater_delta::*;
use highwater_group::Kind;
use object_store::{ObjectStoreExt, path::Path};
use std::time::Duration;

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
            assert_eq!(points[0].done.part_of(machine(2)).map(|part| part.commit), Some(commits[1]));
        }
        assert!(site.vault.control_list("group-kept").await.unwrap().is_empty());
        // Said again, it changes nothing.
        let outcome = site.vault.keep_marker(&first, report(&group, marker, commits[0])).await.unwrap();
        assert_eq!(outcome, Outcome::Known);
        assert!(!site.vault.withdraw_marker(machine(2), group.id, marker).await.unwrap());
        assert_eq!(site.vault.group_points(group.id).await.unwrap().len(), 1);
    });
}

/// One member without an application to ask does not make it less; of none that has one it is no more than filesystem-consistent.
#[test]
fn a_point_is_application_consistent_if_some_application_stood_still() {
    use Consistency::{Application, Crash, Filesystem};
    runtime().block_on(async {
        let site = Site::new(2).await;
        let group = site.group("shop", &[1, 2]).await;
        let cases = [
            (Application, Filesystem, Application),
            (Filesystem, Filesystem, Filesystem),
            (Application, Crash, Crash),
            (Application, Application, Application),
        ];
        for (n, (first, second, expected)) in (1..).zip(cases) {
            for (member, consistency) in [(1, first), (2, second)] {
                let commit = site.point(member, consistency).await;
                let state = site.vault.machine(machine(member)).await.unwrap();
                let report = Report { kind: Kind::Application, ..report(&group, marker(1, n), commit) };
                site.vault.keep_marker(&state, report).await.unwrap();
            }
            let points = site.vault.group_points(group.id).await.unwrap();
            let made = points.iter().find(|point| point.marker == marker(1, n)).unwrap();
            assert_eq!(made.done.consistency, expected, "{first:?} and {second:?}");
        }
    });
}

#[test]
fn definitions_have_one_order_and_contradict_none_before() {
    runtime().block_on(async {
        let site = Site::new(4).await;
        let shop = site.group("shop", &[1, 2]).await;
        let refused = async |group: Group| {
            let error = site.vault.change_groups(|_| Ok(group.clone())).await.unwrap_err();
            assert!(matches!(error, VaultError::Group(_)), "{error}");
        };
        let times = Times::default();
        let new = |name: &str, members: &[u8]| {
            Group::new(name, members.iter().map(|n| machine(*n)).collect(), times)
        };
        refused(new("shop", &[3])).await;
        refused(new("other", &[2, 3])).await;
        refused(new("other", &[])).await;
        refused(new("other", &[3, 3])).await;
        refused(Group { members: (0..257).map(|_| MachineId::new()).collect(), ..new("other", &[]) }).await;
        for name in ["", " a", "a ", "a\nb", "a\u{202e}b", &"n".repeat(65), &GroupId::new().to_string()] {
            refused(new(name, &[3])).await;
        }
        let at = |times| Group { times, ..new("other", &[3]) };
        refused(at(Times { hold_max: Duration::from_secs(61), ..times })).await;
        refused(at(Times { hold_max: Duration::ZERO, ..times })).await;
        refused(at(Times { crash_every: Some(Duration::from_millis(999)), ..times })).await;
        refused(at(Times { prepare_max: Duration::ZERO, ..times })).await;
        let stranger = site.vault.change_groups(|_| Ok(new("other", &[9]))).await.unwrap_err();
        assert!(matches!(stranger, VaultError::UnknownMachine(_)));

        // The epoch is that of the members.
        let change = async |group: Group| site.vault.change_groups(|_| Ok(group.clone())).await.unwrap();
        let slower = change(Group { times: Times { crash_every: None, ..times }, ..shop.clone() }).await;
        assert_eq!(slower.epoch, 1);
        assert_eq!(change(slower.clone()).await, slower, "nothing is written for nothing");
        assert_eq!(site.vault.control_list("groups").await.unwrap().len(), 2);
        let more = change(Group { members: [3, 1, 2].map(machine).to_vec(), ..slower }).await;
        assert_eq!((more.epoch, &more.members[..]), (2, &[1, 2, 3].map(machine)[..]));
        let gone = change(Group { deleted: true, ..more.clone() }).await;
        assert!(gone.epoch == 3 && gone.deleted);
        refused(Group { deleted: false, ..gone }).await;
        let again = site.group("shop", &[2]).await;
        let groups = site.another().await.groups().await.unwrap();
        assert_eq!(groups.living(), [&again]);
        assert_eq!(groups.membership(shop.id, 1).unwrap(), [1, 2].map(machine));
        assert_eq!(groups.membership(shop.id, 2).unwrap(), [1, 2, 3].map(machine));
        assert_eq!(groups.membership(shop.id, 3), None);
        assert_eq!(groups.of_machine(machine(2)), Some(&again));
        assert_eq!(groups.of_machine(machine(1)), None);
        assert_eq!(groups.ever_of(machine(2)).len(), 2);
        assert_eq!(groups, site.vault.groups().await.unwrap());
    });
}

#[test]
fn reports_that_cannot_be_so_are_refused() {
    runtime().block_on(async {
        let site = Site::new(3).await;
        let group = site.group("shop", &[1, 2]).await;
        let other = site.group("other", &[3]).await;
        let commit = site.point(1, Consistency::Filesystem).await;
        let old = site.point(3, Consistency::Filesystem).await;
        let state = site.vault.machine(machine(1)).await.unwrap();
        let stranger = site.vault.machine(machine(3)).await.unwrap();
        let good = report(&group, marker(1, 1), commit);
        let refused = async |state, report| {
            let error = site.vault.keep_marker(state, report).await.unwrap_err();
            assert!(matches!(error, VaultError::Marker { .. }), "{error}");
        };
        refused(&stranger, Report { commit: old, ..good }).await;
        refused(&state, Report { group: other.id, ..good }).await;
        refused(&state, Report { group: GroupId::new(), ..good }).await;
        refused(&state, Report { epoch: 2, ..good }).await;
        refused(&state, Report { commit: CommitId(99), ..good }).await;
        refused(&state, Report { marker: marker(3, 1), ..good }).await;
        assert_eq!(site.vault.control_list("group-kept").await.unwrap(), [""; 0]);

        site.vault.keep_marker(&state, good).await.unwrap();
        let next = site.point(1, Consistency::Filesystem).await;
        let state = site.vault.machine(machine(1)).await.unwrap();
        refused(&state, Report { commit: next, ..good }).await;
        let commit = site.point(2, Consistency::Filesystem).await;
        let second = site.vault.machine(machine(2)).await.unwrap();
        refused(&second, Report { kind: Kind::Application, commit, ..good }).await;
        let error = site.vault.withdraw_marker(machine(3), group.id, good.marker).await.unwrap_err();
        assert!(matches!(error, VaultError::Marker { .. }));
        assert!(site.vault.withdraw_marker(machine(2), group.id, good.marker).await.unwrap());
        refused(&second, Report { commit, ..good }).await;
        assert!(site.vault.group_points(group.id).await.unwrap().is_empty());

        for n in 2..2 + PENDING_OF_MACHINE_MAX as u64 {
            site.vault
                .keep_marker(&state, Report { marker: marker(1, n), commit: next, ..good })
                .await
                .unwrap();
        }
        let one_more = Report { marker: marker(1, 999), commit: next, ..good };
        let error = site.vault.keep_marker(&state, one_more).await.unwrap_err();
        assert!(matches!(error, VaultError::Limit(_)), "{error}");
        // Another member's count for themselves.
        site.vault.keep_marker(&second, Report { marker: marker(1, 999), commit, ..good }).await.unwrap();
        site.later(PENDING_MAX.as_millis() as u64 + 1);
        refused(&state, one_more).await;
        let swept = site.vault.sweep_groups().await.unwrap();
        assert_eq!((swept.made.len(), swept.revoked.len()), (0, 1 + PENDING_OF_MACHINE_MAX));
        assert!(site.vault.control_list("group-kept").await.unwrap().is_empty());
        site.later(12 * 3_600_000 + 1);
        site.vault.tidy_groups().await.unwrap();
        assert!(site.vault.control_list("group-points").await.unwrap().is_empty());
    });
}

#[test]
fn a_point_of_which_a_part_is_gone_is_not_offered() {
    runtime().block_on(async {
        let site = Site::new(3).await;
        let group = site.group("shop", &[1, 2, 3]).await;
        let first = site.made(&group, &[1, 2, 3], 1).await;
        site.later(1000);
        // By other members, later: it is of another epoch, and stays a point.
        let fewer = Group { members: vec![machine(1), machine(2)], ..group.clone() };
        let fewer = site.vault.change_groups(|_| Ok(fewer.clone())).await.unwrap();
        let second = site.made(&fewer, &[1, 2], 2).await;
        let markers = async || {
            let points = site.vault.group_points(group.id).await.unwrap();
            points.iter().map(|point| point.marker).collect::<Vec<_>>()
        };
        assert_eq!(markers().await, [second, first]);
        erase::erase(&site.vault, machine(3)).await.unwrap();
        assert_eq!(markers().await, [second]);
        assert!(matches!(site.vault.decision(group.id, first).await.unwrap(), Some(Decision::Complete(_))));
        site.vault.tidy_groups().await.unwrap();
        assert_eq!(site.vault.decision(group.id, first).await.unwrap(), None);
        assert_eq!(markers().await, [second]);
    });
}

/// Of what lies in the store of a machine's own.
async fn objects_of(site: &Site, machine: MachineId) -> Vec<(Path, Bytes)> {
    let prefix = Path::from(format!("machines/{machine}"));
    let names: Vec<_> = site.store.list(Some(&prefix)).try_collect().await.unwrap();
    let mut all = Vec::new();
    for meta in names {
        let bytes = site.store.get(&meta.location).await.unwrap().bytes().await.unwrap();
        all.push((meta.location, bytes));
    }
    assert!(!all.is_empty());
    all
}

/// A machine's part of the vault is brought back as it was before its point, and the machine goes on from there.
#[test]
fn a_point_that_has_the_number_of_one_that_was_lost_is_not_it() {
    runtime().block_on(async {
        let site = Site::new(2).await;
        let group = site.group("shop", &[1, 2]).await;
        site.made(&group, &[1, 2], 1).await;
        let old = objects_of(&site, machine(1)).await;
        let lost = site.made(&group, &[1, 2], 2).await;
        assert_eq!(site.vault.group_points(group.id).await.unwrap().len(), 2);
        let number = site.vault.machine(machine(1)).await.unwrap().last_commit;

        for (name, _) in objects_of(&site, machine(1)).await {
            site.store.delete(&name).await.unwrap();
        }
        for (name, bytes) in old {
            site.store.put(&name, bytes.into()).await.unwrap();
        }
        let vault = site.another().await;
        assert_eq!(vault.group_points(group.id).await.unwrap().len(), 1);
        let again = point_at(&vault, 1, Consistency::Filesystem, TAKEN_MS + 1).await.unwrap();
        assert_eq!(again, number);
        let offered = vault.group_points(group.id).await.unwrap();
        assert!(offered.iter().all(|point| point.marker != lost) && offered.len() == 1);

        // Neither is it the one that its agent said it kept, before all that.
        let state = vault.machine(machine(1)).await.unwrap();
        let error = vault.keep_marker(&state, report(&group, marker(1, 3), again)).await.unwrap_err();
        assert!(matches!(error, VaultError::Marker { .. }), "{error}");
        let good = Report { taken_at_ms: TAKEN_MS + 1, ..report(&group, marker(1, 3), again) };
        vault.keep_marker(&state, good).await.unwrap();

        // It never will be whole again.
        assert!(vault.decision(group.id, lost).await.unwrap().is_some());
        keep::forget_points(&vault, &state).await.unwrap();
        assert!(vault.decision(group.id, lost).await.unwrap().is_none());
    });
}

#[test]
fn requests_and_addresses_come_and_go() {
    runtime().block_on(async {
        let site = Site::new(2).await;
        let vault = &site.vault;
        let of = Of::Machine(machine(1));
        let id = vault.ask_point(of, true, Duration::from_secs(60)).await.unwrap();
        assert_eq!(vault.point_requests().await.unwrap(), [id]);
        let request = vault.point_request(id).await.unwrap().unwrap();
        assert_eq!((request.of, request.until_ms - request.at_ms), (of, 60_000));
        assert!(vault.take_request(id, machine(1)).await.unwrap());
        assert!(
            !vault.take_request(id, machine(2)).await.unwrap() && !vault.cancel_request(id).await.unwrap()
        );
        let answer = Answer::Failed { code: Code(1), cause: "a".into(), action: "b".into() };
        assert!(vault.answer_request(id, &answer).await.unwrap());
        assert_eq!(vault.request_answer(id).await.unwrap(), Some(answer));
        vault.tidy_groups().await.unwrap();
        assert_eq!(vault.point_requests().await.unwrap(), [id]);

        vault.set_group_address(machine(1), "a:1").await.unwrap();
        vault.set_group_address(machine(1), "b:1").await.unwrap();
        vault.set_group_address(machine(2), "[::1]:1").await.unwrap();
        let other = site.another().await;
        let addresses = other.group_addresses().await.unwrap();
        assert_eq!((addresses[&machine(1)].as_str(), addresses[&machine(2)].as_str()), ("b:1", "[::1]:1"));
        vault.set_group_address(machine(1), "c:1").await.unwrap();
        assert_eq!(other.group_addresses().await.unwrap()[&machine(1)], "c:1");
        assert_eq!(vault.control_list("group-addresses").await.unwrap().len(), 2);
        erase::erase(vault, machine(2)).await.unwrap();
        site.later(86_400_001);
        vault.tidy_groups().await.unwrap();
        assert_eq!(other.group_addresses().await.unwrap().len(), 1);
        for folder in ["point-requests", "point-requests-taken", "point-requests-answered"] {
            assert!(vault.control_list(folder).await.unwrap().is_empty(), "{folder}");
        }
    });
}

/// One that was taken out knows how the markers to come are called.
#[test]
fn a_machine_that_was_taken_out_hinders_nobody() {
    runtime().block_on(async {
        let site = Site::new(3).await;
        let before = site.group("shop", &[1, 2, 3]).await;
        let old = marker(1, 1);
        let reports = async |group: &Group, marker, n| {
            let commit = site.point(n, Consistency::Filesystem).await;
            let state = site.vault.machine(machine(n)).await.unwrap();
            site.vault.keep_marker(&state, report(group, marker, commit)).await
        };
        reports(&before, old, 1).await.unwrap();
        reports(&before, old, 3).await.unwrap();
        let fewer = Group { members: vec![machine(1), machine(2)], ..before.clone() };
        let now = site.vault.change_groups(|_| Ok(fewer.clone())).await.unwrap();
        let groups = site.vault.groups().await.unwrap();
        assert!(groups.ended_ms(before.id, 1).is_some() && groups.ended_ms(before.id, 2).is_none());
        let withdraws = async |marker, n| site.vault.withdraw_marker(machine(n), before.id, marker).await;
        let is_refused = |error: VaultError| assert!(matches!(error, VaultError::Marker { .. }), "{error}");

        // It cannot take back a marker to come, with a report of its own neither.
        let next = marker(1, 2);
        is_refused(withdraws(next, 3).await.unwrap_err());
        reports(&before, next, 3).await.unwrap();
        is_refused(withdraws(next, 3).await.unwrap_err());
        // Nor make the others' reports be refused.
        reports(&now, next, 2).await.unwrap();
        assert!(site.vault.sweep_groups().await.unwrap().made.is_empty());
        let outcome = reports(&now, next, 1).await.unwrap();
        assert!(matches!(outcome, Outcome::Made(Complete { epoch: 2, .. })), "{outcome:?}");
        is_refused(reports(&before, next, 3).await.unwrap_err());

        // What was under way is done with as before.
        assert!(withdraws(old, 3).await.unwrap());
        let whole = marker(1, 3);
        for n in [3, 2, 1] {
            reports(&before, whole, n).await.unwrap();
        }
        assert!(matches!(
            site.vault.decision(before.id, whole).await.unwrap(),
            Some(Decision::Complete(Complete { epoch: 1, .. }))
        ));

        // Nor does a report of it make a marker late that the others begin afterwards.
        let (later, never) = (marker(1, 4), marker(1, 5));
        for marker in [later, never] {
            reports(&before, marker, 3).await.unwrap();
        }
        site.later(PENDING_MAX.as_millis() as u64 + 1);
        reports(&now, later, 2).await.unwrap();
        let swept = site.vault.sweep_groups().await.unwrap();
        assert!(swept.revoked.is_empty() && swept.made.is_empty(), "{swept:?}");
        assert_eq!(site.vault.decision(before.id, never).await.unwrap(), None);
        assert!(matches!(reports(&now, later, 1).await.unwrap(), Outcome::Made(_)));
        assert!(site.vault.control_list("group-kept").await.unwrap().is_empty());
        is_refused(reports(&before, marker(1, 6), 3).await.unwrap_err());
    });
}
