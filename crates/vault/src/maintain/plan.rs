//! What is to be done for a machine. Pure: no store, no clock.

use super::around::Around;
use crate::{
    MachineState,
    policy::Verdict,
    runs::{Content, Item, Run, Shortcut, Trashed, cover, merges, missing_shortcuts},
};
use highwater_delta::CommitId;
use serde::Serialize;
use std::{collections::HashSet, ops::Range, time::Duration};

/// A merged run of whose segments' blocks less than this part is needed is cleaned …
const CLEAN_BELOW: (u128, u128) = (6, 10);

/// What is to be done for a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// Points that expire.
    pub expire: Vec<CommitId>,
    /// Points that would expire, but are held or protected.
    pub protected: Vec<CommitId>,
    /// What is merged, in this order.
    pub merges: Vec<Merge>,
    /// Objects that are deleted.
    pub delete: u64,
    /// Their bytes.
    pub delete_bytes: u64,
}

/// A merge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Merge {
    /// The commit before it.
    pub from: CommitId,
    /// Its last commit.
    pub to: CommitId,
    /// Runs.
    pub runs: usize,
    /// Bytes of content that they hold. Of these, only what is written anew is read; of the others the index.
    pub bytes: u64,
    /// What for.
    pub purpose: Purpose,
}

/// What a merge is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// No point is kept between these runs: they become one, and what is in none of the points goes.
    Expire,
    /// Much of what this run's segments hold is needed no more: the rest is written anew.
    Clean,
    /// Points behind these runs are opened and read through fewer objects.
    Shortcut,
}

impl Plan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.expire.is_empty() && self.merges.is_empty() && self.delete == 0
    }
}

/// See [`Plan`]. `verdict`: what becomes of the points.
#[must_use]
pub fn plan(state: &MachineState, verdict: Verdict, grace: Duration, now_ms: u64) -> Plan {
    plan_around(state, verdict, grace, now_ms, &Around::default())
}

/// The same without what cannot be read.
pub(super) fn plan_around(
    state: &MachineState,
    verdict: Verdict,
    grace: Duration,
    now_ms: u64,
    around: &Around,
) -> Plan {
    let gone: HashSet<CommitId> = verdict.expire.iter().copied().collect();
    let kept: HashSet<CommitId> =
        state.points.iter().map(|point| point.id).filter(|id| !gone.contains(id)).collect();
    let is_boundary = |commit: CommitId| kept.contains(&commit) || around.is_boundary(commit);
    let mut merges_planned = Vec::new();
    // As the runs will be afterwards.
    let mut runs: Vec<Run> = state.runs.clone();
    let mut shortcuts: Vec<Shortcut> = state.shortcuts.clone();
    let expiring = |runs: &[Run]| -> Vec<(Range<usize>, Merge)> {
        let all = merges(runs, is_boundary).into_iter().map(|range| {
            let of = &runs[range.clone()];
            let (from, to) = (of[0].from, of[of.len() - 1].to);
            let bytes = of.iter().map(Run::data_bytes).sum();
            (range, Merge { from, to, runs: of.len(), bytes, purpose: Purpose::Expire })
        });
        all.filter(|(_, merge)| !around.leaves(merge)).collect()
    };
    for (range, merge) in expiring(&runs).into_iter().rev() {
        let of = &runs[range.clone()];
        let (from, to, bytes) = (merge.from, merge.to, merge.bytes);
        merges_planned.push(merge);
        let inner: HashSet<CommitId> = of[..of.len() - 1].iter().map(|run| run.to).collect();
        shortcuts
            .retain(|s| !inner.contains(&s.from) && !inner.contains(&s.to) && (s.from, s.to) != (from, to));
        // All of it needed, for all that is known here.
        let held = crate::runs::Held { bytes, blocks: 1, live_blocks: 1, ..Default::default() };
        runs.splice(range, [Run { from, to, content: Content::Maps { maps: vec![], held } }]);
    }
    merges_planned.reverse();
    for run in &state.runs {
        let Content::Maps { held, .. } = &run.content else { continue };
        let (part, of) = CLEAN_BELOW;
        let is_low = u128::from(held.live_blocks) * of < u128::from(held.blocks) * part;
        if is_low && !merges_planned.iter().any(|merge| merge.from <= run.from && run.to <= merge.to) {
            let (from, to, bytes) = (run.from, run.to, held.bytes);
            merges_planned.push(Merge { from, to, runs: 1, bytes, purpose: Purpose::Clean });
        }
    }
    // What is merged again at once is not worth a shortcut.
    let is_settled = expiring(&runs).is_empty();
    let missing = if is_settled { missing_shortcuts(&runs, &shortcuts) } else { Vec::new() };
    for (from, to) in missing {
        let within = runs.iter().filter(|run| from <= run.from && run.to <= to);
        let (count, bytes) = within.fold((0, 0), |(n, bytes), run| (n + 1, bytes + run.data_bytes()));
        merges_planned.push(Merge { from, to, runs: count, bytes, purpose: Purpose::Shortcut });
    }
    merges_planned.retain(|merge| !around.leaves(merge));
    let due = due(state, grace, now_ms);
    Plan {
        expire: verdict.expire,
        protected: verdict.protected,
        merges: merges_planned,
        delete: due.len() as u64,
        delete_bytes: due.iter().map(|trashed| trashed.bytes).sum(),
    }
}

/// What has been in the trash for long enough.
pub(super) fn due(state: &MachineState, grace: Duration, now_ms: u64) -> Vec<Trashed> {
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    let due = |trashed: &&Trashed| trashed.since_ms.saturating_add(grace_ms) <= now_ms;
    state.trash.iter().filter(due).cloned().collect()
}

/// What a merge reads: the runs, or for a shortcut whatever already lies over some of them, oldest first.
pub(super) fn sources<'a>(state: &'a MachineState, merge: &Merge) -> crate::Result<Vec<Item<'a>>> {
    let within = state.runs_within(merge.from, merge.to)?;
    if merge.purpose != Purpose::Shortcut {
        return Ok(state.runs[within].iter().map(Item::Run).collect());
    }
    let mut items: Vec<Item<'a>> = Vec::new();
    let inner: Vec<&'a Shortcut> = state.shortcuts.iter().filter(|s| merge.from <= s.from).collect();
    let mut at = merge.to;
    while at > merge.from {
        let longest = inner.iter().filter(|s| s.to == at).min_by_key(|s| s.from);
        let item = match longest {
            Some(shortcut) => Item::Shortcut(shortcut),
            None => {
                let index = state.runs.partition_point(|run| run.to < at);
                Item::Run(state.runs.get(index).ok_or(crate::VaultError::Order("a shortcut over no run"))?)
            }
        };
        at = item.from();
        items.push(item);
    }
    items.reverse();
    Ok(items)
}

/// Most objects that a reader of any of its points begins with.
#[must_use]
pub fn depth_max(state: &MachineState) -> usize {
    let depth = |point: &crate::PointRecord| {
        cover(&state.runs, &state.shortcuts, point.id)
            .map_or(0, |items| items.iter().map(|i| i.objects().len()).sum())
    };
    state.points.iter().map(depth).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskSpan, SegmentRef};
    use highwater_delta::{DiskId, MachineId, SegmentId};

    #[test]
    fn runs_that_are_merged_next_get_no_shortcut() {
        let segment = |commit| SegmentRef {
            id: SegmentId::new(),
            commit: CommitId(commit),
            bytes: 1000,
            salt: [0; 16],
            footer_offset: 0,
            footer_len: 0,
            footer_frame: 0,
            spans: vec![DiskSpan { disk: DiskId::from_bytes([1; 16]), first: 0, end: 1 }],
        };
        let mut state = MachineState::empty(MachineId::from_bytes([1; 16]), String::new());
        // More than are merged at once.
        for n in 1..=400 {
            let content = Content::Segments(vec![segment(n)]);
            state.runs.push(Run { from: CommitId(n - 1), to: CommitId(n), content });
        }
        let merges = plan(&state, Verdict::default(), Duration::ZERO, 0).merges;
        assert_eq!(merges.len(), 1, "{merges:?}");
        assert_eq!((merges[0].purpose, merges[0].runs), (Purpose::Expire, 256));
    }
}
