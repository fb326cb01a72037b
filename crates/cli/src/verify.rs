//! `verify`.

use crate::{
    CliError, Console, Exit,
    args::Global,
    context,
    output::{bytes_text, json},
};
use highwater_vault::verify::{Report, verify_machine, verify_vault};
use std::io::Write;

pub(crate) async fn verify(
    global: &Global,
    machine: Option<&str>,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let report = match machine {
        None => verify_vault(&vault).await?,
        Some(text) => verify_machine(&vault, context::machine(&vault, text).await?).await?,
    };
    if global.json {
        let clean = report.is_clean();
        json(console, &serde_json::json!({ "vault": vault.id(), "clean": clean, "report": report }))?;
    } else {
        text(console, &report)?;
    }
    Ok(if report.is_clean() { Exit::Success } else { Exit::Damaged })
}

fn text(console: &mut Console<'_>, report: &Report) -> Result<(), CliError> {
    let out = &mut console.out;
    writeln!(
        out,
        "Read {} of {} machine(s): {} points, {} records, {} checkpoints, {} segments, {} maps, {} chunks, {} blocks.",
        bytes_text(report.bytes),
        report.machines,
        report.points,
        report.records,
        report.checkpoints,
        report.segments,
        report.maps,
        report.chunks,
        report.blocks
    )?;
    for orphan in &report.orphans {
        writeln!(out, "not named by any commit (a delta under way, or interrupted): {orphan}")?;
    }
    for problem in &report.problems {
        let machine = problem.machine.map(|id| format!("machine {id}: ")).unwrap_or_default();
        writeln!(out, "DAMAGED HW-{}: {machine}{}\n  → {}", problem.code, problem.cause, problem.action)?;
    }
    match report.problems.len() {
        0 => writeln!(out, "Everything is authentic and whole.")?,
        n => writeln!(out, "{n} problem(s) found.")?,
    }
    Ok(())
}
