//! What becomes of markers.

use crate::shared::Shared;
use crate::{CollectorError, CollectorError as Error};
use highwater_delta::{Code, GroupId, MachineId};
use highwater_group::Marker;
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
    let Kept { group, epoch, marker, kind, commit } = kept;
    let report = Report { group, epoch, marker, kind, commit };
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
        if let Some(taken_at_ms) = health.newest_ms {
            shared.metrics.groups.newest(&group.name, taken_at_ms);
        }
        names.push(group.name.as_str());
    }
    shared.metrics.groups.only(&names);
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
