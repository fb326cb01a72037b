//! What groups there are, and how they stand.

use super::document::{consistency_text, group_document, host_names, kind_text, point_document};
use crate::{
    CliError, Console, Exit,
    args::Global,
    context,
    maintain::time_text,
    output::{age, json, plain, rfc3339, table},
};
use highwater_vault::{
    Vault,
    groups::{Group, GroupPoint},
};
use serde_json::{Value, json as document};
use std::time::Duration;

fn every(time: Option<Duration>) -> String {
    time.map_or_else(|| "never".to_owned(), time_text)
}

pub(super) async fn list(
    global: &Global,
    vault: &Vault,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let groups = vault.groups().await?;
    let (mut documents, mut rows) = (Vec::new(), Vec::new());
    for group in groups.living() {
        let newest = vault.group_points(group.id).await?.into_iter().next();
        let taken = newest.as_ref().map(|point| point.done.taken_at_ms);
        rows.push(vec![
            plain(&group.name),
            group.id.to_string(),
            group.members.len().to_string(),
            every(group.times.crash_every),
            every(group.times.application_every),
            taken.map_or_else(|| "-".to_owned(), rfc3339),
            taken.map_or_else(|| "-".to_owned(), age),
        ]);
        let names = host_names(vault, group.members.iter().copied()).await;
        let mut one = group_document(group, &names);
        one["latest-point"] = newest.map(|point| point_document(&point, &names)).into();
        documents.push(one);
    }
    if global.json {
        json(console, &document!({ "vault": vault.id(), "groups": documents }))?;
    } else if rows.is_empty() {
        writeln!(console.out, "There are no groups.")?;
    } else {
        table(
            console,
            &["NAME", "GROUP", "MEMBERS", "CRASH EVERY", "APPLICATION EVERY", "LATEST", "AGE"],
            &rows,
        )?;
    }
    Ok(Exit::Success)
}

pub(super) async fn show(
    global: &Global,
    vault: &Vault,
    text: &str,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let group = context::group(vault, text, true).await?;
    let points = vault.group_points(group.id).await?;
    let pending = vault.group_pending(group.id).await?;
    let addresses = vault.group_addresses().await?;
    let of_points = points.iter().flat_map(|point| &point.done.members).map(|member| member.machine);
    let of_pending = pending.iter().flat_map(|p| p.missing.iter().chain(&p.reported)).copied();
    let names = host_names(vault, group.members.iter().copied().chain(of_points).chain(of_pending)).await;
    if global.json {
        let mut whole = group_document(&group, &names);
        let members = group.members.iter().map(|machine| {
            document!({ "machine": machine, "host-name": names.get(machine), "address": addresses.get(machine) })
        });
        whole["members"] = members.collect::<Vec<Value>>().into();
        whole["points"] = points.len().into();
        whole["latest-point"] = points.first().map(|point| point_document(point, &names)).into();
        let waiting = pending.iter().map(|p| {
            document!({
                "point": p.marker.to_string(), "kind": p.kind, "since": rfc3339(p.since_ms),
                "reported": p.reported, "missing": p.missing,
            })
        });
        whole["waiting"] = waiting.collect::<Vec<Value>>().into();
        json(console, &whole)?;
        return Ok(Exit::Success);
    }
    head(&group, points.first(), points.len(), console)?;
    let rows: Vec<Vec<String>> = group
        .members
        .iter()
        .map(|machine| {
            let address = addresses.get(machine).map_or("not known yet", String::as_str);
            vec![plain(&names[machine]), machine.to_string(), plain(address)]
        })
        .collect();
    if !rows.is_empty() {
        table(console, &["MEMBER", "MACHINE", "REACHED AT"], &rows)?;
    }
    if let Some(newest) = pending.first() {
        let missing: Vec<String> = newest.missing.iter().map(|machine| plain(&names[machine])).collect();
        let since = rfc3339(newest.since_ms);
        if missing.is_empty() {
            let text =
                "is not offered yet: a collector has still to decide on it, which takes a minute or two";
            writeln!(console.out, "A point of {since} {text}.")?;
        } else {
            let missing = missing.join(", ");
            writeln!(console.out, "A point of {since} is not offered before it is stored by {missing}.")?;
        }
    }
    Ok(Exit::Success)
}

fn head(
    group: &Group,
    newest: Option<&GroupPoint>,
    count: usize,
    console: &mut Console<'_>,
) -> Result<(), CliError> {
    let out = &mut console.out;
    let deleted = if group.deleted { ", DELETED" } else { "" };
    writeln!(out, "{} ({}), epoch {}{deleted}", plain(&group.name), group.id, group.epoch)?;
    let times = &group.times;
    writeln!(out, "  crash-consistent points: {}", every(times.crash_every))?;
    writeln!(out, "  application-consistent points: {}", every(times.application_every))?;
    let (hold, prepare) = (time_text(times.hold_max), time_text(times.prepare_max));
    writeln!(out, "  members are held for {hold} at most, and may prepare for {prepare}")?;
    match newest {
        Some(point) => {
            let (taken, old) = (rfc3339(point.done.taken_at_ms), age(point.done.taken_at_ms));
            writeln!(out, "  {count} points; the newest of {taken}, {old} ago: {}", point.marker)?;
        }
        None => writeln!(out, "  no point yet")?,
    }
    Ok(())
}

pub(super) async fn points(
    global: &Global,
    vault: &Vault,
    text: &str,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let group = context::group(vault, text, true).await?;
    let points = vault.group_points(group.id).await?;
    let machines = points.iter().flat_map(|point| &point.done.members).map(|member| member.machine);
    let names = host_names(vault, machines).await;
    if global.json {
        let all: Vec<Value> = points.iter().map(|point| point_document(point, &names)).collect();
        json(console, &document!({ "group": group.id, "name": group.name, "points": all }))?;
        return Ok(Exit::Success);
    }
    if points.is_empty() {
        writeln!(console.out, "{} has no point yet.", plain(&group.name))?;
        return Ok(Exit::Success);
    }
    let row = |point: &GroupPoint| {
        let members = point.done.members.iter();
        let members = members.map(|member| format!("{}:{}", plain(&names[&member.machine]), member.commit));
        vec![
            rfc3339(point.done.taken_at_ms),
            age(point.done.taken_at_ms),
            kind_text(point.done.kind).to_owned(),
            consistency_text(point.done.consistency).to_owned(),
            point.marker.to_string(),
            members.collect::<Vec<_>>().join(" "),
        ]
    };
    let rows: Vec<Vec<String>> = points.iter().map(row).collect();
    table(console, &["TAKEN", "AGE", "KIND", "CONSISTENCY", "POINT", "MEMBERS"], &rows)?;
    Ok(Exit::Success)
}
