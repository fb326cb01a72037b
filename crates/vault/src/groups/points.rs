//! What is offered of a group, and what is under way.

use super::{Complete, Decision, Groups, cache::find, decide};
use crate::{MachineState, Result, Vault, VaultError};
use futures::{StreamExt, stream};
use highwater_delta::{CommitId, GroupId, MachineId};
use highwater_group::{Kind, Marker};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Machines that are read at once.
const MACHINES_AT_ONCE: usize = 8;

/// A point of a group that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPoint {
    /// Its name.
    pub marker: Marker,
    /// What it is.
    pub done: Complete,
}

/// A marker that is not decided yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Its name.
    pub marker: Marker,
    /// As its coordinator's report says, or the first.
    pub epoch: u64,
    /// As that report says.
    pub kind: Kind,
    /// When the first member reported it, in milliseconds since 1970.
    pub since_ms: u64,
    /// Members that keep it.
    pub reported: Vec<MachineId>,
    /// Members that have not said so yet.
    pub missing: Vec<MachineId>,
}

/// How a group stands.
#[derive(Clone, Debug)]
pub struct Health {
    /// When the newest of its points was taken, in milliseconds since 1970.
    pub newest_ms: Option<u64>,
    /// Documents on what became of markers that cannot be read, each with what is wrong with it.
    pub damaged: Vec<Arc<VaultError>>,
}

impl Vault {
    /// The points of a group of which every member's own is there, newest first.
    ///
    /// # Errors
    /// [`VaultError::UnknownGroup`]. A machine of which nothing can be read, or that was erased, has no points.
    pub async fn group_points(&self, group: GroupId) -> Result<Vec<GroupPoint>> {
        self.known(group).await?;
        let decisions = self.decisions(group).await?;
        let done = decisions.decided.iter().filter_map(|(marker, decision)| match &**decision {
            Decision::Complete(done) => Some((*marker, done)),
            Decision::Revoked(_) => None,
        });
        let done: Vec<(Marker, &Complete)> = done.collect();
        let members = done.iter().flat_map(|(_, done)| &done.members).map(|member| member.machine);
        let members: BTreeSet<MachineId> = members.collect();
        let there = self.points_of(members).await?;
        let is_whole = |done: &Complete| {
            done.members.iter().all(|m| {
                there.get(&m.machine).is_some_and(|points| points.contains(&(m.commit, m.taken_at_ms)))
            })
        };
        let mut points: Vec<GroupPoint> = done
            .into_iter()
            .filter(|(_, done)| is_whole(done))
            .map(|(marker, done)| GroupPoint { marker, done: done.clone() })
            .collect();
        points.sort_unstable_by_key(|point| std::cmp::Reverse((point.done.stored_at_ms, point.marker)));
        Ok(points)
    }

    /// The markers of a group that wait for members, newest first.
    pub async fn group_pending(&self, group: GroupId) -> Result<Vec<Pending>> {
        let groups = self.known(group).await?;
        let mut reported: BTreeMap<Marker, Vec<MachineId>> = BTreeMap::new();
        for (marker, machine) in self.reports(group).await? {
            reported.entry(marker).or_default().push(machine);
        }
        let mut pending = Vec::new();
        for (marker, reported) in reported {
            let coordinator = reported.iter().find(|machine| **machine == marker.coordinator);
            let name = decide::report_name(group, marker, *coordinator.unwrap_or(&reported[0]));
            // What is damaged waits for nobody.
            let read = async {
                match self.decision(group, marker).await? {
                    Some(_) => Ok(None),
                    None => find::<decide::Reported>(self, &name).await,
                }
            };
            let first = match read.await {
                Ok(Some(first)) => first,
                Ok(None) => continue,
                Err(error) if error.is_damage() => continue,
                Err(error) => return Err(error),
            };
            let members = groups.membership(group, first.epoch).unwrap_or_default();
            let missing = members.iter().filter(|machine| !reported.contains(machine)).copied().collect();
            let decide::Reported { epoch, kind, reported_at_ms, .. } = first;
            pending.push(Pending { marker, epoch, kind, since_ms: reported_at_ms, reported, missing });
        }
        pending.sort_unstable_by_key(|pending| std::cmp::Reverse((pending.since_ms, pending.marker)));
        Ok(pending)
    }

    /// How a group stands; without a look whether its points are whole still.
    pub async fn group_health(&self, group: GroupId) -> Result<Health> {
        let decisions = self.decisions(group).await?;
        let taken = decisions.decided.values().filter_map(|decision| match &**decision {
            Decision::Complete(done) => Some(done.taken_at_ms),
            Decision::Revoked(_) => None,
        });
        Ok(Health { newest_ms: taken.max(), damaged: decisions.damaged.values().cloned().collect() })
    }

    async fn known(&self, group: GroupId) -> Result<Arc<Groups>> {
        let groups = self.groups().await?;
        if groups.get(group).is_none() {
            return Err(VaultError::UnknownGroup(group));
        }
        Ok(groups)
    }

    /// The points that there are of these machines, each with when it was taken.
    async fn points_of(
        &self,
        machines: BTreeSet<MachineId>,
    ) -> Result<HashMap<MachineId, HashSet<(CommitId, u64)>>> {
        let mut read = stream::iter(machines)
            .map(|machine| async move { (machine, self.machine_or_less(machine).await) })
            .buffer_unordered(MACHINES_AT_ONCE);
        let mut all = HashMap::new();
        while let Some((machine, state)) = read.next().await {
            let points = match state {
                Ok(state) => state.points.iter().map(|point| (point.id, point.info.taken_at_ms)).collect(),
                Err(VaultError::Erased(_) | VaultError::UnknownMachine(_)) => HashSet::new(),
                Err(error) if error.is_damage() => HashSet::new(),
                Err(error) => return Err(error),
            };
            all.insert(machine, points);
        }
        Ok(all)
    }

    /// What is known of a machine, up to the first record that is damaged.
    async fn machine_or_less(&self, machine: MachineId) -> Result<MachineState> {
        match self.machine(machine).await {
            Err(error) if error.is_damage() => Ok(self.machine_before_damage(machine).await?.0),
            state => state,
        }
    }
}
