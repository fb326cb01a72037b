//! Making, changing and deleting groups.

use super::document::{group_document, host_names};
use crate::{
    CliError, Console, Exit,
    args::{Every, Global, GroupVerb, Members},
    confirm::{Question, confirm},
    context,
    maintain::time_text,
    output::{count, json, plain},
};
use highwater_delta::MachineId;
use highwater_vault::{
    Vault, VaultError,
    groups::{Group, Groups, Times},
};

pub(super) async fn run(
    global: &Global,
    vault: &Vault,
    verb: &GroupVerb,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let (group, said) = match verb {
        GroupVerb::Create { name, machines, crash_every, application_every, hold, prepare } => {
            let times = Times {
                crash_every: crash_every.0,
                application_every: application_every.0,
                hold_max: *hold,
                prepare_max: *prepare,
            };
            let group = Group::new(name, meant(vault, machines).await?, times);
            let group = vault.change_groups(|_| Ok(group.clone())).await?;
            let said = "Each member must reach the others on port 20004; the collectors tell them who they are within seconds. `highwater group show` tells how it goes.";
            (group, said.to_owned())
        }
        GroupVerb::Add(members) => add(vault, members).await?,
        GroupVerb::Remove(members) => remove(vault, members).await?,
        GroupVerb::Set { group, name, crash_every, application_every, hold, prepare } => {
            let is_something = name.is_some()
                || crash_every.is_some()
                || application_every.is_some()
                || hold.is_some()
                || prepare.is_some();
            if !is_something {
                return Err(CliError::Usage(
                    "there is nothing to set: give --name, --crash-every, --application-every, --hold or --prepare"
                        .to_owned(),
                ));
            }
            let id = context::group(vault, group, false).await?.id;
            let every = |given: &Option<Every>, before| given.map_or(before, |every| every.0);
            let changed = vault.change_groups(|groups| {
                let before = there(groups, id)?;
                let times = Times {
                    crash_every: every(crash_every, before.times.crash_every),
                    application_every: every(application_every, before.times.application_every),
                    hold_max: hold.unwrap_or(before.times.hold_max),
                    prepare_max: prepare.unwrap_or(before.times.prepare_max),
                };
                Ok(Group { name: name.clone().unwrap_or(before.name.clone()), times, ..before })
            });
            let group = changed.await?;
            let times = &group.times;
            let said = format!(
                "Crash-consistent points: {}; application-consistent: {}; frozen for {} at most, {} to prepare. Its members learn it within seconds.",
                every_text(times.crash_every),
                every_text(times.application_every),
                time_text(times.hold_max),
                time_text(times.prepare_max)
            );
            (group, said)
        }
        GroupVerb::Delete { group, yes } => delete(global, vault, group, *yes, console).await?,
        GroupVerb::List | GroupVerb::Show { .. } | GroupVerb::Points { .. } => {
            return Err(CliError::Usage("this changes no group".to_owned()));
        }
    };
    let names = host_names(vault, group.members.iter().copied()).await;
    if global.json {
        json(console, &group_document(&group, &names))?;
        return Ok(Exit::Success);
    }
    let state = if group.deleted { "is deleted" } else { "is set" };
    let members = count(group.members.len() as u64, "member");
    writeln!(console.out, "Group {} ({}) {state}: {members}.", plain(&group.name), group.id)?;
    if !said.is_empty() {
        writeln!(console.out, "{said}")?;
    }
    Ok(Exit::Success)
}

fn every_text(time: Option<std::time::Duration>) -> String {
    time.map_or_else(|| "none by themselves".to_owned(), |time| format!("every {}", time_text(time)))
}

async fn add(vault: &Vault, what: &Members) -> Result<(Group, String), CliError> {
    let id = context::group(vault, &what.group, false).await?.id;
    let new = meant(vault, &what.machines).await?;
    let changed = vault.change_groups(|groups| {
        let mut group = there(groups, id)?;
        group.members.extend(
            new.iter().filter(|machine| !groups.get(id).is_some_and(|g| g.members.contains(machine))),
        );
        Ok(group)
    });
    let said = "Its points from now on need all of them; those that it has stay as they are.";
    Ok((changed.await?, said.to_owned()))
}

async fn remove(vault: &Vault, what: &Members) -> Result<(Group, String), CliError> {
    let group = context::group(vault, &what.group, false).await?;
    let (id, mut gone) = (group.id, Vec::new());
    for text in &what.machines {
        gone.push(member(vault, &group, text).await?);
    }
    let changed = vault.change_groups(|groups| {
        let mut group = there(groups, id)?;
        if let Some(other) = gone.iter().find(|machine| !group.members.contains(machine)) {
            return Err(VaultError::Group(format!("machine {other} is no member of it")));
        }
        group.members.retain(|machine| !gone.contains(machine));
        if group.members.is_empty() {
            return Err(VaultError::Group(
                "nobody would be left: delete it instead (`highwater group delete`)".to_owned(),
            ));
        }
        Ok(group)
    });
    let said = "Whoever was taken out goes on with points of its own, which are no longer of one instant with the group's. The points that the group has still cover it.";
    Ok((changed.await?, said.to_owned()))
}

async fn delete(
    global: &Global,
    vault: &Vault,
    group: &str,
    yes: bool,
    console: &mut Console<'_>,
) -> Result<(Group, String), CliError> {
    let group = context::group(vault, group, false).await?;
    if !yes {
        let (name, members) = (plain(&group.name), count(group.members.len() as u64, "machine"));
        let question = Question {
            word: &name,
            prompt: format!(
                "The {members} of {name} would have no more points of one instant. Type {name} to delete the group"
            ),
            unasked: format!("group {name} would be deleted; say --yes"),
            refused: format!("group {name} stays as it is"),
        };
        confirm(console, global.json, question)?;
    }
    let changed = vault.change_groups(|groups| Ok(Group { deleted: true, ..there(groups, group.id)? }));
    let said = format!(
        "Its machines go on with points of their own. The points that it has stay: `highwater group points {}`.",
        group.id
    );
    Ok((changed.await?, said))
}

/// The group as it is now.
fn there(groups: &Groups, id: highwater_delta::GroupId) -> Result<Group, VaultError> {
    groups.get(id).filter(|group| !group.deleted).cloned().ok_or(VaultError::UnknownGroup(id))
}

/// The member that is meant: also one that was erased, by its id or the begin of it.
async fn member(vault: &Vault, group: &Group, text: &str) -> Result<MachineId, CliError> {
    let begin = text.to_ascii_lowercase();
    let begins = |machine: &&MachineId| !begin.is_empty() && machine.to_string().starts_with(&begin);
    match group.members.iter().filter(begins).collect::<Vec<_>>()[..] {
        [one] => Ok(*one),
        _ => context::machine(vault, text).await,
    }
}

/// The machines that are meant, each once.
async fn meant(vault: &Vault, texts: &[String]) -> Result<Vec<MachineId>, CliError> {
    let mut machines = Vec::new();
    for text in texts {
        let machine = context::machine(vault, text).await?;
        if !machines.contains(&machine) {
            machines.push(machine);
        }
    }
    Ok(machines)
}
