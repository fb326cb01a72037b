//! A machine's records, from the first, and its checkpoints.

use super::{Place, Report};
use crate::{MachineState, Result, VaultError, seal::DOCUMENT_BYTES_MAX, store, vault::open_record};
use futures::TryStreamExt;
use std::collections::HashSet;

/// Replays every record, and compares each checkpoint where it belongs. Answers the state, and whether there is nothing behind it: of
/// records behind a damaged one a checkpoint may know.
pub(super) async fn replay(
    place: &Place<'_>,
    host_name: String,
    report: &mut Report,
) -> Result<(MachineState, bool)> {
    let Place { vault, machine, keys, pace } = *place;
    let mut state = MachineState::empty(machine, host_name);
    let mut checkpoints: HashSet<u64> = vault.checkpoint_numbers(machine).await?.into_iter().collect();
    let mut numbers: Vec<u64> = vault
        .store()
        .list(Some(&store::manifest_dir(machine)))
        .try_filter_map(async |meta| Ok(store::number_of(&meta.location)))
        .try_collect()
        .await?;
    numbers.sort_unstable();
    let mut whole = true;
    for number in 1..=numbers.last().copied().unwrap_or(0) {
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
            // Every later record continues the damaged one.
            whole = false;
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
    if !whole {
        let newer = vault.load_state(machine, keys, state.host_name.clone(), true).await;
        if let Some(newer) = report.keep(Some(machine), newer)?
            && newer.last_record > state.last_record
        {
            checkpoints.retain(|number| *number > newer.last_record);
            return Ok((newer, true));
        }
    }
    for number in checkpoints {
        whole = false;
        let path = store::checkpoint_path(machine, number);
        report.problem(Some(machine), &VaultError::corrupt(path, "the records before it are not there"));
    }
    Ok((state, whole))
}
