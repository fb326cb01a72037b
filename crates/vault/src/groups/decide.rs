//! Reports of members, and the one decision that they lead to. What a crash leaves is said in [`super`].

use super::{
    PENDING_MAX, PENDING_OF_MACHINE_MAX, READ_DEPTH,
    cache::{create, decision_name, find},
    millis,
};
use crate::{MachineState, PointRecord, Result, Vault, VaultError};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::{CommitId, Consistency, GroupId, MachineId};
use highwater_group::{Kind, Marker};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a member says: it keeps a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of this group.
    pub group: GroupId,
    /// Of this membership.
    pub epoch: u64,
    /// Which.
    pub marker: Marker,
    /// What was frozen.
    pub kind: Kind,
    /// The machine's recovery point.
    pub commit: CommitId,
    /// When that was taken: after a restore of the vault another one may have its number.
    pub taken_at_ms: u64,
}

/// The same as a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Reported {
    pub(super) epoch: u64,
    pub(super) kind: Kind,
    pub(super) commit: CommitId,
    consistency: Consistency,
    pub(super) taken_at_ms: u64,
    stored_at_ms: u64,
    pub(super) reported_at_ms: u64,
}

/// What became of a marker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// A point of the group.
    Complete(Complete),
    /// Nothing.
    Revoked(Revoked),
}

/// A point of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Complete {
    /// Of this membership.
    pub epoch: u64,
    /// What was frozen.
    pub kind: Kind,
    /// The least of the members'.
    pub consistency: Consistency,
    /// When the marker lay, by the clock of the machine that coordinated it, in milliseconds since 1970.
    pub taken_at_ms: u64,
    /// When the last member's point was stored, by the collector's clock.
    pub stored_at_ms: u64,
    /// When it was decided.
    pub decided_at_ms: u64,
    /// All members' points, by machine.
    pub members: Vec<MemberPoint>,
}

/// A member's part of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemberPoint {
    /// The machine.
    pub machine: MachineId,
    /// Its recovery point.
    pub commit: CommitId,
    /// When that was taken, by the machine's clock, in milliseconds since 1970: a point of this number that was taken at another time is another one.
    pub taken_at_ms: u64,
}

impl MemberPoint {
    /// The recovery point, if the machine still has it.
    #[must_use]
    pub fn find_in<'a>(&self, state: &'a MachineState) -> Option<&'a PointRecord> {
        state.point(self.commit).ok().filter(|point| point.info.taken_at_ms == self.taken_at_ms)
    }
}

impl Reported {
    pub(super) fn part(&self, machine: MachineId) -> MemberPoint {
        MemberPoint { machine, commit: self.commit, taken_at_ms: self.taken_at_ms }
    }
}

/// A marker that came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Revoked {
    /// The member that said so; none: not all had reported in time.
    pub by: Option<MachineId>,
    /// When it was decided.
    pub decided_at_ms: u64,
}

impl Complete {
    /// A member's point.
    #[must_use]
    pub fn part_of(&self, machine: MachineId) -> Option<MemberPoint> {
        let at = self.members.binary_search_by_key(&machine, |member| member.machine).ok()?;
        Some(self.members[at])
    }
}

/// What a report has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// So many members have not reported yet.
    Waiting(usize),
    /// With it, the marker is a point of the group.
    Made(Complete),
    /// It was known.
    Known,
}

/// The reports of a group lie in one folder: a directory would keep an empty one for each marker for ever.
fn folder_of(group: GroupId) -> String {
    format!("group-kept/{group}")
}

pub(super) fn report_name(group: GroupId, marker: Marker, machine: MachineId) -> String {
    format!("{}/{marker}.{machine}", folder_of(group))
}

/// What the name of a report says.
pub(super) fn parse(name: &str) -> Option<(GroupId, Marker, MachineId)> {
    let (group, report) = name.strip_prefix("group-kept/")?.split_once('/')?;
    let (marker, machine) = report.rsplit_once('.')?;
    Some((group.parse().ok()?, marker.parse().ok()?, machine.parse().ok()?))
}

impl Vault {
    /// A machine, of which this is known, keeps a marker. Saying it again changes nothing.
    ///
    /// # Errors
    /// [`VaultError::Marker`]: it cannot be so, and nothing was changed. [`VaultError::Limit`]: too many of its reports wait. After others
    /// the report may be there: it can be said again, and [`Vault::sweep_groups`] finds it.
    pub async fn keep_marker(&self, state: &MachineState, report: Report) -> Result<Outcome> {
        let Report { group, epoch, marker, kind, commit, taken_at_ms } = report;
        let machine = state.machine;
        let part = MemberPoint { machine, commit, taken_at_ms };
        let refuse = |cause| Err(VaultError::Marker { marker, machine, cause });
        let mut groups = self.groups_known().await;
        if groups.membership(group, epoch).is_none() {
            groups = self.groups().await?;
        }
        let members = groups.membership(group, epoch).unwrap_or_default();
        if members.binary_search(&machine).is_err() {
            return refuse("the machine is no member of this group in this epoch");
        }
        if members.binary_search(&marker.coordinator).is_err() {
            return refuse("its coordinator is no member of this group in this epoch");
        }
        let Some(point) = part.find_in(state) else {
            return refuse("what it is said to be kept as is no recovery point of the machine");
        };
        let now_ms = self.stamp_ms().await?;
        let is_over = |ended_ms: u64| now_ms.saturating_sub(ended_ms) > millis(PENDING_MAX);
        if groups.ended_ms(group, epoch).is_some_and(is_over) {
            return refuse("this epoch of the group ended too long ago");
        }
        if now_ms.saturating_sub(point.stored_at_ms) > millis(PENDING_MAX) {
            return refuse("the recovery point was stored too long ago");
        }
        let decisions = self.decisions(group).await?;
        if decisions.damaged.contains_key(&marker) {
            return refuse("it was decided before, and the document is damaged");
        }
        match decisions.decided.get(&marker).map(|decision| &**decision) {
            Some(Decision::Complete(done)) if done.part_of(machine) == Some(part) => {
                return Ok(Outcome::Known);
            }
            Some(_) => return refuse("what becomes of it was decided before"),
            None => {}
        }
        // Or a machine could have any number of points of its group made of one of its own.
        let is_it = |decision: &Decision| matches!(decision, Decision::Complete(done) if done.part_of(machine) == Some(part));
        if decisions.decided.values().any(|decision| is_it(decision)) {
            return refuse("the recovery point belongs to another point of the group");
        }
        let reports = self.reports(group).await?;
        // Where the store keeps everything for a while, some are decided.
        let waits = |other: &Marker| *other != marker && !decisions.has(other);
        let own = reports.iter().filter(|(other, by)| *by == machine && waits(other)).count();
        if own >= PENDING_OF_MACHINE_MAX {
            return Err(VaultError::Limit("markers of a machine that wait for other members"));
        }
        // Who is no member in this epoch says nothing of it.
        let counts = |by: &MachineId| *by != machine && members.binary_search(by).is_ok();
        let another = reports.iter().find(|(other, by)| *other == marker && counts(by));
        if let Some((_, by)) = another
            && let Some(before) = find::<Reported>(self, &report_name(group, marker, *by)).await?
            && (before.epoch, before.kind) != (epoch, kind)
        {
            return refuse("another member has reported it with another epoch or kind");
        }
        let reported = Reported {
            epoch,
            kind,
            commit,
            consistency: point.info.consistency,
            taken_at_ms,
            stored_at_ms: point.stored_at_ms,
            reported_at_ms: now_ms,
        };
        let name = report_name(group, marker, machine);
        if !create(self, &name, &reported).await? {
            match find::<Reported>(self, &name).await? {
                Some(before) if (before.epoch, before.kind, before.part(machine)) == (epoch, kind, part) => {}
                Some(_) => return refuse("the machine has reported it otherwise before"),
                // Decided meanwhile.
                None => {}
            }
        }
        self.decide(group, marker, members).await
    }

    /// A machine learnt that a marker came to nothing. If it is a point of the group already, it stays one. Answers whether it was
    /// decided with this. One that was taken out of the group can say so only of markers of before: it has reported it, and so has its coordinator, with
    /// the same epoch.
    ///
    /// # Errors
    /// [`VaultError::Marker`]: it is no marker on which this machine could say anything.
    pub async fn withdraw_marker(&self, machine: MachineId, group: GroupId, marker: Marker) -> Result<bool> {
        // As they are now: whoever was taken out just before is out.
        let groups = self.groups().await?;
        let refuse = |cause| Err(VaultError::Marker { marker, machine, cause });
        if !groups.ever_of(marker.coordinator).contains(&group) {
            return refuse("its coordinator never was a member of this group");
        }
        if !groups.is_member(group, machine) {
            let own = find::<Reported>(self, &report_name(group, marker, machine)).await?;
            let first = find::<Reported>(self, &report_name(group, marker, marker.coordinator)).await?;
            if own.is_none() || own.map(|report| report.epoch) != first.map(|report| report.epoch) {
                return refuse("the machine is no member of this group, and had no part in it");
            }
        }
        self.revoke(group, marker, Some(machine)).await
    }

    pub(super) async fn revoke(&self, group: GroupId, marker: Marker, by: Option<MachineId>) -> Result<bool> {
        let revoked = Decision::Revoked(Revoked { by, decided_at_ms: self.stamp_ms().await? });
        let made = create(self, &decision_name(group, marker), &revoked).await?;
        // It is decided. What is left is the sweep's.
        let _ = self.forget_reports(group, marker).await;
        Ok(made)
    }

    /// Decides on a marker, if all members have reported it.
    pub(super) async fn decide(
        &self,
        group: GroupId,
        marker: Marker,
        members: &[MachineId],
    ) -> Result<Outcome> {
        let there = self.reports_of(group, marker).await?;
        let missing = members.iter().filter(|machine| !there.contains(machine)).count();
        if missing > 0 {
            // Or it was decided, and they are deleted.
            return match self.decision(group, marker).await? {
                Some(_) => {
                    let _ = self.forget_reports(group, marker).await;
                    Ok(Outcome::Known)
                }
                None => Ok(Outcome::Waiting(missing)),
            };
        }
        let reports: BTreeMap<MachineId, Option<Reported>> = stream::iter(members.iter().copied())
            .map(|machine| async move {
                Ok::<_, VaultError>((machine, find(self, &report_name(group, marker, machine)).await?))
            })
            .buffer_unordered(READ_DEPTH)
            .try_collect()
            .await?;
        let Some(done) = complete(marker, &reports, self.stamp_ms().await?) else {
            return Ok(Outcome::Waiting(0));
        };
        let made = create(self, &decision_name(group, marker), &Decision::Complete(done.clone())).await?;
        let _ = self.forget_reports(group, marker).await;
        Ok(if made { Outcome::Made(done) } else { Outcome::Known })
    }

    /// Deletes the reports of a marker that was decided; answers whether they are gone.
    pub(super) async fn forget_reports(&self, group: GroupId, marker: Marker) -> Result<bool> {
        let mut gone = true;
        for machine in self.reports_of(group, marker).await? {
            gone &= self.control_forget(&report_name(group, marker, machine)).await?;
        }
        Ok(gone)
    }

    /// The reports of a group that wait for a decision.
    pub(super) async fn reports(&self, group: GroupId) -> Result<Vec<(Marker, MachineId)>> {
        let names = self.control_list(&folder_of(group)).await?;
        Ok(names.iter().filter_map(|name| parse(name)).map(|(_, marker, by)| (marker, by)).collect())
    }

    /// Who has reported a marker.
    async fn reports_of(&self, group: GroupId, marker: Marker) -> Result<Vec<MachineId>> {
        let all = self.reports(group).await?;
        Ok(all.into_iter().filter(|(of, _)| *of == marker).map(|(_, machine)| machine).collect())
    }
}

/// The point that these reports make; none if one is not there, or they contradict each other.
fn complete(
    marker: Marker,
    reports: &BTreeMap<MachineId, Option<Reported>>,
    now_ms: u64,
) -> Option<Complete> {
    let all: Vec<(MachineId, Reported)> =
        reports.iter().map(|(machine, report)| Some((*machine, (*report)?))).collect::<Option<_>>()?;
    let (_, coordinator) = all.iter().find(|(machine, _)| *machine == marker.coordinator)?;
    let (epoch, kind) = (coordinator.epoch, coordinator.kind);
    if all.iter().any(|(_, report)| (report.epoch, report.kind) != (epoch, kind)) {
        return None;
    }
    let least = all.iter().map(|(_, report)| report.consistency).min()?;
    // A member with hooks keeps such a marker only if they all did what they should. One without has no application to ask, and its own
    // point is filesystem-consistent. If nobody has any, nothing was asked to stand still.
    let has_applications = all.iter().any(|(_, report)| report.consistency == Consistency::Application);
    let consistency = match (kind, least) {
        (Kind::Application, Consistency::Filesystem) if has_applications => Consistency::Application,
        _ => least,
    };
    Some(Complete {
        epoch,
        kind,
        consistency,
        taken_at_ms: coordinator.taken_at_ms,
        stored_at_ms: all.iter().map(|(_, report)| report.stored_at_ms).max()?,
        decided_at_ms: now_ms,
        members: all.iter().map(|(machine, report)| report.part(*machine)).collect(),
    })
}
