//! `vault plan` and `vault maintain`: what expires and is merged, shown before it is done.

use crate::{
    CliError, Console, Exit,
    args::Global,
    confirm::{Question, confirm},
    context,
    output::{bytes_text, count, json, plain},
};
use highwater_delta::{Code, MachineId};
use highwater_vault::{
    Pace, Vault, VaultError,
    maintain::{Maintainer, Merge, Plan, Progress, Purpose, Report, Settings},
    policy::Rules,
};
use serde_json::{Value, json as document};
use std::{io::Write, sync::Arc, time::Duration};

/// Points named in a plan; of more, how many.
const NAMED_MAX: usize = 12;

/// Shows what would be done.
pub(crate) async fn plan(
    global: &Global,
    machine: Option<&str>,
    grace: Duration,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let settings = Settings { grace, ..Settings::default() };
    let (mut documents, mut unreadable) = (Vec::new(), 0);
    let machines = chosen(&vault, machine).await?;
    let none = machines.is_empty();
    for id in machines {
        match planned(&vault, id, &settings).await {
            Ok((maintainer, _, plan)) if !global.json => show(console, &maintainer, &plan)?,
            Ok((_, _, plan)) => documents.push(document!({ "machine": id, "plan": plan })),
            Err(error) => documents.push(passed_over(global, console, id, error, &mut unreadable)?),
        }
    }
    ended(global, console, &vault, documents, none, unreadable)
}

/// Shows it, asks, and does it. A machine of which something cannot be read keeps none of the others from theirs.
pub(crate) async fn maintain(
    global: &Global,
    machine: Option<&str>,
    settings: Settings,
    yes: bool,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let (mut documents, mut unreadable) = (Vec::new(), 0);
    let (mut machines, all) = (Vec::new(), chosen(&vault, machine).await?);
    let none = all.is_empty();
    let mut expire = 0;
    for id in all {
        match planned(&vault, id, &settings).await {
            Ok((maintainer, _, plan)) => {
                expire += plan.expire.len();
                machines.push(id);
                if !global.json {
                    show(console, &maintainer, &plan)?;
                }
            }
            Err(error) => documents.push(passed_over(global, console, id, error, &mut unreadable)?),
        }
    }
    if expire > 0 && !yes {
        let_go(console, global.json, expire)?;
    }
    for id in machines {
        let progress = Bars::new(console.terminal && !global.json);
        // Planned anew: the vault has gone on since, and what was shown is at most older.
        let done_now = async {
            let (mut maintainer, rules, _) = planned(&vault, id, &settings).await?;
            maintainer.run(&rules, vault.now_ms(), &progress).await
        };
        let report = done_now.await;
        progress.bar.finish_and_clear();
        match report {
            Ok(report) if !global.json => done(console, id, &report)?,
            Ok(report) => documents.push(document!({ "machine": id, "report": report })),
            Err(error) => documents.push(passed_over(global, console, id, error, &mut unreadable)?),
        }
    }
    ended(global, console, &vault, documents, none, unreadable)
}

/// Tells why a machine was passed over; what keeps all of them from it is the command's own failure.
fn passed_over(
    global: &Global,
    console: &mut Console<'_>,
    machine: MachineId,
    error: VaultError,
    count: &mut usize,
) -> Result<Value, CliError> {
    if matches!(error, VaultError::Store(_) | VaultError::Clock(_)) {
        return Err(error.into());
    }
    *count += 1;
    if !global.json {
        writeln!(console.err, "{machine}: {}: {error}\n  → {}", Code(error.code()), error.action())?;
    }
    Ok(document!({ "machine": machine, "error": context::damage_document(&error) }))
}

fn ended(
    global: &Global,
    console: &mut Console<'_>,
    vault: &Vault,
    documents: Vec<Value>,
    none: bool,
    unreadable: usize,
) -> Result<Exit, CliError> {
    if global.json {
        json(console, &document!({ "vault": vault.id(), "machines": documents }))?;
        return Ok(if unreadable == 0 { Exit::Success } else { Exit::Failure });
    }
    if none {
        writeln!(console.out, "The vault holds no machines yet.")?;
    }
    if unreadable > 0 { Err(CliError::Unreadable(unreadable)) } else { Ok(Exit::Success) }
}

/// How `--rate` and `--grace` are meant.
pub(crate) fn settings(rate: Option<u64>, grace: Duration) -> Settings {
    Settings { grace, pace: Arc::new(Pace::new(rate)), ..Settings::default() }
}

async fn chosen(vault: &Vault, machine: Option<&str>) -> Result<Vec<MachineId>, CliError> {
    Ok(match machine {
        Some(text) => vec![context::machine(vault, text).await?],
        None => vault.machines().await?,
    })
}

async fn planned(
    vault: &Vault,
    machine: MachineId,
    settings: &Settings,
) -> Result<(Maintainer, Rules, Plan), VaultError> {
    let rules = Rules::load(vault, machine).await?;
    let maintainer = Maintainer::open(vault, machine, settings.clone()).await?;
    let plan = maintainer.plan(&rules, vault.now_ms());
    Ok((maintainer, rules, plan))
}

fn show(console: &mut Console<'_>, maintainer: &Maintainer, plan: &Plan) -> Result<(), CliError> {
    let (out, state) = (&mut console.out, maintainer.state());
    writeln!(out, "{} ({}):", plain(&state.host_name), state.machine)?;
    if plan.is_empty() {
        writeln!(out, "  nothing to do")?;
    }
    if !plan.expire.is_empty() {
        let (n, of) = (plan.expire.len(), state.points.len());
        writeln!(out, "  {n} of {of} recovery points expire: {}", named(&plan.expire))?;
    }
    if !plan.protected.is_empty() {
        let n = plan.protected.len();
        writeln!(out, "  {n} would, but are held or protected: {}", named(&plan.protected))?;
    }
    for (purpose, text) in [
        (Purpose::Expire, "stretches between points that are merged"),
        (Purpose::Clean, "stretches that are cleaned of what no point needs"),
        (Purpose::Shortcut, "shortcuts that are made, through which points open faster"),
    ] {
        let of: Vec<&Merge> = plan.merges.iter().filter(|merge| merge.purpose == purpose).collect();
        if !of.is_empty() {
            let bytes = bytes_text(of.iter().map(|merge| merge.bytes).sum());
            writeln!(
                out,
                "  {text}: {} (with {bytes}; mostly only the index is read and written)",
                of.len()
            )?;
        }
    }
    if plan.delete > 0 {
        writeln!(out, "  objects that are deleted: {}, with {}", plan.delete, bytes_text(plan.delete_bytes))?;
    }
    Ok(())
}

fn named(points: &[highwater_delta::CommitId]) -> String {
    let mut text: Vec<String> = points.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    if let Some(more) = points.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
        text.push(format!("and {more} more"));
    }
    text.join(", ")
}

/// Asks before points go.
pub(crate) fn let_go(console: &mut Console<'_>, json: bool, expire: usize) -> Result<(), CliError> {
    let what = format!("{expire} recovery point(s) would no longer be kept");
    let question = Question {
        word: "yes",
        prompt: format!("Type yes to let {expire} recovery point(s) go"),
        unasked: format!("{what}; say --yes"),
        refused: format!("{what}; nothing was done"),
    };
    confirm(console, json, question)
}

fn done(console: &mut Console<'_>, machine: MachineId, report: &Report) -> Result<(), CliError> {
    let out = &mut console.out;
    if report.is_empty() {
        writeln!(out, "{machine}: nothing was to be done")?;
        return Ok(());
    }
    writeln!(
        out,
        "{machine}: {} expired, {} merged, {} made, {} written; {} into the trash, {} deleted",
        count(report.expired, "point"),
        count(report.merged_runs, "run"),
        count(report.shortcuts, "shortcut"),
        bytes_text(report.written_bytes),
        bytes_text(report.trashed_bytes),
        bytes_text(report.deleted_bytes)
    )?;
    if report.pruned > 0 {
        writeln!(
            out,
            "  {} records and checkpoints that later ones make needless were deleted",
            report.pruned
        )?;
    }
    if report.locked > 0 {
        writeln!(out, "  locked by the bucket, for immutable points: {}", count(report.locked, "object"))?;
    }
    if report.kept_by_store > 0 {
        writeln!(
            out,
            "  {} objects are still locked by the store; a later run deletes them",
            report.kept_by_store
        )?;
    }
    Ok(())
}

struct Bars {
    bar: indicatif::ProgressBar,
}

impl Bars {
    fn new(shown: bool) -> Self {
        let target = match shown {
            true => indicatif::ProgressDrawTarget::stderr(),
            false => indicatif::ProgressDrawTarget::hidden(),
        };
        Self { bar: indicatif::ProgressBar::with_draw_target(None, target) }
    }
}

impl Progress for Bars {
    fn merge(&self, n: usize, of: usize, bytes: u64) {
        self.bar.set_length(of as u64);
        self.bar.set_position(n as u64);
        self.bar.set_message(format!("merging runs with {}", bytes_text(bytes)));
    }
}

/// What is written of a time.
pub(crate) fn time_text(time: Duration) -> String {
    humantime_serde::re::humantime::format_duration(time).to_string()
}

/// For documents.
pub(crate) fn null_if_empty(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { text.into() }
}
