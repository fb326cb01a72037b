//! Repair: what nobody names goes, what can be made anew is, and what is lost is said.
//!
//! # Contract
//!
//! - It begins with what a verification found ([`crate::verify`], [`crate::verify::Report::damaged`]); it finds no damage by itself.
//! - It adds records of kinds that there are, merges above all, and deletes; it never changes an object. Nothing that a point
//!   needs is deleted: what cannot be read stays where it is.
//! - **Crash, failure, cancellation** leave what a maintainer's leave; doing it again does the rest.
//! - Beside writers, readers and maintainers: it is a maintainer, and fences others of the machine; they begin anew.
//!
//! # What can be made anew
//!
//! | damaged | what becomes of it |
//! |---|---|
//! | a checkpoint | deleted, and a new one made from the records |
//! | a shortcut | dropped; maintenance makes it again |
//! | header, index, footer or trailer of a segment, or chunks of it that its run needs no more | what is needed is moved into a new segment |
//! | the map of a merged run | made again from what was merged, as long as all of that is there: within the trash's grace, as a rule |
//! | a chunk that is needed, or a whole segment | lost: its blocks, at the points until they were written again |
//! | the map of a merged run whose parts are gone | lost: what it spans, at the points until that was written again; behind a shortcut over it, which says it too, nothing, and the shortcut stays |
//! | a record | nothing is lost while a checkpoint behind it is good; else all behind it, and nobody can write |
//! | a machine's key | the machine |
//!
//! A shortcut needs no record of its own to go: a merge that says that content was moved drops all that lie over its run ([`crate::MachineState`]), so
//! one run beneath is merged with itself. It owns nothing, so nothing is lost with it.
//!
//! # Why what is deleted can be needed by nobody
//!
//! An object that no record names can only be named by a record that comes. Clocks tell nothing of that: ids are as old as the clock that
//! drew them. So the order of things does:
//!
//! 1. The objects that are there are listed.
//! 2. A takeover and a maintainer's record are put. Every writer and maintainer that was opened before is fenced by them: its next record
//!    would take a number that is taken, and finding these there it gives up. Whoever is opened afterwards names only what
//!    it wrote itself, under ids drawn then, which are not in the list.
//! 3. The state is that of the last of these records. What was listed and is named there neither by a run, shortcut or map, nor is in the
//!    trash, will never be named, and is deleted.
//!
//! If a map of a run cannot be read, it is not known which segments that run needs: then no segment is deleted, only maps. The age
//! ([`Settings::grace`], by the store's clock alone: the time of the object against that of the record put just now) adds no safety. It spares
//! sessions that are under way: without a stray that is old enough, nothing is put and nobody is fenced.

mod heal;
mod history;
mod loss;
mod strays;

pub use loss::{Losses, Lost, LostPoint};

use crate::{
    MachineState, Pace, Result, Vault,
    journal::Journal,
    key::MachineKeys,
    maintain::{self, turn::Turn},
    runs::{Item, Kind, ObjectName, Run},
    seal, state, store,
    vault::{Begin, STATE_BYTES_MAX},
    verify::{self, Damaged, Problem},
};
use highwater_delta::{CommitId, MachineId, SegmentId};
use serde::Serialize;
use std::{collections::HashSet, sync::Arc, time::Duration};

/// How it is to be done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How old objects that nobody names must be, to be deleted.
    pub grace: Duration,
    /// How fast content may be moved.
    pub pace: Arc<Pace>,
    /// Most bytes of memory of a machine's state.
    pub state_bytes_max: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(24 * 3600),
            pace: Arc::new(Pace::new(None)),
            state_bytes_max: STATE_BYTES_MAX,
        }
    }
}

/// What is to be done for a machine, and what cannot be read now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The machine.
    pub machine: MachineId,
    /// Its host name.
    pub host_name: String,
    /// Objects that nobody names and that are old enough, by the clock here.
    pub strays: u64,
    /// Their bytes.
    pub stray_bytes: u64,
    /// Objects that nobody names, and that are not: of a delta under way perhaps, or of a map that cannot be read.
    pub left: u64,
    /// Checkpoints that are made anew.
    pub checkpoints: Vec<u64>,
    /// Runs that something is wrong with: it is tried to make them anew. Each with the commit before it and its last.
    pub runs: Vec<(CommitId, CommitId)>,
    /// Shortcuts that are dropped, likewise.
    pub shortcuts: Vec<(CommitId, CommitId)>,
    /// What is wrong with records and marks, of which nothing can be made anew.
    pub records: Vec<Problem>,
    /// What cannot be read now.
    pub losses: Losses,
}

impl Plan {
    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.strays == 0 && self.checkpoints.is_empty() && self.runs.is_empty() && self.shortcuts.is_empty()
    }
}

/// What was done for a machine, and what is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The machine.
    pub machine: MachineId,
    /// Objects that nobody named and that were deleted.
    pub deleted: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Checkpoints that were deleted; a new one was made.
    pub checkpoints: u64,
    /// Runs that were made anew.
    pub runs: u64,
    /// Shortcuts that were dropped.
    pub shortcuts: u64,
    /// Runs that could not be made anew, or are left since a shortcut over them, which that would drop, is the last to say where content of
    /// its runs lies.
    pub left: Vec<(CommitId, CommitId)>,
    /// What is wrong with records, checkpoints and marks still: of that nothing can be made anew.
    pub records: Vec<Problem>,
    /// What cannot be read.
    pub losses: Losses,
}

/// Says what [`machine`] would do. Changes nothing. `damaged`: of a full verification a moment ago.
///
/// # Errors
/// The store fails, or the machine's records do: then there is nothing that could be made of them.
pub async fn plan(
    vault: &Vault,
    machine: MachineId,
    damaged: &[Damaged],
    settings: &Settings,
) -> Result<Plan> {
    let (keys, host_name) = vault.machine_keys(machine).await?;
    let damaged = Bad::of(machine, damaged);
    let (state, checkpoints, records) =
        good_state(vault, machine, &keys, host_name.clone(), &settings.pace).await?;
    let strays = strays::Found::list(vault, &keys, &state).await?;
    let (old, left) = strays.older_than(settings.grace, vault.now_ms());
    let runs = heal::damaged_runs(vault, &keys, &state, &damaged).await?;
    let shortcuts = damaged_shortcuts(&state, &damaged);
    Ok(Plan {
        machine,
        host_name,
        strays: old.len() as u64,
        stray_bytes: old.iter().map(|stray| stray.bytes).sum(),
        left,
        checkpoints,
        runs: runs.iter().map(|run| (run.from, run.to)).collect(),
        shortcuts,
        records,
        losses: loss::losses(vault, &keys, &state, &damaged).await?,
    })
}

/// Does what can be done for a machine, and says what is lost.
///
/// # Errors
/// As [`plan`]; [`crate::VaultError::Maintained`]: another maintainer began meanwhile. What was done until then holds.
pub async fn machine(
    vault: &Vault,
    machine: MachineId,
    damaged: &[Damaged],
    settings: &Settings,
) -> Result<Report> {
    let (keys, host_name) = vault.machine_keys(machine).await?;
    let damaged = Bad::of(machine, damaged);
    let mut report = Report {
        machine,
        deleted: 0,
        deleted_bytes: 0,
        checkpoints: 0,
        runs: 0,
        shortcuts: 0,
        left: Vec::new(),
        records: Vec::new(),
        losses: Losses::default(),
    };
    let (state, bad, _) = good_state(vault, machine, &keys, host_name, &settings.pace).await?;
    if !bad.is_empty() {
        checkpoint_anew(vault, &keys, &state, &bad).await?;
        report.checkpoints = bad.len() as u64;
    }
    let mut journal = Journal::open(vault.clone(), machine, settings.state_bytes_max).await?;
    // Whoever asks for a repair waits for nobody.
    let mut turn = Turn::new(&maintain::Settings { patience: None, skew_max: None, ..Default::default() });
    let runs = heal::damaged_runs(vault, &keys, &journal.state, &damaged).await?;
    if !runs.is_empty() || !damaged_shortcuts(&journal.state, &damaged).is_empty() {
        turn.begin(&mut journal).await?;
        let before = journal.state.shortcuts.len();
        let heal::Survey { runs, mut last } = heal::survey(&journal, runs, &damaged, settings).await?;
        for run in runs {
            if heal::is_under(&last, &run) {
                report.left.push((run.from, run.to));
                continue;
            }
            match heal::heal(&mut journal, &mut turn, &run, &damaged, settings).await? {
                true => report.runs += 1,
                false => {
                    report.left.push((run.from, run.to));
                    // Of a lost map, what it was to be made of was not whole.
                    if heal::is_lost(&journal, &run).await? {
                        last.extend(heal::useful_over(&journal, &run).await?);
                    }
                }
            }
        }
        heal::drop_shortcuts(&mut journal, &mut turn, &damaged, &last, settings).await?;
        report.shortcuts = before.saturating_sub(journal.state.shortcuts.len()) as u64;
    }
    let deleted = strays::remove(&mut journal, &mut turn, settings).await?;
    report.deleted = deleted.len() as u64;
    report.deleted_bytes = deleted.iter().map(|stray| stray.bytes).sum();
    let host_name = journal.state.host_name.clone();
    report.records = verify::by_records(vault, machine, &keys, host_name, &settings.pace).await?.1;
    // What was read before, or is damaged since, is in no cache.
    let fresh = vault.clone().with_page_cache(crate::pages::BYTES_MAX);
    report.losses = loss::losses(&fresh, &keys, &journal.state, &damaged).await?;
    Ok(report)
}

/// What of a machine is damaged.
struct Bad {
    objects: HashSet<ObjectName>,
    /// Maps that are to be believed all the same.
    believed: HashSet<ObjectName>,
}

impl Bad {
    fn of(machine: MachineId, damaged: &[Damaged]) -> Self {
        let own = damaged.iter().filter(|damaged| damaged.machine == machine);
        let believed = own.clone().filter(|damaged| damaged.entries_hold).map(|damaged| damaged.object);
        Self { believed: believed.collect(), objects: own.map(|damaged| damaged.object).collect() }
    }
    fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
    fn has(&self, kind: Kind, id: SegmentId) -> bool {
        self.objects.contains(&ObjectName { kind, id })
    }
    /// A map that is authentic may lie.
    fn lies(&self, map: SegmentId) -> bool {
        self.has(Kind::Map, map) && !self.believed.contains(&ObjectName { kind: Kind::Map, id: map })
    }
}

fn damaged_shortcuts(state: &MachineState, damaged: &Bad) -> Vec<(CommitId, CommitId)> {
    let is_damaged = |map: &crate::SegmentRef| damaged.has(Kind::Map, map.id);
    let shortcuts = state.shortcuts.iter().filter(|shortcut| shortcut.maps.iter().any(is_damaged));
    shortcuts.map(|shortcut| (shortcut.from, shortcut.to)).collect()
}

/// The objects that a run or shortcut names itself.
fn names(item: Item<'_>) -> impl Iterator<Item = ObjectName> {
    let kind = if item.is_merged() { Kind::Map } else { Kind::Segment };
    item.objects().iter().map(move |object| ObjectName { kind, id: object.id })
}

/// The state, the checkpoints that are bad, from none of which it is, and what else is wrong with its documents.
async fn good_state(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    host_name: String,
    pace: &Pace,
) -> Result<(MachineState, Vec<u64>, Vec<Problem>)> {
    let (replayed, mut problems) = verify::by_records(vault, machine, keys, host_name.clone(), pace).await?;
    if replayed.whole && !replayed.bad.is_empty() {
        // Those are made anew.
        let paths: Vec<String> =
            replayed.bad.iter().map(|number| store::checkpoint_path(machine, *number).to_string()).collect();
        problems.retain(|problem| !paths.iter().any(|path| problem.cause.contains(path)));
        return Ok((replayed.state, replayed.bad, problems));
    }
    // As readers have it.
    Ok((vault.load_state(machine, keys, host_name, Begin::Checkpoint).await?, Vec::new(), problems))
}

/// Deletes checkpoints and makes one of the state. Between both, readers replay more records.
async fn checkpoint_anew(vault: &Vault, keys: &MachineKeys, state: &MachineState, bad: &[u64]) -> Result<()> {
    for number in bad {
        let path = store::checkpoint_path(state.machine, *number);
        // One that the store keeps is passed over by readers, as before.
        store::delete(&**vault.store(), &path).await?;
    }
    let path = store::checkpoint_path(state.machine, state.last_record);
    let plain = state::encode(state)?;
    let sealed = seal::seal(&keys.manifest, &path, &plain)?;
    // One that is there is good.
    store::create_own(&**vault.store(), &path, sealed).await?;
    Ok(())
}

/// A run of a state, by its place.
fn run_at(state: &MachineState, from: CommitId, to: CommitId) -> Option<&Run> {
    state.runs.iter().find(|run| run.from == from && run.to == to)
}
