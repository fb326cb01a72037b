//! `vault erase-machine`: a plan, a confirmation, then nobody can read it any more.

use crate::{
    CliError, Console, Exit,
    args::{EraseMachine, Global},
    confirm::{Question, confirm},
    context,
    output::{bytes_text, json, plain},
};
use highwater_delta::MachineId;
use highwater_vault::{Vault, erase};

pub(crate) async fn machine(
    global: &Global,
    what: &EraseMachine,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let machine = find(&vault, &what.machine).await?;
    let plan = erase::plan(&vault, machine).await?;
    let host = plan.host_name.as_deref().map(plain).filter(|host| !host.is_empty());
    let name = host.unwrap_or_else(|| machine.to_string());
    if !global.json {
        let points =
            plan.points.map_or("points nobody can read".to_owned(), |points| format!("{points} points"));
        let (objects, bytes) = (plan.objects, bytes_text(plan.bytes));
        writeln!(console.err, "Erase machine {machine} ({name}): {points}, {objects} objects, {bytes}.")?;
        writeln!(
            console.err,
            "  Its key is deleted first: NOBODY can read anything of it again here. A copy of the vault can be read as long as it holds machines/{machine}/key."
        )?;
        writeln!(
            console.err,
            "  It can never be enrolled again under this id; a session of it ends within seconds."
        )?;
        if let Some(group) = vault.groups().await?.of_machine(machine) {
            let group = plain(&group.name);
            writeln!(
                console.err,
                "  It belongs to group {group}: points of the group that cover it are not offered any more, and new ones need it. `highwater group remove {group} {machine}` takes it out, before or afterwards."
            )?;
        }
        if plan.begun {
            writeln!(console.err, "  It was begun earlier; this does the rest.")?;
        }
    }
    if !what.yes {
        let question = Question {
            word: &name,
            prompt: format!("Type {name} to erase it"),
            unasked: format!("{name} would be erased"),
            refused: format!("{name} was not confirmed and is untouched"),
        };
        confirm(console, global.json, question)?;
    }
    let report = erase::erase(&vault, machine).await?;
    if global.json {
        json(console, &serde_json::json!({ "vault": vault.id(), "plan": plan, "erased": report }))?;
    } else {
        let (deleted, bytes) = (report.deleted, bytes_text(report.deleted_bytes));
        writeln!(console.out, "erased machine {machine}: {deleted} objects deleted, {bytes}")?;
        if report.left > 0 {
            writeln!(
                console.out,
                "{} objects are left, which nobody can read: a session of it was under way, or the store kept them. Run it again.",
                report.left
            )?;
        }
    }
    Ok(Exit::Success)
}

/// One that was erased is no machine of the vault, but something may be left of it.
async fn find(vault: &Vault, text: &str) -> Result<MachineId, CliError> {
    match text.parse::<MachineId>() {
        Ok(machine) if vault.is_erased(machine).await? => Ok(machine),
        _ => context::machine(vault, text).await,
    }
}
