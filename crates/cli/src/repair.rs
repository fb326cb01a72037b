//! `vault repair`: everything is verified, a plan is shown, and after a confirmation it is done. What is lost is said in any case.

use crate::{
    CliError, Console, Exit,
    args::{Global, Repair, Verify},
    context,
    output::{bytes_text, json, plain},
    verify,
};
use highwater_delta::MachineId;
use highwater_vault::{
    Location, Pace, Vault, VaultError, remove_left_over,
    repair::{self, Losses, Plan, Report, Settings},
    verify::{Pass, resume},
};
use serde_json::{Value, json as document};
use std::{collections::BTreeMap, io::Write, sync::Arc};

/// Ranges and points named in a text; of more, how many.
const NAMED_MAX: usize = 12;

pub(crate) async fn repair(
    global: &Global,
    what: &Repair,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let (vault, location) = context::open_at(global, console).await?;
    let machine = match &what.machine {
        Some(text) => Some(context::machine(&vault, text).await?),
        None => None,
    };
    let found = {
        let asked =
            Verify { machine: None, sample: None, seed: None, rate: what.rate, resume: what.resume.clone() };
        let known = match &what.resume {
            Some(path) => resume::load(path, &vault, machine, Some(None))?,
            None => None,
        };
        let mut pass = known.unwrap_or_else(|| Pass::new(&vault, machine, None));
        verify::run(&vault, &mut pass, &asked, console.terminal && !global.json).await?
    };
    let settings =
        Settings { grace: what.grace, pace: Arc::new(Pace::new(what.rate)), ..Settings::default() };
    let machines = match machine {
        Some(machine) => vec![machine],
        None => vault.machines().await?,
    };
    let (mut plans, mut unreadable) = (Vec::new(), Vec::new());
    for machine in machines {
        match repair::plan(&vault, machine, &found.damaged, &settings).await {
            Ok(plan) => plans.push(plan),
            Err(error @ VaultError::Store(_)) => return Err(error.into()),
            Err(error) => unreadable.push((machine, error)),
        }
    }
    if !global.json {
        for problem in &found.problems {
            writeln!(console.out, "damaged: HW-{}: {}", problem.code, problem.cause)?;
        }
        for plan in &plans {
            show(console, plan)?;
        }
        for (machine, error) in &unreadable {
            writeln!(
                console.out,
                "{machine}: HW-{}: {error}\n  Nothing of it can be read or written; nothing can be made of it but from a copy of the vault.",
                error.code()
            )?;
        }
    }
    let empty = plans.iter().all(Plan::is_empty);
    let lost_before = plans.iter().any(|plan| !plan.losses.points.is_empty());
    // Of the vault itself, of a machine that cannot be read, or marks: nothing can be made anew of them.
    let beyond = !unreadable.is_empty() || found.problems.iter().any(|problem| problem.machine.is_none());
    let is_damaged = !found.problems.is_empty();
    if what.dry_run || empty {
        if global.json {
            let documents: Vec<Value> = plans.iter().map(|plan| document!({ "plan": plan })).collect();
            write_json(console, &vault, documents, &unreadable)?;
        } else if empty && is_damaged {
            writeln!(
                console.out,
                "Nothing of this can be made anew: put the damaged objects back from a copy of the vault, where they were."
            )?;
            advise(console, lost_before)?;
        } else if empty {
            writeln!(console.out, "There is nothing to repair.")?;
        }
        let is_left = lost_before || beyond || (empty && is_damaged);
        return Ok(if is_left { Exit::Damaged } else { Exit::Success });
    }
    if !what.yes {
        confirm(console, global.json)?;
    }
    let (mut documents, mut lost, mut left) = (Vec::new(), false, beyond);
    for plan in plans {
        let report = repair::machine(&vault, plan.machine, &found.damaged, &settings).await?;
        lost |= !report.losses.points.is_empty();
        left |= !report.left.is_empty();
        if global.json {
            documents.push(document!({ "plan": plan, "report": report }));
        } else {
            done(console, &plan, &report)?;
        }
    }
    if let Location::Directory(dir) = location {
        let removed = tokio::task::spawn_blocking(move || remove_left_over(&dir)).await;
        let removed = removed.map_err(std::io::Error::from)??;
        if removed > 0 && !global.json {
            writeln!(console.out, "{removed} files of interrupted uploads were deleted")?;
        }
    }
    if let Some(path) = &what.resume {
        resume::remove(path)?;
    }
    match global.json {
        true => write_json(console, &vault, documents, &unreadable)?,
        false => advise(console, lost)?,
    }
    if beyond && !global.json {
        writeln!(console.out, "The rest of what is damaged can only be put back from a copy of the vault.")?;
    }
    Ok(if lost || left { Exit::Damaged } else { Exit::Success })
}

fn write_json(
    console: &mut Console<'_>,
    vault: &Vault,
    machines: Vec<Value>,
    unreadable: &[(MachineId, VaultError)],
) -> Result<(), CliError> {
    let unreadable: Vec<Value> = unreadable
        .iter()
        .map(|(machine, error)| {
            document!({ "machine": machine, "code": format!("HW-{}", error.code()), "cause": error.to_string() })
        })
        .collect();
    json(console, &document!({ "vault": vault.id(), "machines": machines, "unreadable": unreadable }))
}

fn show(console: &mut Console<'_>, plan: &Plan) -> Result<(), CliError> {
    writeln!(console.out, "{} ({}):", plain(&plan.host_name), plan.machine)?;
    let out = &mut console.out;
    if plan.is_empty() && plan.losses.points.is_empty() {
        writeln!(out, "  nothing to do")?;
    }
    if plan.strays > 0 {
        let (n, bytes) = (plan.strays, bytes_text(plan.stray_bytes));
        writeln!(
            out,
            "  {n} objects that no record names are deleted ({bytes}); a session under way begins anew"
        )?;
    }
    if plan.left > 0 {
        writeln!(out, "  {} more stay: not old enough, or a damaged map may name them", plan.left)?;
    }
    if !plan.checkpoints.is_empty() {
        writeln!(out, "  {} checkpoints are made anew", plan.checkpoints.len())?;
    }
    if !plan.shortcuts.is_empty() {
        writeln!(out, "  {} shortcuts are dropped; maintenance makes them again", plan.shortcuts.len())?;
    }
    if !plan.runs.is_empty() {
        writeln!(out, "  {} stretches are made anew, as far as what they need is there", plan.runs.len())?;
    }
    if !plan.losses.points.is_empty() {
        writeln!(out, "  as it is now:")?;
        losses(console, &plan.losses)?;
    }
    Ok(())
}

fn done(console: &mut Console<'_>, plan: &Plan, report: &Report) -> Result<(), CliError> {
    let out = &mut console.out;
    writeln!(
        out,
        "{} ({}): {} objects with {} deleted, {} checkpoints and {} stretches made anew, {} shortcuts dropped",
        plain(&plan.host_name),
        plan.machine,
        report.deleted,
        bytes_text(report.deleted_bytes),
        report.checkpoints,
        report.runs,
        report.shortcuts
    )?;
    for (from, to) in &report.left {
        writeln!(
            out,
            "  the stretch from {from} to {to} could not be made anew, or would have cost what only a shortcut over it still holds"
        )?;
    }
    if report.losses.points.is_empty() {
        writeln!(out, "  all {} recovery points are whole", report.losses.whole)?;
        return Ok(());
    }
    writeln!(out, "  LOST:")?;
    losses(console, &report.losses)
}

/// What cannot be read: by point, and by disk and block.
fn losses(console: &mut Console<'_>, losses: &Losses) -> Result<(), CliError> {
    let out = &mut console.out;
    for point in losses.points.iter().take(NAMED_MAX) {
        let (id, bytes, disks) = (point.point, bytes_text(point.bytes), point.disks);
        writeln!(out, "    point {id}: {} blocks ({bytes}) of {disks} disk(s) cannot be read", point.blocks)?;
    }
    if let Some(more) = losses.points.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
        writeln!(out, "    and {more} points more")?;
    }
    let newest = losses.newest_whole.map(|id| format!("; the newest is {id}")).unwrap_or_default();
    writeln!(out, "    {} points are whole{newest}", losses.whole)?;
    let mut disks: BTreeMap<_, Vec<&repair::Lost>> = BTreeMap::new();
    losses.ranges.iter().for_each(|lost| disks.entry(lost.disk).or_default().push(lost));
    for (disk, ranges) in disks {
        for lost in ranges.iter().take(NAMED_MAX) {
            let end = lost.first + lost.blocks - 1;
            let (first, from, to) = (lost.first, lost.from, lost.to);
            writeln!(out, "    disk {disk}: blocks {first} to {end}, at points {from} to {to}")?;
        }
        if let Some(more) = ranges.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
            writeln!(out, "    disk {disk}: and {more} ranges more (--json tells them)")?;
        }
    }
    Ok(())
}

fn advise(console: &mut Console<'_>, lost: bool) -> Result<(), CliError> {
    if lost {
        writeln!(
            console.out,
            "What is lost comes back with a copy of the damaged objects, put where they were. Blocks that are written again on the machine are whole from then on;\n`highwater-agent resync` does not send the others (it compares with hashes, which are there still): to have all of a disk again, `unprotect` and `protect` it."
        )?;
    }
    Ok(())
}

fn confirm(console: &mut Console<'_>, json: bool) -> Result<(), CliError> {
    if json || !console.can_ask {
        return Err(CliError::NotConfirmed("the vault would be repaired; say --yes".to_owned()));
    }
    write!(console.err, "Type yes to repair the vault so: ")?;
    console.err.flush()?;
    let mut typed = String::new();
    console.input.read_line(&mut typed)?;
    match typed.trim() == "yes" {
        true => Ok(()),
        false => Err(CliError::NotConfirmed("the vault was not repaired; nothing was done".to_owned())),
    }
}
