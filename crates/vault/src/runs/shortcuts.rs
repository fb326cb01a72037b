//! Which shortcuts are missing: planned so that readers begin with few objects, and maps are written few times over. Pure.

use super::{Run, Shortcut};
use highwater_delta::CommitId;
use std::collections::VecDeque;

/// So many neighbours are put under one shortcut. Tests have more of them.
pub(crate) const FAN_OUT: usize = if cfg!(test) { 3 } else { 8 };
/// What a shortcut costs for each run under it, besides what grows with the run's content.
const LEAF_BYTES: u64 = if cfg!(test) { 0 } else { 64 << 10 };
/// Siblings among which a group is looked for. A history that was never maintained has very many.
const LOOKED_AT: usize = 8 * FAN_OUT;

/// Shortcuts that are missing, as ranges of commits: after all are made, a cover takes few items for every commit.
/// The first run, mostly much larger than all others together, is under none.
pub(crate) fn missing_shortcuts(runs: &[Run], shortcuts: &[Shortcut]) -> Vec<(CommitId, CommitId)> {
    let mut made = Vec::new();
    if let Some((_, rest)) = runs.split_first() {
        let leaf = |run: &Run| Stretch { from: run.from, to: run.to, weight: run.weight() + LEAF_BYTES };
        let leaves: Vec<Stretch> = rest.iter().map(leaf).collect();
        let mut inner: Vec<_> = shortcuts.iter().map(|shortcut| (shortcut.from, shortcut.to)).collect();
        // Outer ones before those within them.
        inner.sort_by_key(|(from, to)| (*from, std::cmp::Reverse(*to)));
        group(&leaves, &inner, &mut made);
    }
    made
}

/// A run or shortcut to be put under another, and about what its map costs.
#[derive(Clone, Copy)]
struct Stretch {
    from: CommitId,
    to: CommitId,
    weight: u64,
}

/// Puts shortcuts over `leaves` until no level has more than [`FAN_OUT`] and a few siblings. `inner`: those that there are already.
fn group(leaves: &[Stretch], inner: &[(CommitId, CommitId)], made: &mut Vec<(CommitId, CommitId)>) {
    let weight = |of: &[Stretch]| of.iter().fold(0_u64, |sum, one| sum.saturating_add(one.weight));
    let mut siblings: VecDeque<Stretch> = VecDeque::new();
    let (mut leaf, mut at) = (0, 0);
    while leaf < leaves.len() {
        let next = inner[at..].iter().position(|(from, _)| *from >= leaves[leaf].from).map(|skip| at + skip);
        match next.map(|next| (next, inner[next])) {
            Some((next, (from, to))) if from == leaves[leaf].from && to > leaves[leaf].to => {
                let end = leaf + leaves[leaf..].partition_point(|other| other.to <= to);
                let within = inner[next + 1..].partition_point(|(from, _)| *from < to);
                group(&leaves[leaf..end], &inner[next + 1..next + 1 + within], made);
                siblings.push_back(Stretch { from, to, weight: weight(&leaves[leaf..end]) });
                leaf = end;
                at = next + 1 + within;
            }
            _ => {
                siblings.push_back(leaves[leaf]);
                leaf += 1;
            }
        }
    }
    // A few more than one group are left as they are: the newest change most.
    while siblings.len() >= 2 * FAN_OUT {
        let at = most_even(&siblings);
        let group: Vec<Stretch> = siblings.drain(at..at + FAN_OUT).collect();
        let over = Stretch { from: group[0].from, to: group[FAN_OUT - 1].to, weight: weight(&group) };
        made.push((over.from, over.to));
        siblings.insert(at, over);
    }
}

/// Where the group begins, among the oldest, of which the heaviest is the least part; of equals the oldest. A heavy one is so not
/// written again and again for the sake of a few light ones beside it, but each time together with others like it.
fn most_even(siblings: &VecDeque<Stretch>) -> usize {
    let heaviest_and_all = |at: usize| {
        let group = siblings.range(at..at + FAN_OUT).map(|one| u128::from(one.weight));
        group.fold((0, 0), |(heaviest, all), weight| (weight.max(heaviest), all + weight))
    };
    let mut best = (0, heaviest_and_all(0));
    for at in 1..=(siblings.len() - FAN_OUT).min(LOOKED_AT) {
        let (heaviest, all) = heaviest_and_all(at);
        let (best_heaviest, best_all) = best.1;
        if heaviest * best_all < best_heaviest * all {
            best = (at, (heaviest, all));
        }
    }
    best.0
}
