//! Reading everything back: authenticity, hashes, whether every commit is reachable, and what nobody names.
//!
//! Nothing is taken from a checkpoint: all records are replayed from the first, and checkpoints are compared with the
//! outcome. Memory: one segment's index, or one map's tables and a reference for each of its pages, 8 MiB of an object, and the names of
//! a machine's objects.

mod map;
mod segment;

use crate::{
    MachineState, Result, SegmentRef, Vault, VaultError,
    key::MachineKeys,
    maps::SegmentRow,
    runs::{Content, Held, Item, Kind, ObjectName, Run},
    seal::DOCUMENT_BYTES_MAX,
    segment::SegmentReader,
    store,
    vault::open_record,
};
use futures::TryStreamExt;
use highwater_delta::{MachineId, SegmentId};
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Machines.
    pub machines: u64,
    /// Manifest records.
    pub records: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Recovery points.
    pub points: u64,
    /// Segments that are named.
    pub segments: u64,
    /// Maps over merged segments.
    pub maps: u64,
    /// Chunks.
    pub chunks: u64,
    /// Blocks with content, each checked against its hash.
    pub blocks: u64,
    /// Bytes of segments and maps.
    pub bytes: u64,
    /// Control documents.
    pub control_documents: u64,
    /// Segments and maps that nothing names: of a delta under way, or left by an interruption. No damage; the machine's next
    /// writer removes those of an interruption.
    pub orphans: Vec<String>,
    /// Damage.
    pub problems: Vec<Problem>,
}

/// Something damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Problem {
    /// Stable number.
    pub code: u16,
    /// Whose; empty for what belongs to the vault.
    pub machine: Option<MachineId>,
    /// What.
    pub cause: String,
    /// What to do about it.
    pub action: &'static str,
}

impl Report {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }
    fn problem(&mut self, machine: Option<MachineId>, error: &VaultError) {
        let (code, action) = (error.code(), error.action());
        self.problems.push(Problem { code, machine, cause: error.to_string(), action });
    }
    fn absorb(&mut self, other: Self) {
        self.segments += other.segments;
        self.maps += other.maps;
        self.chunks += other.chunks;
        self.blocks += other.blocks;
        self.bytes += other.bytes;
        self.problems.extend(other.problems);
    }
    /// Keeps damage; failures of the store itself end the verification, since they say nothing about the data.
    fn keep<T>(&mut self, machine: Option<MachineId>, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error @ VaultError::Store(_)) => Err(error),
            Err(error) => {
                self.problem(machine, &error);
                Ok(None)
            }
        }
    }
}

/// Verifies all machines and the control documents.
pub async fn verify_vault(vault: &Vault) -> Result<Report> {
    let mut report = Report::default();
    for name in vault.control_list("").await? {
        report.control_documents += 1;
        let read = vault.control_get(&name).await;
        report.keep(None, read)?;
    }
    for machine in vault.machines().await? {
        one_machine(vault, machine, &mut report).await?;
    }
    Ok(report)
}

/// Verifies one machine.
pub async fn verify_machine(vault: &Vault, machine: MachineId) -> Result<Report> {
    let mut report = Report::default();
    one_machine(vault, machine, &mut report).await?;
    Ok(report)
}

async fn one_machine(vault: &Vault, machine: MachineId, report: &mut Report) -> Result<()> {
    report.machines += 1;
    let keys = vault.machine_keys(machine).await;
    let Some((keys, host_name)) = report.keep(Some(machine), keys)? else { return Ok(()) };
    let state = replay(vault, machine, &keys, host_name, report).await?;
    report.points += state.points.len() as u64;
    for point in &state.points {
        for covered in &point.info.disks {
            if let Err(error) = state.disk(covered.disk) {
                report.problem(Some(machine), &error);
            }
        }
    }
    let mut named: HashSet<ObjectName> = HashSet::new();
    let mut verified: HashSet<Vec<SegmentId>> = HashSet::new();
    // Maintenance may go on meanwhile: what was merged away, and is then deleted, is no damage; what took its place is read too.
    let mut state = state;
    for _ in 0..ROUNDS_MAX {
        let mut merged_away = false;
        for part in parts(&state) {
            let key = part.objects().iter().map(|object| object.id).collect();
            if verified.contains(&key) {
                continue;
            }
            let mut own = Report::default();
            one_part(vault, machine, &keys, part, &mut own, &mut named).await?;
            if !own.is_clean() && !is_there(vault, machine, &keys, part).await {
                merged_away = true;
                continue;
            }
            report.absorb(own);
            verified.insert(key);
        }
        if !merged_away {
            break;
        }
        state = vault.load_state(machine, &keys, state.host_name, true).await?;
    }
    named.extend(state.trash.iter().map(|trashed| trashed.object));
    orphans(vault, machine, &named, report).await
}

/// Times that a machine's runs are looked at anew.
const ROUNDS_MAX: usize = 16;

fn parts(state: &MachineState) -> impl Iterator<Item = Item<'_>> {
    state.runs.iter().map(Item::Run).chain(state.shortcuts.iter().map(Item::Shortcut))
}

/// Whether a machine still has it. If that cannot be told, it has.
async fn is_there(vault: &Vault, machine: MachineId, keys: &MachineKeys, part: Item<'_>) -> bool {
    let now = vault.load_state(machine, keys, String::new(), true).await;
    now.map_or(true, |now| parts(&now).any(|known| known.objects() == part.objects()))
}

async fn one_part(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    part: Item<'_>,
    report: &mut Report,
    named: &mut HashSet<ObjectName>,
) -> Result<()> {
    match part {
        Item::Run(run) => one_run(vault, machine, keys, run, report, named).await?,
        Item::Shortcut(shortcut) => {
            // Runs come first: what none of them names is deleted some day.
            for reference in &shortcut.maps {
                let rows = one_map(vault, machine, keys, reference, report, named).await?.unwrap_or_default();
                if rows.iter().any(|row| !named.contains(&ObjectName { kind: row.kind, id: row.id })) {
                    let what = store::object_path(machine, Kind::Map, reference.id);
                    let cause = "a shortcut names a segment that no run names";
                    report.problem(Some(machine), &VaultError::corrupt(what, cause));
                }
            }
        }
    }
    Ok(())
}

async fn one_run(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    run: &Run,
    report: &mut Report,
    named: &mut HashSet<ObjectName>,
) -> Result<()> {
    let (maps, held) = match &run.content {
        Content::Segments(segments) => {
            for reference in segments {
                one_segment(vault, machine, keys, Kind::Segment, reference, report, named).await?;
            }
            return Ok(());
        }
        Content::Maps { maps, held } => (maps, held),
    };
    // A segment may be named by several maps of a run.
    let mut rows: HashMap<SegmentId, SegmentRow> = HashMap::new();
    for reference in maps {
        for row in one_map(vault, machine, keys, reference, report, named).await?.unwrap_or_default() {
            rows.entry(row.id).and_modify(|known| known.live += row.live).or_insert(row);
        }
    }
    let found = rows.values().fold(Held::default(), |sum, row| Held {
        bytes: sum.bytes + row.bytes,
        blocks: sum.blocks + row.blocks,
        live_blocks: sum.live_blocks + row.live,
        segments: sum.segments + 1,
    });
    if found != *held && report.is_clean() {
        let what = format!("run {} of machine {machine}", run.to);
        report.problem(
            Some(machine),
            &VaultError::corrupt(what, "its maps do not add up to what its record says"),
        );
    }
    for row in rows.values() {
        let reader = SegmentReader::new(vault.store().clone(), machine, keys, row.kind, &row.reference())?;
        let whole = reader.reference_of_trailer().await;
        if let Some(reference) = report.keep(Some(machine), whole)? {
            one_segment(vault, machine, keys, row.kind, &reference, report, named).await?;
        }
    }
    Ok(())
}

async fn one_segment(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    kind: Kind,
    reference: &SegmentRef,
    report: &mut Report,
    named: &mut HashSet<ObjectName>,
) -> Result<()> {
    named.insert(ObjectName { kind, id: reference.id });
    report.segments += 1;
    report.bytes += reference.bytes;
    let checked = segment::check(vault, machine, keys, kind, reference, report).await;
    report.keep(Some(machine), checked)?;
    Ok(())
}

async fn one_map(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    reference: &SegmentRef,
    report: &mut Report,
    named: &mut HashSet<ObjectName>,
) -> Result<Option<Vec<SegmentRow>>> {
    named.insert(ObjectName { kind: Kind::Map, id: reference.id });
    report.maps += 1;
    report.bytes += reference.bytes;
    let checked = map::check(vault, machine, keys, reference).await;
    report.keep(Some(machine), checked)
}

/// Replays every record, and compares each checkpoint where it belongs.
async fn replay(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    host_name: String,
    report: &mut Report,
) -> Result<MachineState> {
    let mut state = MachineState::empty(machine, host_name);
    let mut checkpoints: HashSet<u64> = vault.checkpoint_numbers(machine).await?.into_iter().collect();
    let mut numbers: Vec<u64> = vault
        .store()
        .list(Some(&store::manifest_dir(machine)))
        .try_filter_map(async |meta| Ok(store::number_of(&meta.location)))
        .try_collect()
        .await?;
    numbers.sort_unstable();
    for number in 1..=numbers.last().copied().unwrap_or(0) {
        let path = store::manifest_path(machine, number);
        report.records += 1;
        let read = store::read_object(&**vault.store(), &path, DOCUMENT_BYTES_MAX).await;
        let applied = read.and_then(|sealed| {
            let envelope = open_record(keys, &path, &sealed)?;
            state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), path.as_ref())
        });
        if report.keep(Some(machine), applied)?.is_none() {
            // Every later record continues the damaged one.
            break;
        }
        if checkpoints.remove(&number) {
            report.checkpoints += 1;
            let read = vault.read_checkpoint(machine, keys, number).await;
            if let Some(found) = report.keep(Some(machine), read)?
                && found != state
            {
                let path = store::checkpoint_path(machine, number);
                report.problem(Some(machine), &VaultError::corrupt(path, "it differs from the records"));
            }
        }
    }
    for number in checkpoints {
        let path = store::checkpoint_path(machine, number);
        report.problem(Some(machine), &VaultError::corrupt(path, "the records before it are not there"));
    }
    Ok(state)
}

async fn orphans(
    vault: &Vault,
    machine: MachineId,
    named: &HashSet<ObjectName>,
    report: &mut Report,
) -> Result<()> {
    for kind in [Kind::Segment, Kind::Rewritten, Kind::Map] {
        let mut listed = vault.store().list(Some(&store::object_dir(machine, kind)));
        while let Some(meta) = listed.try_next().await? {
            let name = store::segment_of(&meta.location).map(|id| ObjectName { kind, id });
            if name.is_none_or(|name| !named.contains(&name)) {
                report.orphans.push(meta.location.to_string());
            }
        }
    }
    Ok(())
}
