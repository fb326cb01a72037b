//! A machine's records, from the first that is there, and its checkpoints. Where records were deleted since checkpoints make them needless
//! ([`crate::maintain`]), the oldest checkpoint that can be read is believed, and the others are compared.

use super::{Place, Problem, Report};
use crate::{
    MachineState, Pace, Result, Vault, VaultError,
    key::MachineKeys,
    seal::{self, DOCUMENT_BYTES_MAX},
    store,
    vault::{Begin, open_record},
};
use futures::TryStreamExt;
use highwater_delta::MachineId;
use std::collections::BTreeSet;

/// A mark is an empty document.
const MARK_BYTES_MAX: u64 = 256;
/// Times that it is begun anew since records were deleted meanwhile.
const TRIES: usize = 4;

/// Replays every record, and compares each checkpoint where it belongs. Answers the state, and whether there is nothing behind it: of
/// records behind a damaged one a checkpoint may know.
pub(super) async fn replay(
    place: &Place<'_>,
    host_name: String,
    report: &mut Report,
) -> Result<(MachineState, bool)> {
    let replayed = replayed(place, host_name, report).await?;
    Ok((replayed.state, replayed.whole))
}

/// What a replay came to.
pub(crate) struct Replayed {
    pub(crate) state: MachineState,
    /// Whether there is nothing behind it.
    pub(crate) whole: bool,
    /// Checkpoints that cannot be read, or say something else; none unless it is whole and every record was replayed.
    pub(crate) bad: Vec<u64>,
}

/// The state by the records, the checkpoints that are none, and all that is wrong with both.
pub(crate) async fn by_records(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    host_name: String,
    pace: &Pace,
) -> Result<(Replayed, Vec<Problem>)> {
    let (place, mut report) = (Place { vault, machine, keys, pace }, Report::default());
    Ok((replayed(&place, host_name, &mut report).await?, report.problems))
}

async fn replayed(place: &Place<'_>, host_name: String, report: &mut Report) -> Result<Replayed> {
    let mut marked = marks(place).await?;
    for _ in 1..TRIES {
        let mut own = Report::default();
        let replayed = replay_once(place, host_name.clone(), &marked, &mut own).await?;
        let before = std::mem::replace(&mut marked, marks(place).await?);
        if own.is_clean() || before == marked {
            report.absorb(own);
            return Ok(replayed);
        }
    }
    replay_once(place, host_name, &marked, report).await
}

/// The marks of records that were deleted.
async fn marks(place: &Place<'_>) -> Result<Vec<u64>> {
    let listed = place.vault.store().list(Some(&store::pruned_dir(place.machine)));
    let mut found: Vec<u64> =
        listed.try_filter_map(async |meta| Ok(store::number_of(&meta.location))).try_collect().await?;
    found.sort_unstable();
    Ok(found)
}

/// The state to begin with where records up to `floor` were deleted: the oldest checkpoint, which leaves `checkpoints`.
async fn oldest(
    place: &Place<'_>,
    marks: &[u64],
    floor: Option<u64>,
    checkpoints: &mut BTreeSet<u64>,
    bad: &mut Vec<u64>,
    report: &mut Report,
) -> Result<Option<MachineState>> {
    let Place { vault, machine, keys, .. } = *place;
    for mark in marks {
        let path = store::pruned_path(machine, *mark);
        let read = store::read_object(&**vault.store(), &path, MARK_BYTES_MAX).await;
        let opened = read.and_then(|sealed| seal::open(&keys.manifest, &path, &sealed));
        report.keep(Some(machine), opened)?;
        if checkpoints.last().is_some_and(|newest| mark > newest) {
            let cause = "it says that records were deleted which no checkpoint makes needless";
            report.problem(Some(machine), &VaultError::corrupt(path, cause));
        }
    }
    // Older ones are left over, in a copy that was made while records were deleted: those that continue them may be gone.
    *checkpoints = checkpoints.split_off(&floor.unwrap_or(0));
    while floor.is_some()
        && let Some(number) = checkpoints.pop_first()
    {
        report.checkpoints += 1;
        let read = vault.read_checkpoint(machine, keys, number).await;
        if let Some(found) = report.keep(Some(machine), read)? {
            return Ok(Some(found));
        }
        bad.push(number);
    }
    Ok(None)
}

/// Whether a record that is not replayed is there and authentic.
async fn authentic(place: &Place<'_>, number: u64, report: &mut Report) -> Result<()> {
    let Place { vault, machine, keys, pace } = *place;
    let path = store::manifest_path(machine, number);
    report.records += 1;
    let read = store::read_object(&**vault.store(), &path, DOCUMENT_BYTES_MAX).await;
    pace.spend(read.as_ref().map_or(0, |sealed| sealed.len() as u64)).await;
    let opened = read.and_then(|sealed| match open_record(keys, &path, &sealed)? {
        envelope if envelope.number == number => Ok(()),
        _ => Err(VaultError::corrupt(&path, "it does not fit its name")),
    });
    report.keep(Some(machine), opened).map(drop)
}

/// The records behind one that is damaged, as far as they are there.
async fn behind(place: &Place<'_>, numbers: &[u64], mut before: u64, report: &mut Report) -> Result<()> {
    for number in numbers {
        if *number > before + 1 {
            // Of several that are missing, the first.
            let object = store::manifest_path(place.machine, before + 1).to_string();
            report.problem(Some(place.machine), &VaultError::Missing { object });
        }
        authentic(place, *number, report).await?;
        before = *number;
    }
    Ok(())
}

async fn replay_once(
    place: &Place<'_>,
    host_name: String,
    marks: &[u64],
    report: &mut Report,
) -> Result<Replayed> {
    let Place { vault, machine, keys, pace } = *place;
    let mut checkpoints: BTreeSet<u64> = vault.checkpoint_numbers(machine).await?.into_iter().collect();
    let numbers: Vec<u64> =
        vault.records_after(machine, 0).await?.into_iter().map(|(number, _)| number).collect();
    let mut bad = Vec::new();
    // With no mark it should be the first.
    let before = numbers.first().map_or(0, |first| first - 1);
    if marks.is_empty() && before > 0 {
        let cause = "its first records are gone, and so is the mark by which they were deleted, if they were";
        report.problem(Some(machine), &VaultError::corrupt(store::manifest_dir(machine), cause));
    }
    let floor = marks.last().copied().or(Some(before).filter(|before| *before > 0));
    let begun = oldest(place, marks, floor, &mut checkpoints, &mut bad, report).await?;
    if begun.is_none() && floor.is_some() {
        // Whatever else is there continues what nobody knows: one cause is told, not what follows from it.
        report.problem(Some(machine), &VaultError::no_checkpoint(machine));
        let state = MachineState::empty(machine, host_name);
        return Ok(Replayed { state, whole: false, bad: Vec::new() });
    }
    let mut state = begun.unwrap_or_else(|| MachineState::empty(machine, host_name));
    let mut whole = true;
    // Needless since that checkpoint, but not deleted: they are to be there, and good, all the same.
    for number in floor.map_or(u64::MAX, |floor| floor + 1)..=state.last_record {
        authentic(place, number, report).await?;
    }
    let last = numbers.last().copied().unwrap_or(0);
    for number in state.last_record + 1..=last {
        let path = store::manifest_path(machine, number);
        report.records += 1;
        let read = store::read_object(&**vault.store(), &path, DOCUMENT_BYTES_MAX).await;
        let bytes = read.as_ref().map_or(0, |sealed| sealed.len() as u64);
        let applied = read.and_then(|sealed| {
            let envelope = open_record(keys, &path, &sealed)?;
            state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), path.as_ref())
        });
        pace.spend(bytes).await;
        if report.keep(Some(machine), applied)?.is_none() {
            // Every later record continues the damaged one: of these it can be told only whether they are whole themselves.
            whole = false;
            behind(place, &numbers[numbers.partition_point(|known| *known <= number)..], number, report)
                .await?;
            break;
        }
        if checkpoints.remove(&number) {
            report.checkpoints += 1;
            let read = vault.read_checkpoint(machine, keys, number).await;
            match report.keep(Some(machine), read)? {
                Some(found) if found.is_checkpoint_of(&state) => {}
                Some(_) => {
                    bad.push(number);
                    let path = store::checkpoint_path(machine, number);
                    report.problem(Some(machine), &VaultError::corrupt(path, "it differs from the records"));
                }
                None => bad.push(number),
            }
        }
    }
    if !whole {
        let newer = vault.load_state(machine, keys, state.host_name.clone(), Begin::Checkpoint).await;
        if let Some(newer) = report.keep(Some(machine), newer)?
            && newer.last_record > state.last_record
        {
            checkpoints.retain(|number| *number > newer.last_record);
            return Ok(Replayed { state: newer, whole: true, bad: Vec::new() });
        }
    }
    for number in checkpoints {
        whole = false;
        let path = store::checkpoint_path(machine, number);
        report.problem(Some(machine), &VaultError::corrupt(path, "the records before it are not there"));
    }
    if !whole {
        bad.clear();
    }
    Ok(Replayed { state, whole, bad })
}
