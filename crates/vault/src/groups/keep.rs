//! Which points of groups are kept, and so which of a machine's own.
//!
//! Each member is maintained by itself, at its own time. So what is kept must follow from what all see alike: the list of the group's points,
//! by the time at which the last member's was stored ([`crate::policy`] has the rule, which is that of a machine's points). What the policy keeps of it, no member
//! lets go; what it does not keep leaves the list with the first member that lets its part go. So whichever members were maintained already, the
//! list is whole. Members with different policies keep different ones: what is offered then is what all of them keep.

use super::{Complete, Decision, decide};
use crate::{MachineState, Result, Vault, policy::Policy};
use highwater_delta::{CommitId, Consistency, GroupId, MachineId};
use highwater_group::Marker;
use std::collections::HashSet;

/// What keeps a machine's points for others' sake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// The points of each group that the machine belongs or belonged to: all that the group has.
    pub groups: Vec<Vec<SharedPoint>>,
    /// Of markers that are not decided yet.
    pub pending: HashSet<CommitId>,
}

/// A point of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPoint {
    /// Its marker.
    pub marker: Marker,
    /// What it is consistent with.
    pub consistency: Consistency,
    /// See [`Complete::stored_at_ms`].
    pub stored_at_ms: u64,
    /// The machine's point; none: it was no member then.
    pub commit: Option<CommitId>,
}

impl Shared {
    /// As the vault says now.
    pub(crate) async fn load(vault: &Vault, machine: MachineId) -> Result<Self> {
        let groups = vault.groups().await?;
        let mut shared = Self::default();
        for group in groups.ever_of(machine) {
            // First: a report goes only when there is a decision.
            for (marker, by) in vault.reports(group).await? {
                if by == machine {
                    let name = decide::report_name(group, marker, by);
                    let report = super::cache::find::<decide::Reported>(vault, &name).await?;
                    shared.pending.extend(report.map(|report| report.commit));
                }
            }
            // What belongs to a point of which nothing can be read is kept by letting nothing go.
            for marker in vault.decisions(group).await?.damaged.keys() {
                vault.decision(group, *marker).await?;
            }
            let points = completed(vault, group).await?;
            shared
                .groups
                .push(points.iter().map(|(marker, done)| SharedPoint::of(*marker, done, machine)).collect());
        }
        Ok(shared)
    }

    /// The machine's points that a policy keeps at this moment, in milliseconds since 1970, for the groups' sake.
    #[must_use]
    pub fn kept(&self, policy: &Policy, now_ms: u64) -> HashSet<CommitId> {
        let mut kept = self.pending.clone();
        for points in &self.groups {
            let mut list: Vec<(Consistency, u64, Marker)> =
                points.iter().map(|point| (point.consistency, point.stored_at_ms, point.marker)).collect();
            list.sort_unstable_by_key(|(_, stored_at_ms, marker)| (*stored_at_ms, *marker));
            let markers = policy.kept(&list, now_ms);
            let those = points.iter().filter(|point| markers.contains(&point.marker));
            kept.extend(those.filter_map(|point| point.commit));
        }
        kept
    }
}

impl SharedPoint {
    fn of(marker: Marker, done: &Complete, machine: MachineId) -> Self {
        let Complete { consistency, stored_at_ms, .. } = *done;
        Self { marker, consistency, stored_at_ms, commit: done.part_of(machine).map(|part| part.commit) }
    }
}

/// All points of a group for which there is a document that can be read.
async fn completed(vault: &Vault, group: GroupId) -> Result<Vec<(Marker, Complete)>> {
    let decisions = vault.decisions(group).await?;
    let done = decisions.decided.iter().filter_map(|(marker, decision)| match &**decision {
        Decision::Complete(done) => Some((*marker, done.clone())),
        Decision::Revoked(_) => None,
    });
    Ok(done.collect())
}

/// Deletes the documents of groups' points of which this machine's point is gone: they are not whole any more, and never will be.
pub(crate) async fn forget_points(vault: &Vault, state: &MachineState) -> Result<()> {
    for group in vault.groups_known().await.ever_of(state.machine) {
        for (marker, done) in completed(vault, group).await? {
            let Some(part) = done.part_of(state.machine) else { continue };
            // A state that is older than the point says nothing of it.
            if part.commit <= state.last_commit && part.find_in(state).is_none() {
                vault.control_forget(&super::cache::decision_name(group, marker)).await?;
            }
        }
    }
    Ok(())
}
