//! `recover`: a plan, a confirmation where something is overwritten, then the work and its report.

mod group;
mod watcher;

use crate::{
    CliError, Console, Exit,
    args::{Global, PointChoice, Recover},
    confirm::{Question, confirm},
    context,
    list::{consistency, left_out, point_document},
    output::{bytes_text, json, plain, rfc3339},
};
use highwater_delta::{Code, Consistency, MachineId, PointDisk};
use highwater_vault::{
    MachineState, PointRecord, Vault, VaultError,
    recover::{Lacks, Options, Place, Progress, Report, Target, directory_place, recover_disk},
};
use std::{
    collections::HashSet,
    io::Write,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};
use watcher::Watcher;

/// Ranges named in a text; of more, how many.
const NAMED_MAX: usize = 12;

struct Step {
    disk: PointDisk,
    name: String,
    target: Target,
}

pub(crate) async fn recover(
    global: &Global,
    what: &Recover,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    if let Some(group) = &what.group {
        return group::recover(global, &vault, group, what, console).await;
    }
    let machine = context::machine(&vault, what.machine.as_deref().unwrap_or_default()).await?;
    let planned = prepare(&vault, machine, what.point, what.to.clone(), what, global.json, console).await?;
    if planned.device && !what.yes {
        let to = what.to.display().to_string();
        let question = Question {
            word: &to,
            prompt: format!("Type {to} to overwrite it"),
            unasked: format!("{to} would be overwritten"),
            refused: format!("{to} was not confirmed and is untouched"),
        };
        confirm(console, global.json, question)?;
    }
    let (document, is_whole, ended) = carry_out(&vault, &planned, what, global.json, console).await?;
    ended?;
    if global.json {
        json(console, &document)?;
    }
    Ok(if is_whole { Exit::Success } else { Exit::Damaged })
}

/// What is to be recovered of a machine, and where to.
struct Planned {
    state: MachineState,
    damage: Option<VaultError>,
    point: PointRecord,
    steps: Vec<Step>,
    to: PathBuf,
    device: bool,
    in_memory: bool,
}

/// Plans it, and shows the plan; nothing is changed yet.
async fn prepare(
    vault: &Vault,
    machine: MachineId,
    point: PointChoice,
    to: PathBuf,
    what: &Recover,
    quiet: bool,
    console: &mut Console<'_>,
) -> Result<Planned, CliError> {
    let (state, damage) = context::state(vault, machine, what.skip_damaged, quiet, console).await?;
    let point = choose_point(&state, point)?.clone();
    let disks = choose_disks(&state, &point, what.disk.as_deref())?;
    let steps = plan(&state, &disks, &to)?;
    let device = steps.iter().any(|step| matches!(step.target, Target::Device(_)));
    let in_memory = !device && directory_place(&to)? == Place::Memory;
    if !quiet {
        show(console, &state, &point, &steps, what)?;
        if in_memory {
            let to = to.display();
            writeln!(
                console.err,
                "  {to} is IN MEMORY (tmpfs): it may run out, and is empty after a restart."
            )?;
        }
    }
    Ok(Planned { state, damage, point, steps, to, device, in_memory })
}

/// Does it. Answers the document, whether all of it is whole, and what it was broken off by.
async fn carry_out(
    vault: &Vault,
    planned: &Planned,
    what: &Recover,
    quiet: bool,
    console: &mut Console<'_>,
) -> Result<(serde_json::Value, bool, Result<(), VaultError>), CliError> {
    let Planned { state, damage, point, steps, to, device, in_memory } = planned;
    if !device && !to.is_dir() {
        std::fs::create_dir_all(to).map_err(|source| VaultError::Io { path: to.clone(), source })?;
    }
    for step in steps {
        step.target.check(step.disk.size_bytes)?;
    }
    let options = Options {
        threads: what.threads.unwrap_or(Options::default().threads),
        write_all: what.all_blocks,
        skip_damaged: what.skip_damaged,
    };
    let mut outcome = Outcome { is_whole: damage.is_none(), ..Outcome::default() };
    let mut ended = Ok(());
    for step in steps {
        let began = Instant::now();
        let watcher = Watcher::new(console.terminal, quiet, &step.name, step.disk.size_bytes);
        let watch: Arc<dyn Progress> = watcher.clone();
        let report = recover_disk(vault, state, step.disk.disk, point.id, &step.target, options, watch).await;
        watcher.bar.finish_and_clear();
        match report {
            Ok(report) => {
                let seconds = began.elapsed().as_secs_f64();
                outcome.take(step, &report, seconds);
                if !quiet {
                    finished(console, step, &report, seconds, *device)?;
                }
            }
            Err(error) => {
                outcome.failed(step, &error);
                // Of what is damaged, the other disks may be whole.
                if !error.is_damage() {
                    ended = Err(error);
                    break;
                }
                if !quiet {
                    damaged(console, step, &error)?;
                }
            }
        }
    }
    let mut document = serde_json::json!({
        "vault": vault.id(),
        "machine": state.machine,
        "host-name": state.host_name,
        "point": point_document(state, point),
        "damage": damage.as_ref().map(context::damage_document),
        "disks": outcome.done,
        "failed": outcome.failed,
        "in-memory": in_memory,
    });
    // Also if something failed then: what lacks of a disk stands nowhere else.
    if !device && !outcome.done.is_empty() {
        let path = write_report(to, point, &document)?;
        document["report"] = path.display().to_string().into();
        if outcome.lacks && !quiet {
            writeln!(console.out, "What lacks is listed in {}.", path.display())?;
        }
    }
    Ok((document, outcome.is_whole, ended))
}

/// What became of the disks.
#[derive(Default)]
struct Outcome {
    done: Vec<serde_json::Value>,
    failed: Vec<serde_json::Value>,
    lacks: bool,
    is_whole: bool,
}

impl Outcome {
    fn take(&mut self, step: &Step, report: &Report, seconds: f64) {
        self.lacks |= report.lacking.bytes > 0;
        self.is_whole &= report.lacking.bytes == 0;
        self.done.push(serde_json::json!({
            "disk": report.disk,
            "name": step.name,
            "target": report.path.display().to_string(),
            "size-bytes": report.size_bytes,
            "written-bytes": report.written_bytes,
            "lacking": report.lacking,
            "seconds": seconds,
        }));
    }
    fn failed(&mut self, step: &Step, error: &VaultError) {
        self.is_whole = false;
        self.failed.push(serde_json::json!({
            "disk": step.disk.disk,
            "name": step.name,
            "code": Code(error.code()),
            "cause": error.to_string(),
            "action": if error.is_damage() { SKIP } else { error.action() },
        }));
    }
}

/// What helps against damage.
const SKIP: &str = "What of it can be read is recovered with --skip-damaged; `highwater vault repair --dry-run` tells which points are whole.";

fn damaged(console: &mut Console<'_>, step: &Step, error: &VaultError) -> Result<(), CliError> {
    writeln!(console.err, "{} is NOT recovered: {}: {error}\n  → {SKIP}", step.name, Code(error.code()))?;
    Ok(())
}

fn choose_point(state: &MachineState, choice: PointChoice) -> Result<&PointRecord, CliError> {
    let none = || CliError::Point(format!("{} has no recovery point yet", plain(&state.host_name)));
    match choice {
        PointChoice::Latest => state.points.last().ok_or_else(none),
        PointChoice::LatestApplication => {
            let mut newest_first = state.points.iter().rev();
            let found = newest_first.find(|point| point.info.consistency == Consistency::Application);
            let none = format!("{} has no application-consistent point", plain(&state.host_name));
            found.ok_or(CliError::Point(none))
        }
        PointChoice::Number(id) => Ok(state.point(id)?),
        PointChoice::Marker(_) => {
            Err(CliError::Usage("a marker names a point of a group: give --group".to_owned()))
        }
    }
}

fn choose_disks(
    state: &MachineState,
    point: &PointRecord,
    wanted: Option<&str>,
) -> Result<Vec<PointDisk>, CliError> {
    let all = &point.info.disks;
    let Some(wanted) = wanted else {
        if all.is_empty() {
            return Err(CliError::Disk(format!("point {} covers no disk", point.id)));
        }
        return Ok(all.clone());
    };
    let named = |d: &&PointDisk| state.disk(d.disk).is_ok_and(|record| record.name == wanted);
    let lower = wanted.to_ascii_lowercase();
    let prefixed = |d: &&PointDisk| !lower.is_empty() && d.disk.to_string().starts_with(&lower);
    let mut found: Vec<&PointDisk> = all.iter().filter(named).collect();
    if found.is_empty() {
        found = all.iter().filter(prefixed).collect();
    }
    match found.as_slice() {
        [one] => Ok(vec![(*one).clone()]),
        [] => Err(CliError::Disk(format!("point {} covers no disk {wanted:?}", point.id))),
        _ => Err(CliError::Disk(format!("{wanted:?} may mean several disks of point {}", point.id))),
    }
}

fn plan(state: &MachineState, disks: &[PointDisk], to: &Path) -> Result<Vec<Step>, CliError> {
    let device = to.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    if device && disks.len() != 1 {
        return Err(CliError::Disk("several disks cannot go onto one device; choose one with --disk".into()));
    }
    if !device && to.exists() && !to.is_dir() {
        let cause = "it is neither a directory nor a block device".to_owned();
        return Err(VaultError::Target { path: to.to_owned(), cause }.into());
    }
    let mut taken = HashSet::new();
    let mut steps = Vec::new();
    for disk in disks {
        let name = match state.disk(disk.disk) {
            Ok(record) if !record.name.is_empty() => record.name.clone(),
            _ => disk.disk.to_string(),
        };
        let target = if device {
            Target::Device(to.to_owned())
        } else {
            // Some 230 bytes stay below every filesystem's limit with what is appended.
            let mut file: String = name.replace('/', "_");
            while file.len() > 200 {
                file.pop();
            }
            if !taken.insert(file.clone()) {
                file = format!("{file}-{}", disk.disk);
            }
            Target::File(to.join(format!("{file}.img")))
        };
        if to.exists() {
            target.check(disk.size_bytes)?;
        }
        steps.push(Step { disk: disk.clone(), name: plain(&name), target });
    }
    Ok(steps)
}

fn show(
    console: &mut Console<'_>,
    state: &MachineState,
    point: &PointRecord,
    steps: &[Step],
    what: &Recover,
) -> Result<(), CliError> {
    let err = &mut console.err;
    writeln!(
        err,
        "Recover {} at point {}: {}-consistent, taken {}.",
        plain(&state.host_name),
        point.id,
        consistency(&point.info),
        rfc3339(point.info.taken_at_ms)
    )?;
    for step in steps {
        let how = match (&step.target, what.all_blocks) {
            (Target::File(_), _) => "new sparse file",
            (Target::Device(_), true) => "OVERWRITTEN, all blocks",
            (Target::Device(_), false) => "OVERWRITTEN where it differs",
        };
        let (size, path) = (bytes_text(step.disk.size_bytes), step.target.path().display());
        writeln!(err, "  {} ({size}) → {path}: {how}", step.name)?;
    }
    if what.skip_damaged {
        writeln!(
            err,
            "  What cannot be read becomes zeros, and is listed; such a file is named ….img.damaged."
        )?;
    }
    for (disk, last) in left_out(state, point) {
        writeln!(
            err,
            "  {} is NOT in this point: the agent left it out. It is in point {last} (--point {last}).",
            plain(&disk.name)
        )?;
    }
    Ok(())
}

fn finished(
    console: &mut Console<'_>,
    step: &Step,
    report: &Report,
    seconds: f64,
    all: bool,
) -> Result<(), CliError> {
    let out = &mut console.out;
    writeln!(
        out,
        "{} recovered to {}: {}, {} written, {seconds:.1} s, {}/s",
        step.name,
        report.path.display(),
        bytes_text(report.size_bytes),
        bytes_text(report.written_bytes),
        bytes_text((report.size_bytes as f64 / seconds.max(0.001)) as u64),
    )?;
    let Lacks { bytes, ranges, why } = &report.lacking;
    if *bytes > 0 {
        writeln!(
            out,
            "  {} of it LACK, and are zeros: {}",
            bytes_text(*bytes),
            why.as_deref().unwrap_or("")
        )?;
        // With a device there is no report that names the others.
        let named = if all { usize::MAX } else { NAMED_MAX };
        for range in ranges.iter().take(named) {
            writeln!(out, "    {} bytes from {}", range.bytes, range.offset)?;
        }
        if let Some(more) = ranges.len().checked_sub(named).filter(|more| *more > 0) {
            writeln!(out, "    and {more} ranges more")?;
        }
    }
    Ok(())
}

/// Writes the report beside the files, under a name that is free: an earlier one may say what lacks of other disks.
fn write_report(dir: &Path, point: &PointRecord, document: &serde_json::Value) -> Result<PathBuf, CliError> {
    for n in 1_u32.. {
        let end = if n == 1 { String::new() } else { format!("-{n}") };
        let path = dir.join(format!("recovery-point-{}{end}.json", point.id));
        let mut file = match std::fs::File::create_new(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(source) => return Err(VaultError::Io { path, source }.into()),
            Ok(file) => file,
        };
        let written = writeln!(file, "{document:#}").and_then(|()| file.sync_all());
        written.map_err(|source| VaultError::Io { path: path.clone(), source })?;
        return Ok(path);
    }
    Err(CliError::Usage("there are too many reports".to_owned()))
}
