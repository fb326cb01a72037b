//! Groups and their points as documents.

use crate::{maintain::time_text, output::rfc3339};
use highwater_delta::{CommitId, Consistency, MachineId};
use highwater_group::Kind;
use highwater_vault::{
    Vault,
    groups::{Group, GroupPoint},
};
use serde_json::{Value, json as document};
use std::{collections::HashMap, time::Duration};

/// Host names by machine.
pub(crate) type Names = HashMap<MachineId, String>;

/// What these machines are called; one that was erased, or cannot be read, by its id.
pub(crate) async fn host_names(vault: &Vault, machines: impl Iterator<Item = MachineId>) -> Names {
    let mut names = Names::new();
    for machine in machines {
        if let std::collections::hash_map::Entry::Vacant(entry) = names.entry(machine) {
            let name = vault.host_name(machine).await.ok().filter(|name| !name.is_empty());
            entry.insert(name.unwrap_or_else(|| machine.to_string()));
        }
    }
    names
}

fn every(time: Option<Duration>) -> Option<String> {
    time.map(time_text)
}

pub(super) fn group_document(group: &Group, names: &Names) -> Value {
    let members: Vec<Value> = group
        .members
        .iter()
        .map(|machine| document!({ "machine": machine, "host-name": names.get(machine) }))
        .collect();
    document!({
        "group": group.id,
        "name": group.name,
        "epoch": group.epoch,
        "members": members,
        "crash-every": every(group.times.crash_every),
        "application-every": every(group.times.application_every),
        "hold": time_text(group.times.hold_max),
        "prepare": time_text(group.times.prepare_max),
        "deleted": group.deleted,
        "since": rfc3339(group.since_ms),
    })
}

pub(crate) fn point_document(point: &GroupPoint, names: &Names) -> Value {
    let members: Vec<Value> = point
        .done
        .members
        .iter()
        .map(|member| document!({ "machine": member.machine, "host-name": names.get(&member.machine), "point": member.commit }))
        .collect();
    document!({
        "point": point.marker.to_string(),
        "epoch": point.done.epoch,
        "kind": point.done.kind,
        "consistency": point.done.consistency,
        "taken-at": rfc3339(point.done.taken_at_ms),
        "taken-at-ms": point.done.taken_at_ms,
        "stored-at-ms": point.done.stored_at_ms,
        "members": members,
    })
}

pub(super) fn kind_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Crash => "crash",
        Kind::Application => "application",
    }
}

pub(crate) fn consistency_text(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Crash => "crash",
        Consistency::Filesystem => "filesystem",
        Consistency::Application => "application",
    }
}

/// Which of a machine's points belong to points of groups: the group's name, and the marker.
pub(crate) async fn marker_of_points(
    vault: &Vault,
    machine: MachineId,
) -> highwater_vault::Result<HashMap<CommitId, (String, String)>> {
    let groups = vault.groups().await?;
    let mut all = HashMap::new();
    for id in groups.ever_of(machine) {
        let name = groups.get(id).map_or_else(String::new, |group| group.name.clone());
        for point in vault.group_points(id).await? {
            let commit = point.done.part_of(machine).map(|part| part.commit);
            all.extend(commit.map(|commit| (commit, (name.clone(), point.marker.to_string()))));
        }
    }
    Ok(all)
}
