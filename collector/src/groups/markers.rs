//! What becomes of markers.

use crate::shared::Shared;
use crate::{CollectorError, CollectorError as Error};
use highwater_delta::{Code, GroupId, MachineId};
use highwater_group::{Kind, Marker};
use highwater_vault::groups::{Complete, Outcome, Report};
use highwater_vault::{MachineState, VaultError};
use highwater_wire::message::Kept;
use std::collections::HashSet;
use std::sync::Arc;

/// A machine keeps a marker.
///
/// # Errors
/// [`CollectorError::Marker`]: it cannot be so; nothing was changed. [`CollectorError::Vault`]: it may have been taken or not.
pub async fn kept(shared: &Shared, state: &MachineState, kept: Kept) -> Result<(), CollectorError> {
    let Kept { group, epoch, marker, kind, commit, taken_at_ms } = kept;
    let report = Report { group, epoch, marker, kind, commit, taken_at_ms };
    match shared.vault.keep_marker(state, report).await.map_err(of_marker)? {
        Outcome::Made(done) => made(shared, group, marker, Some(&done)).await,
        Outcome::Waiting(missing) => {
            tracing::debug!(machine = %state.machine, %group, %marker, missing, "a member keeps a marker");
        }
        Outcome::Known => {}
    }
    Ok(())
}

/// A machine learnt that a marker came to nothing.
///
/// # Errors
/// As [`kept`].
pub async fn withdrawn(
    shared: &Shared,
    machine: MachineId,
    group: GroupId,
    marker: Marker,
) -> Result<(), CollectorError> {
    if shared.vault.withdraw_marker(machine, group, marker).await.map_err(of_marker)? {
        let name = name_of(shared, group).await;
        shared.metrics.groups.revoked(&name);
        if let Some(left_out) = shared.say_of_machine(machine, tracing::Level::INFO) {
            tracing::info!(%machine, group = name, %marker, left_out, "a marker came to nothing");
        }
    }
    Ok(())
}

/// A marker that a machine coordinated has ended: every member keeps it, or it came to nothing, and this is why.
pub async fn ended(
    shared: &Shared,
    machine: MachineId,
    group: GroupId,
    marker: Marker,
    kind: Kind,
    failed: Option<String>,
) {
    let groups = shared.vault.groups_known().await;
    let of_it = groups.of_machine(machine).filter(|own| own.id == group && marker.coordinator == machine);
    // Whoever was taken out meanwhile has nothing more to say of it.
    let Some(own) = of_it else { return };
    let name = &own.name;
    let Some(why) = failed else {
        let before = shared.failures.kept(group, kind).map_or(0, |row| row.count);
        tracing::debug!(%machine, group = name, %marker, ?kind, before, "all members keep a marker");
        return;
    };
    shared.metrics.groups.failed(name);
    let (in_a_row, is_told) = shared.failures.failed(group, kind, &why);
    if is_told {
        if let Some(left_out) = shared.say_of_machine(machine, tracing::Level::WARN) {
            tracing::warn!(%machine, group = name, %marker, ?kind, code = %Code(MARKERS_FAIL.0), action = MARKERS_FAIL.1, why, in_a_row, left_out,
                "a group's points fail one after the other");
        }
    } else if let Some(left_out) = shared.say_of_machine(machine, tracing::Level::INFO) {
        tracing::info!(%machine, group = name, %marker, ?kind, why, in_a_row, left_out, "a group's point has failed");
    }
}

/// Decides on what nobody did, and tells how old the groups' points are; deletes what nobody needs any more, if it is time to. Of documents that cannot
/// be read those are told that were not `known` to be damaged.
pub async fn sweep(shared: &Shared, tidy: bool, known: &mut HashSet<String>) -> Result<(), VaultError> {
    let swept = shared.vault.sweep_groups().await?;
    let mut damaged: Vec<Arc<VaultError>> = swept.damaged.into_iter().map(Arc::new).collect();
    for (group, marker) in swept.made {
        made(shared, group, marker, None).await;
    }
    for (group, marker) in swept.revoked {
        let name = name_of(shared, group).await;
        shared.metrics.groups.revoked(&name);
        tracing::warn!(group = name, %marker, code = %Code(MARKER_LATE.0), action = MARKER_LATE.1,
            "a marker came to nothing: not all members have stored it in time");
    }
    let groups = shared.vault.groups_known().await;
    let mut names = Vec::new();
    for group in groups.living() {
        let health = shared.vault.group_health(group.id).await?;
        damaged.extend(health.damaged);
        // One that never had a point is as late as it is old.
        if let Some(since_ms) = health.newest_ms.or_else(|| groups.made_ms(group.id)) {
            shared.metrics.groups.newest(&group.name, since_ms);
        }
        names.push(group.name.as_str());
    }
    shared.metrics.groups.only(&names);
    shared.failures.only(|id| groups.get(id).is_some_and(|group| !group.deleted));
    tell_damage(&damaged, known);
    if tidy { shared.vault.tidy_groups().await } else { Ok(()) }
}

/// Once of each, or a log would be full of it.
fn tell_damage(damaged: &[Arc<VaultError>], known: &mut HashSet<String>) {
    let texts: HashSet<String> = damaged.iter().map(|error| error.to_string()).collect();
    for error in damaged {
        if known.insert(error.to_string()) {
            tracing::error!(code = %Code(error.code()), action = error.action(), %error, "a document on a group's marker cannot be read; it is passed over");
        }
    }
    // One that was brought back may be damaged anew.
    known.retain(|text| texts.contains(text));
}

/// What is said of a marker for which not all members have reported in time.
const MARKER_LATE: (u16, &str) =
    (1371, "look for a member that is cut off, or cannot send as fast as it writes");

/// What is said of markers that come to nothing one after the other.
const MARKERS_FAIL: (u16, &str) = (
    1376,
    "see to what the cause says: the member that it names must run, be connected, reach the others over port 20004, and be done in the time that the group gives (`highwater group show`)",
);

async fn made(shared: &Shared, group: GroupId, marker: Marker, done: Option<&Complete>) {
    let name = name_of(shared, group).await;
    shared.metrics.groups.made(&name, done.map(|done| done.taken_at_ms));
    let members = done.map(|done| done.members.len());
    tracing::info!(group = name, %marker, members, "a point of a group was made");
}

/// For people, and as a label: of those that there are.
async fn name_of(shared: &Shared, group: GroupId) -> String {
    let groups = shared.vault.groups_known().await;
    groups.get(group).map_or_else(String::new, |group| group.name.clone())
}

fn of_marker(error: VaultError) -> CollectorError {
    match error {
        VaultError::Marker { .. } | VaultError::Limit(_) => Error::Marker(error),
        other => other.into(),
    }
}
