//! Members of a group, as they were at one instant: each into a directory of its own.

use super::{Planned, carry_out, prepare};
use crate::{
    CliError, Console, Exit,
    args::{Global, PointChoice, Recover},
    context,
    group::{host_names, point_document},
    output::{count, json, plain, rfc3339},
};
use highwater_delta::{Consistency, MachineId};
use highwater_vault::{
    Vault, VaultError,
    groups::{Group, GroupPoint, MemberPoint},
};
use serde_json::{Value, json as document};
use std::{collections::HashSet, path::PathBuf};

pub(super) async fn recover(
    global: &Global,
    vault: &Vault,
    group: &str,
    what: &Recover,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let group = context::group(vault, group, true).await?;
    if what.to.exists() && !what.to.is_dir() {
        let cause = "machines of a group are recovered into a directory".to_owned();
        return Err(VaultError::Target { path: what.to.clone(), cause }.into());
    }
    let point = choose(vault, &group, what.point).await?;
    let (chosen, others) = members(vault, &point, &what.members).await?;
    let names = host_names(vault, point.done.members.iter().map(|member| member.machine)).await;
    let name = |machine: &MachineId| plain(&names[machine]);
    let others: Vec<String> = others.iter().map(name).collect();
    if !global.json {
        let (taken, all) =
            (rfc3339(point.done.taken_at_ms), count(point.done.members.len() as u64, "member"));
        writeln!(console.err, "Point {} of {} ({all}), taken {taken}.", point.marker, plain(&group.name))?;
        if !others.is_empty() {
            writeln!(console.err, "{}", subset(&others))?;
        }
    }
    let mut taken = HashSet::new();
    let mut all: Vec<Planned> = Vec::new();
    for MemberPoint { machine, commit, .. } in &chosen {
        let to = what.to.join(directory(&names[machine], *machine, &mut taken));
        let at = PointChoice::Number(*commit);
        all.push(prepare(vault, *machine, at, to, what, global.json, console).await?);
    }
    let (mut documents, mut is_whole, mut ended) = (Vec::new(), true, Ok::<(), VaultError>(()));
    for planned in &all {
        if !global.json {
            writeln!(console.out, "{}:", plain(&planned.state.host_name))?;
        }
        let (document, whole, done) = carry_out(vault, planned, what, global.json, console).await?;
        is_whole &= whole;
        documents.push(document);
        if let Err(error) = done {
            ended = Err(error);
            break;
        }
    }
    ended?;
    if global.json {
        json(console, &whole(vault, &group, &point, &names, documents, &others))?;
    } else {
        let machines = count(all.len() as u64, "machine");
        let taken = rfc3339(point.done.taken_at_ms);
        writeln!(console.out, "{machines} recovered as they were at one instant, {taken}.")?;
        if !others.is_empty() {
            writeln!(console.out, "{}", subset(&others))?;
        }
    }
    Ok(if is_whole { Exit::Success } else { Exit::Damaged })
}

fn whole(
    vault: &Vault,
    group: &Group,
    point: &GroupPoint,
    names: &std::collections::HashMap<MachineId, String>,
    machines: Vec<Value>,
    others: &[String],
) -> Value {
    document!({
        "vault": vault.id(),
        "group": group.id,
        "name": group.name,
        "point": point_document(point, names),
        "machines": machines,
        "not-recovered": others,
        "meaning": (!others.is_empty()).then(|| subset(others)),
    })
}

/// What it means that not all are recovered.
fn subset(others: &[String]) -> String {
    format!(
        "NOT recovered: {}. They stay as they are now, and are not brought to that instant: messages between them and the recovered machines may be missing, or be there twice.",
        others.join(", ")
    )
}

async fn choose(vault: &Vault, group: &Group, choice: PointChoice) -> Result<GroupPoint, CliError> {
    let mut newest_first = vault.group_points(group.id).await?.into_iter();
    let name = plain(&group.name);
    let (found, none) = match choice {
        PointChoice::Latest => {
            (newest_first.next(), format!("{name} has no point of which every part is there"))
        }
        PointChoice::LatestApplication => (
            newest_first.find(|point| point.done.consistency == Consistency::Application),
            format!("{name} has no application-consistent point of which every part is there"),
        ),
        PointChoice::Marker(marker) => (
            newest_first.find(|point| point.marker == marker),
            format!("{name} has no point {marker} of which every part is there"),
        ),
        PointChoice::Number(_) => {
            return Err(CliError::Usage(
                "a point of a group has no number: give its marker, as `highwater group points` shows it"
                    .to_owned(),
            ));
        }
    };
    found.ok_or(CliError::Point(none))
}

/// Those of the point that are meant, and the others.
async fn members(
    vault: &Vault,
    point: &GroupPoint,
    texts: &[String],
) -> Result<(Vec<MemberPoint>, Vec<MachineId>), CliError> {
    let all = &point.done.members;
    if texts.is_empty() {
        return Ok((all.clone(), Vec::new()));
    }
    let mut meant = HashSet::new();
    for text in texts {
        let machine = context::machine(vault, text).await?;
        if point.done.part_of(machine).is_none() {
            return Err(CliError::Machine(format!("{text:?} is no member of the group in this point")));
        }
        meant.insert(machine);
    }
    let (chosen, others): (Vec<_>, Vec<_>) = all.iter().partition(|member| meant.contains(&member.machine));
    Ok((chosen, others.iter().map(|member| member.machine).collect()))
}

/// A directory's name for a machine, which no other has.
fn directory(host: &str, machine: MachineId, taken: &mut HashSet<String>) -> PathBuf {
    let fits = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    let mut name: String = host.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    while name.len() > 200 {
        name.pop();
    }
    if name.starts_with('.') || name.is_empty() || !taken.insert(name.clone()) {
        name = format!("{name}_{machine}").trim_start_matches('.').to_owned();
    }
    name.into()
}
