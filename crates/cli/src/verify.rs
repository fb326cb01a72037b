//! `verify` and `vault verify`.

use crate::{
    CliError, Console, Exit,
    args::{Global, Verify},
    context,
    output::{bytes_text, count, json},
};
use highwater_vault::{
    Pace, Vault, VaultError,
    verify::{Pass, Report, Sample, Settings, Watch, resume},
};
use std::{
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often what is done is put into a file: as much is read again after an interruption.
const KEPT_EVERY: Duration = Duration::from_secs(5);

pub(crate) async fn verify(
    global: &Global,
    what: &Verify,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let machine = match &what.machine {
        Some(text) => Some(context::machine(&vault, text).await?),
        None => None,
    };
    let known = match &what.resume {
        // Who names no seed goes on with the one that there is.
        Some(path) => resume::load(path, &vault, machine, wanted(what)?)?,
        None => None,
    };
    if let (Some(path), Some(pass)) = (&what.resume, &known)
        && what.sample.is_some()
        && pass.sample().is_none()
    {
        let cause = "it reads everything, not a sample";
        return Err(VaultError::ResumeOther { path: path.clone(), cause }.into());
    }
    let goes_on = known.is_some();
    let mut pass = match known {
        Some(pass) => pass,
        None => Pass::new(&vault, machine, sample(what)?),
    };
    if let Some(sample) = pass.sample().filter(|_| !global.json) {
        let (percent, seed) = (sample.percent(), sample.seed());
        writeln!(
            console.err,
            "A sample of {percent} %: the same again with --sample {percent} --seed {seed}"
        )?;
    }
    if goes_on && !global.json {
        let read = bytes_text(pass.report().bytes);
        writeln!(console.err, "Goes on with what was begun: {read} were read already.")?;
    }
    let report = run(&vault, &mut pass, what, console.terminal && !global.json).await?;
    if let Some(path) = &what.resume {
        resume::remove(path)?;
    }
    if global.json {
        let sample = pass
            .sample()
            .map(|sample| serde_json::json!({ "percent": sample.percent(), "seed": sample.seed() }));
        let clean = report.is_clean();
        let told =
            serde_json::json!({ "vault": vault.id(), "clean": clean, "sample": sample, "report": report });
        json(console, &told)?;
    } else {
        text(console, &report, pass.sample().is_some())?;
    }
    Ok(if report.is_clean() { Exit::Success } else { Exit::Damaged })
}

/// The sample that is asked for.
fn sample(what: &Verify) -> Result<Option<Sample>, CliError> {
    let Some(percent) = what.sample else { return Ok(None) };
    Ok(Some(match what.seed {
        Some(seed) => Sample::new(percent, seed)?,
        None => Sample::random(percent)?,
    }))
}

/// The sample that one to be gone on with must have; `None`: any.
fn wanted(what: &Verify) -> Result<Option<Option<Sample>>, CliError> {
    match (what.sample, what.seed) {
        (Some(_), None) => Ok(None),
        _ => Ok(Some(sample(what)?)),
    }
}

/// Verifies, shows how far it is, and keeps that where it was asked for.
pub(crate) async fn run(
    vault: &Vault,
    pass: &mut Pass,
    what: &Verify,
    shown: bool,
) -> Result<Report, CliError> {
    let settings = Settings { pace: Arc::new(Pace::new(what.rate)) };
    let watch = Shown { bar: bar(shown), file: what.resume.clone(), kept: Mutex::new(Instant::now()) };
    let done = pass.run(vault, &settings, &watch).await;
    watch.bar.finish_and_clear();
    if done.is_err()
        && let Some(path) = &what.resume
    {
        // What is known is worth more than one error more.
        let _ = resume::save(path, pass);
    }
    Ok(done?)
}

struct Shown {
    bar: indicatif::ProgressBar,
    file: Option<PathBuf>,
    kept: Mutex<Instant>,
}

fn bar(shown: bool) -> indicatif::ProgressBar {
    let target = match shown {
        true => indicatif::ProgressDrawTarget::stderr(),
        false => indicatif::ProgressDrawTarget::hidden(),
    };
    let style = indicatif::ProgressStyle::with_template(
        "{bar:30} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    );
    let bar = indicatif::ProgressBar::with_draw_target(Some(0), target);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[async_trait::async_trait]
impl Watch for Shown {
    fn at(&self, read: u64, of: u64) {
        if self.bar.length() == Some(0) {
            // What an earlier process read says nothing about the speed of this one.
            self.bar.reset_eta();
        }
        self.bar.set_length(of);
        self.bar.set_position(read);
    }

    async fn done(&self, pass: &Pass) -> highwater_vault::Result<()> {
        let Some(path) = self.file.clone() else { return Ok(()) };
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.elapsed() < KEPT_EVERY {
                return Ok(());
            }
            *kept = Instant::now();
        }
        resume::save_beside(path, pass.clone()).await
    }
}

fn text(console: &mut Console<'_>, report: &Report, sampled: bool) -> Result<(), CliError> {
    let out = &mut console.out;
    writeln!(
        out,
        "Read {} of {}: {} points, {} records, {} checkpoints, {} segments, {} maps with {} entries, {} chunks, {} blocks.",
        bytes_text(report.bytes),
        count(report.machines, "machine"),
        report.points,
        report.records,
        report.checkpoints,
        report.segments,
        report.maps,
        report.entries,
        report.chunks,
        report.blocks
    )?;
    if sampled {
        writeln!(out, "{} segments and maps more are there, and were not read.", report.not_read)?;
    }
    for orphan in &report.orphans {
        writeln!(out, "not named by any commit (a delta under way, or interrupted): {orphan}")?;
    }
    for stranger in &report.strangers {
        writeln!(out, "no object of this release: {stranger}")?;
    }
    for problem in &report.problems {
        let machine = problem.machine.map(|id| format!("machine {id}: ")).unwrap_or_default();
        writeln!(out, "DAMAGED {}: {machine}{}\n  → {}", problem.code, problem.cause, problem.action)?;
    }
    if report.left_out > 0 {
        writeln!(out, "{} more are not told.", report.left_out)?;
    }
    match report.problems.len() {
        0 if sampled => writeln!(out, "What was read is authentic and whole.")?,
        0 => writeln!(out, "Everything is authentic and whole.")?,
        n => writeln!(
            out,
            "{} found; `highwater vault repair` says what is lost.",
            count(n as u64, "problem")
        )?,
    }
    Ok(())
}
