//! What crashes, silence and time leave.

use super::{
    Decision, Outcome, PENDING_MAX, REVOKED_FOR,
    cache::{decision_name, find},
    decide::{self, Reported},
    millis,
};
use crate::{Result, Vault, VaultError};
use highwater_delta::{GroupId, MachineId};
use highwater_group::Marker;
use std::collections::{BTreeMap, BTreeSet};

/// What was decided by [`Vault::sweep_groups`].
#[derive(Debug, Default)]
pub struct Swept {
    /// Markers that became points of their groups.
    pub made: Vec<(GroupId, Marker)>,
    /// Markers that came to nothing.
    pub revoked: Vec<(GroupId, Marker)>,
    /// Documents that cannot be read, and so were passed over: each with what is wrong with it.
    pub damaged: Vec<VaultError>,
}

impl Vault {
    /// Decides on markers on which nobody else did: all have reported, and whoever was to decide crashed; or they have waited for too long.
    pub async fn sweep_groups(&self) -> Result<Swept> {
        let mut reported: BTreeMap<(GroupId, Marker), Vec<MachineId>> = BTreeMap::new();
        for name in self.control_list("group-kept").await? {
            if let Some((group, marker, machine)) = decide::parse(&name) {
                reported.entry((group, marker)).or_default().push(machine);
            }
        }
        let mut swept = Swept::default();
        let mut kept = self.groups.kept_by_store.lock().await;
        kept.retain(|marker| reported.contains_key(marker));
        reported.retain(|marker, _| !kept.contains(marker));
        if reported.is_empty() {
            return Ok(swept);
        }
        let groups = self.groups().await?;
        let now_ms = self.stamp_ms().await?;
        for ((group, marker), machines) in reported {
            match self.decision(group, marker).await {
                Ok(Some(_)) => {
                    if !self.forget_reports(group, marker).await? {
                        kept.insert((group, marker));
                    }
                    continue;
                }
                Ok(None) => {}
                // It was decided: the reports stay, should the document be brought back.
                Err(error) if error.is_damage() => {
                    swept.damaged.push(error);
                    continue;
                }
                Err(error) => return Err(error),
            }
            // Whoever is no member any more makes no marker late that the others have not begun.
            let (mut epoch, mut oldest_ms, mut newest_ms, mut whole) = (None, u64::MAX, 0, true);
            for machine in machines.iter().copied() {
                let name = decide::report_name(group, marker, machine);
                let reported_ms = match find::<Reported>(self, &name).await {
                    Ok(Some(report)) => {
                        if machine == marker.coordinator {
                            epoch = Some(report.epoch);
                        }
                        report.reported_at_ms
                    }
                    Ok(None) => continue,
                    // No point without it; and it waits no longer than another.
                    Err(error) if error.is_damage() => {
                        swept.damaged.push(error);
                        whole = false;
                        self.control_modified_ms(&name).await?
                    }
                    Err(error) => return Err(error),
                };
                newest_ms = newest_ms.max(reported_ms);
                if groups.is_member(group, machine) {
                    oldest_ms = oldest_ms.min(reported_ms);
                }
            }
            let members = epoch.and_then(|epoch| groups.membership(group, epoch));
            if let Some(members) = members.filter(|_| whole) {
                match self.decide(group, marker, members).await? {
                    Outcome::Made(_) => {
                        swept.made.push((group, marker));
                        continue;
                    }
                    Outcome::Known => continue,
                    Outcome::Waiting(_) => {}
                }
            }
            let is_late = |since_ms: u64| since_ms.saturating_add(millis(PENDING_MAX)) < now_ms;
            if oldest_ms == u64::MAX {
                // None of a member: nothing is to be decided, and nothing will come of them.
                if is_late(newest_ms) {
                    for machine in machines {
                        self.control_forget(&decide::report_name(group, marker, machine)).await?;
                    }
                }
            } else if is_late(oldest_ms) && self.revoke(group, marker, None).await? {
                swept.revoked.push((group, marker));
            }
        }
        Ok(swept)
    }

    /// Deletes documents that nobody needs any more: of markers that came to nothing long ago, of groups' points of machines that were
    /// erased, and where such machines were reached.
    pub async fn tidy_groups(&self) -> Result<()> {
        let groups = self.groups().await?;
        let erased: BTreeSet<MachineId> = self.erased_machines().await?.into_iter().collect();
        let now_ms = self.stamp_ms().await?;
        for group in groups.ever() {
            for (marker, decision) in self.decisions(group.id).await?.decided.iter() {
                let goes = match &**decision {
                    Decision::Revoked(revoked) => {
                        revoked.decided_at_ms.saturating_add(millis(REVOKED_FOR)) < now_ms
                    }
                    Decision::Complete(done) => done.members.iter().any(|m| erased.contains(&m.machine)),
                };
                if goes {
                    self.control_forget(&decision_name(group.id, *marker)).await?;
                }
            }
        }
        self.tidy_addresses(&erased).await?;
        self.tidy_requests(now_ms).await
    }
}
