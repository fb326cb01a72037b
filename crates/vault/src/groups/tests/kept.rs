//! Points of a group are kept together, whoever maintains its members, and when.

use super::support::*;
use crate::groups::{Shared, SharedPoint};
use crate::maintain::{self, Settings};
use crate::policy::{Policy, Rules, Tier, set_policy};
use crate::tests::support::{cases, runtime};
use crate::{MachineState, PointRecord};
use highwater_delta::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const MINUTE: u64 = 60_000;

fn policy(keep_all_min: u64, tiers: &[(u64, u64)]) -> Policy {
    let minutes = |n: u64| Duration::from_secs(n * 60);
    let tiers =
        tiers.iter().map(|(every, keep_for)| Tier { every: minutes(*every), keep_for: minutes(*keep_for) });
    let policy =
        Policy { keep_all: minutes(keep_all_min), tiers: tiers.collect(), immutable_for: Duration::ZERO };
    policy.check().unwrap();
    policy
}

/// What happens at some time.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A member makes a point of its own.
    Own(usize, Consistency),
    /// All make one of the group; each is stored some time after the other, and the group's when the last is.
    Group(Consistency, u64),
    /// A member is maintained.
    Maintain(usize),
    /// So many minutes pass.
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let consistency = || {
        prop_oneof![Just(Consistency::Crash), Just(Consistency::Filesystem), Just(Consistency::Application)]
    };
    let step = prop_oneof![
        2 => (0..3_usize, consistency()).prop_map(|(n, c)| Step::Own(n, c)),
        3 => (consistency(), 0..4_u64).prop_map(|(c, apart)| Step::Group(c, apart)),
        3 => (0..3_usize).prop_map(Step::Maintain),
        3 => (1..90_u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..120)
}

/// Members' points, and the group's, as documents say.
struct Model {
    now_ms: u64,
    states: Vec<MachineState>,
    points: BTreeMap<u64, (Consistency, u64, Vec<CommitId>)>,
    policy: Policy,
}

impl Model {
    fn point(&mut self, n: usize, consistency: Consistency, at_ms: u64) -> CommitId {
        let state = &mut self.states[n];
        let id = state.last_commit.next();
        state.last_commit = id;
        let info = PointInfo { consistency, taken_at_ms: at_ms, freeze_us: 0, disks: vec![] };
        state.points.push(PointRecord { id, info, stored_at_ms: at_ms, bytes_stored: 0 });
        id
    }

    fn shared(&self, n: usize) -> Vec<SharedPoint> {
        let all = self.points.iter().map(|(number, (consistency, stored_at_ms, commits))| SharedPoint {
            marker: marker(1, *number),
            consistency: *consistency,
            stored_at_ms: *stored_at_ms,
            commit: Some(commits[n]),
        });
        all.collect()
    }

    fn maintain(&mut self, n: usize) {
        let shared = Shared { groups: vec![self.shared(n)], ..Shared::default() };
        let rules = Rules { policy: self.policy.clone(), shared, ..Rules::default() };
        let gone: BTreeSet<CommitId> =
            rules.verdict(&self.states[n], self.now_ms).expire.into_iter().collect();
        self.states[n].points.retain(|point| !gone.contains(&point.id));
        // And the documents of what is not whole any more.
        let there: BTreeSet<CommitId> = self.states[n].points.iter().map(|point| point.id).collect();
        self.points.retain(|_, (.., commits)| there.contains(&commits[n]));
    }
}

proptest! {
    #![proptest_config(cases(256))]

    /// However members are maintained, the list is what one maintainer makes of it who comes whenever one of them does.
    #[test]
    fn what_the_policy_keeps_of_a_groups_points_is_whole_on_all_members(
        steps in steps(),
        which in 0..3_usize,
    ) {
        // Of coarser stretches each is made of whole finer ones; of others a point may stay instead of another.
        let policy = [
            policy(0, &[(10, 120), (60, 600)]),
            policy(30, &[(60, 240), (240, 2000)]),
            policy(5, &[(7, 60), (49, 300), (98, 900)]),
        ][which].clone();
        let states = (1..=3).map(|n| MachineState::empty(machine(n), String::new())).collect();
        let mut model = Model { now_ms: 1_800_000_000_000, states, points: BTreeMap::new(), policy };
        let mut list: Vec<(Consistency, u64, u64)> = Vec::new();
        let mut commits: BTreeMap<u64, Vec<CommitId>> = BTreeMap::new();
        for step in steps.into_iter().chain((0..3).map(Step::Maintain)) {
            match step {
                Step::Own(n, consistency) => drop(model.point(n, consistency, model.now_ms)),
                Step::Group(consistency, apart) => {
                    let mut stored = Vec::new();
                    for n in 0..3 {
                        let at_ms = model.now_ms + n as u64 * apart * 1000;
                        stored.push(model.point(n, consistency, at_ms));
                    }
                    model.now_ms += 2 * apart * 1000;
                    let number = commits.len() as u64 + 1;
                    list.push((consistency, model.now_ms, number));
                    model.points.insert(number, (consistency, model.now_ms, stored.clone()));
                    commits.insert(number, stored);
                }
                Step::Maintain(n) => {
                    model.maintain(n);
                    let kept = model.policy.kept(&list, model.now_ms);
                    list.retain(|(.., number)| kept.contains(number));
                }
                Step::Wait(minutes) => model.now_ms += minutes * MINUTE,
            }
            for (.., number) in &list {
                for (state, commit) in model.states.iter().zip(&commits[number]) {
                    prop_assert!(state.point(*commit).is_ok(), "point {} lacks a part", number);
                }
                prop_assert!(model.points.contains_key(number));
            }
        }
    }
}

/// The same with real maintenance, of a vault.
#[test]
fn maintenance_keeps_a_groups_points_whole_and_forgets_the_others() {
    runtime().block_on(async {
        let site = Site::new(2).await;
        let group = site.group("shop", &[1, 2]).await;
        // An hour begins.
        let begun = 1_800_000_000_000;
        site.now_ms.store(begun, std::sync::atomic::Ordering::SeqCst);
        set_policy(&site.vault, None, Some(policy(0, &[(60, 600)])), begun).await.unwrap();
        let settings = Settings { skew_max: None, ..Settings::default() };
        let mut markers = Vec::new();
        for number in 1..=6 {
            markers.push(site.made(&group, &[1, 2], number).await);
            // A newer point of one member alone in the same stretch.
            site.later(10 * MINUTE);
            site.point(1 + (number % 2) as u8, Consistency::Filesystem).await;
            site.later(10 * MINUTE);
        }
        // One that waits: it is nobody's to expire.
        let pending = site.point(1, Consistency::Crash).await;
        let state = site.vault.machine(machine(1)).await.unwrap();
        site.vault.keep_marker(&state, report(&group, marker(1, 99), pending)).await.unwrap();
        site.later(MINUTE);
        site.point(1, Consistency::Filesystem).await;
        // So that the newer one is that of its hour.
        site.later(70 * MINUTE);
        for n in [2, 1, 2] {
            maintain::machine(&site.another().await, machine(n), &settings, &()).await.unwrap();
            site.later(MINUTE);
        }
        assert!(site.vault.machine(machine(1)).await.unwrap().point(pending).is_ok());
        let there: Vec<_> =
            site.vault.group_points(group.id).await.unwrap().iter().map(|point| point.marker).collect();
        let list: Vec<_> = (0..6).map(|n| (Consistency::Filesystem, begun + n * 20 * MINUTE, n)).collect();
        let now_ms = site.now_ms.load(std::sync::atomic::Ordering::SeqCst);
        let kept = policy(0, &[(60, 600)]).kept(&list, now_ms);
        assert!((2..=3).contains(&kept.len()), "{kept:?}");
        for number in kept {
            assert!(there.contains(&markers[number as usize]), "{number}");
        }
        let documents = site.vault.control_list("group-points").await.unwrap();
        assert_eq!(documents.len(), there.len(), "what is not whole is forgotten");
        assert!(there.len() < 6);
    });
}
