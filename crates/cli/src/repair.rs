//! `vault repair`: everything is verified, a plan is shown, and after a confirmation it is done. What is lost is said in any case.

use crate::{
    CliError, Console, Exit,
    args::{Global, Repair, Verify},
    confirm::{Question, confirm},
    context,
    output::{are, bytes_text, count, json, plain},
    verify,
};
use highwater_delta::MachineId;
use highwater_vault::{
    Location, Pace, Vault, VaultError, left_over, remove_left_over,
    repair::{self, Losses, Plan, Report, Settings},
    verify::{Pass, Problem, resume},
};
use serde_json::{Value, json as document};
use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

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
            writeln!(console.out, "damaged: {}: {}", problem.code, problem.cause)?;
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
    let dir = match &location {
        Location::Directory(dir) => Some(dir.clone()),
        _ => None,
    };
    let files = files_of(dir.clone(), left_over).await?;
    if files > 0 && !global.json {
        writeln!(console.out, "{files} files of interrupted uploads are deleted")?;
    }
    let empty = files == 0 && plans.iter().all(Plan::is_empty);
    let lost_before = plans.iter().any(|plan| !plan.losses.points.is_empty());
    // Of the vault itself, of a machine that cannot be read, or marks: nothing can be made anew of them.
    let beyond = !unreadable.is_empty() || found.problems.iter().any(|problem| problem.machine.is_none());
    let is_damaged = !found.problems.is_empty();
    let still = plans.iter().any(|plan| !plan.records.is_empty());
    if what.dry_run || empty {
        if global.json {
            let documents: Vec<Value> = plans.iter().map(|plan| document!({ "plan": plan })).collect();
            write_json(console, &vault, documents, &unreadable, &found.problems, files)?;
        } else if empty && is_damaged {
            writeln!(
                console.out,
                "Nothing of this can be made anew: put the damaged objects back from a copy of the vault, where they were."
            )?;
            for plan in plans.iter().filter(|plan| plan.losses.points.is_empty()) {
                let whole = count(plan.losses.whole, "recovery point");
                writeln!(console.out, "{}: {whole}, all whole.", plain(&plan.host_name))?;
            }
            advise(console, lost_before)?;
        } else if empty {
            writeln!(console.out, "There is nothing to repair.")?;
        }
        let is_left = lost_before || beyond || still || (empty && is_damaged);
        return Ok(if is_left { Exit::Damaged } else { Exit::Success });
    }
    if !what.yes {
        let question = Question {
            word: "yes",
            prompt: "Type yes to repair the vault so".to_owned(),
            unasked: "the vault would be repaired; say --yes".to_owned(),
            refused: "the vault was not repaired; nothing was done".to_owned(),
        };
        confirm(console, global.json, question)?;
    }
    let (mut documents, mut lost, mut left, mut still) = (Vec::new(), false, beyond, false);
    for plan in plans {
        let report = repair::machine(&vault, plan.machine, &found.damaged, &settings).await?;
        lost |= !report.losses.points.is_empty();
        still |= !report.records.is_empty();
        left |= !report.left.is_empty();
        if global.json {
            documents.push(document!({ "plan": plan, "report": report }));
        } else {
            done(console, &plan, &report)?;
        }
    }
    let removed = files_of(dir, remove_left_over).await?;
    if removed > 0 && !global.json {
        writeln!(console.out, "{removed} files of interrupted uploads were deleted")?;
    }
    if let Some(path) = &what.resume {
        resume::remove(path)?;
    }
    match global.json {
        true => write_json(console, &vault, documents, &unreadable, &found.problems, removed)?,
        false => advise(console, lost)?,
    }
    if (beyond || still) && !global.json {
        writeln!(console.out, "The rest of what is damaged can only be put back from a copy of the vault.")?;
    }
    Ok(if lost || left || still { Exit::Damaged } else { Exit::Success })
}

fn write_json(
    console: &mut Console<'_>,
    vault: &Vault,
    machines: Vec<Value>,
    unreadable: &[(MachineId, VaultError)],
    problems: &[Problem],
    files: u64,
) -> Result<(), CliError> {
    let unreadable: Vec<Value> = unreadable
        .iter()
        .map(|(machine, error)| {
            document!({ "machine": machine, "code": format!("HW-{}", error.code()), "cause": error.to_string() })
        })
        .collect();
    json(
        console,
        &document!({
            "vault": vault.id(),
            "problems": problems,
            "machines": machines,
            "unreadable": unreadable,
            "upload-files": files,
        }),
    )
}

/// What interrupted uploads left in a vault's directory.
async fn files_of(dir: Option<PathBuf>, work: fn(&Path) -> std::io::Result<u64>) -> Result<u64, CliError> {
    let Some(dir) = dir else { return Ok(0) };
    let done = tokio::task::spawn_blocking(move || work(&dir)).await;
    Ok(done.map_err(std::io::Error::from)??)
}

fn show(console: &mut Console<'_>, plan: &Plan) -> Result<(), CliError> {
    writeln!(console.out, "{} ({}):", plain(&plan.host_name), plan.machine)?;
    let out = &mut console.out;
    if plan.is_empty() && plan.losses.points.is_empty() {
        writeln!(out, "  nothing to do")?;
    }
    if plan.strays > 0 {
        let (n, bytes) = (count(plan.strays, "object"), bytes_text(plan.stray_bytes));
        writeln!(out, "  deleted: {n} that no record names ({bytes}); a session under way begins anew")?;
    }
    if plan.left > 0 {
        let why = if plan.runs.is_empty() { "" } else { ", or a damaged map may name them" };
        writeln!(
            out,
            "  left: {} that no record names, not old enough (--grace){why}",
            count(plan.left, "object")
        )?;
    }
    if !plan.checkpoints.is_empty() {
        writeln!(out, "  {} made anew", are(plan.checkpoints.len(), "checkpoint"))?;
    }
    if !plan.shortcuts.is_empty() {
        writeln!(out, "  {} dropped; maintenance makes them again", are(plan.shortcuts.len(), "shortcut"))?;
    }
    if !plan.runs.is_empty() {
        writeln!(out, "  {} made anew, as far as what is needed is there", are(plan.runs.len(), "stretch"))?;
    }
    for problem in &plan.records {
        writeln!(out, "  stays damaged: {}: {}", problem.code, problem.cause)?;
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
        "{} ({}): {} with {} deleted, {} and {} made anew, {} dropped",
        plain(&plan.host_name),
        plan.machine,
        count(report.deleted, "object"),
        bytes_text(report.deleted_bytes),
        count(report.checkpoints, "checkpoint"),
        count(report.runs, "stretch"),
        count(report.shortcuts, "shortcut")
    )?;
    for problem in &report.records {
        writeln!(out, "  still damaged: {}: {}", problem.code, problem.cause)?;
    }
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
        let (id, bytes, disks) = (point.point, bytes_text(point.bytes), count(point.disks, "disk"));
        writeln!(
            out,
            "    point {id}: {} ({bytes}) of {disks} cannot be read",
            count(point.blocks, "block")
        )?;
    }
    if let Some(more) = losses.points.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
        writeln!(out, "    and {} more", count(more as u64, "point"))?;
    }
    let newest = losses.newest_whole.map(|id| format!("; the newest is {id}")).unwrap_or_default();
    writeln!(out, "    {} whole{newest}", are(losses.whole as usize, "point"))?;
    let mut disks: BTreeMap<_, Vec<&repair::Lost>> = BTreeMap::new();
    losses.ranges.iter().for_each(|lost| disks.entry(lost.disk).or_default().push(lost));
    for (disk, ranges) in disks {
        for lost in ranges.iter().take(NAMED_MAX) {
            let blocks = span("block", lost.first, lost.first + lost.blocks - 1);
            let points = span("point", lost.from.0, lost.to.0);
            writeln!(out, "    disk {disk}: {blocks}, at {points}")?;
        }
        if let Some(more) = ranges.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
            writeln!(out, "    disk {disk}: and {more} ranges more (--json tells them)")?;
        }
    }
    Ok(())
}

/// `block 5`, or `blocks 5 to 7`.
fn span(what: &str, from: u64, to: u64) -> String {
    if from == to { format!("{what} {from}") } else { format!("{what}s {from} to {to}") }
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
