//! Deleting records that checkpoints make needless, so that a history of years, or of a point each second, stays a bounded number of
//! objects.
//!
//! # Contract
//!
//! - The last [`KEPT`] checkpoints stay, and every record behind the oldest of them. Before anything goes, that one is read and the
//!   records behind it are replayed: the later ones must say the same.
//! - Records go [`store::PRUNED_TOGETHER`] at a time, those of numbers up to a multiple of it. A mark is created for them first, and stays for ever: who finds
//!   a number free that was deleted finds the mark too ([`crate::journal`]).
//! - Older checkpoints go before the records that they continue.
//! - A crash leaves some of it there; the next time it goes. It may run in several programs at once.
//! - What the store refuses to delete stays; nothing depends on its being gone.

use crate::{MachineState, Result, Vault, VaultError, journal::Journal, seal, store};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::MachineId;
use object_store::path::Path;
use std::{collections::BTreeSet, time::Duration};

/// Checkpoints that stay.
const KEPT: usize = 3;
/// Deletions and reads at once.
const DEPTH: usize = 8;

/// Deletes what is needless for so long; how many objects.
///
/// # Errors
/// The store failed; a checkpoint that stays, or a record behind it, is damaged: then nothing is deleted.
pub(super) async fn prune(journal: &Journal, needless_for: Duration) -> Result<u64> {
    let Journal { vault, machine, state, .. } = journal;
    if state.last_record <= store::PRUNED_TOGETHER {
        return Ok(0);
    }
    let checkpoints = checkpoints(vault, *machine).await?;
    let Some(kept) = checkpoints.len().checked_sub(KEPT).map(|from| &checkpoints[from..]) else {
        return Ok(0);
    };
    let (floor, newest) = (&kept[0], &kept[KEPT - 1]);
    // Both by the store's clock.
    let age_ms = u64::try_from(newest.stored_ms - floor.stored_ms).unwrap_or(0);
    let end = floor.number / store::PRUNED_TOGETHER * store::PRUNED_TOGETHER;
    let is_due = end > 0 && Duration::from_millis(age_ms) >= needless_for;
    if !is_due || store::exists(&**vault.store(), &store::pruned_path(*machine, end)).await? {
        return Ok(0);
    }
    if let Err(error) = check(journal, kept).await {
        // Somebody else was faster.
        let is_late = vault.were_deleted(&error, *machine, floor.number).await?;
        return if is_late { Ok(0) } else { Err(error) };
    }
    let older = checkpoints[..checkpoints.len() - KEPT].iter();
    let older = older.map(|checkpoint| store::checkpoint_path(*machine, checkpoint.number)).collect();
    let mut deleted = delete(vault, older).await?;
    let records = records_to(vault, *machine, end).await?;
    let marks: BTreeSet<Path> = records.iter().map(|n| store::pruned_path(*machine, *n)).collect();
    for mark in marks.into_iter().chain([store::pruned_path(*machine, end)]) {
        let sealed = seal::seal(&journal.keys.manifest, &mark, &[])?;
        store::create_object(&**vault.store(), &mark, sealed).await?;
    }
    deleted += delete(vault, records.iter().map(|n| store::manifest_path(*machine, *n)).collect()).await?;
    Ok(deleted)
}

struct Checkpoint {
    number: u64,
    stored_ms: i64,
}

async fn checkpoints(vault: &Vault, machine: MachineId) -> Result<Vec<Checkpoint>> {
    let listed = vault.store().list(Some(&store::checkpoint_dir(machine)));
    let mut found: Vec<Checkpoint> = listed
        .try_filter_map(async |meta| {
            let stored_ms = meta.last_modified.timestamp_millis();
            Ok(store::number_of(&meta.location).map(|number| Checkpoint { number, stored_ms }))
        })
        .try_collect()
        .await?;
    found.sort_unstable_by_key(|checkpoint| checkpoint.number);
    Ok(found)
}

/// Whether all that stays can be read, and says the same.
async fn check(journal: &Journal, kept: &[Checkpoint]) -> Result<()> {
    let Journal { vault, machine, keys, .. } = journal;
    let mut state: Option<MachineState> = None;
    let records = vault.records_after(*machine, kept[0].number).await?;
    for Checkpoint { number, .. } in kept {
        let own = vault.read_checkpoint(*machine, keys, *number).await?;
        let replayed = match state.take() {
            Some(before) => {
                let between = records.iter().filter(|(n, _)| (before.last_record + 1..=*number).contains(n));
                let between = between.copied().collect();
                vault.replay(before, keys, between, u64::MAX).await?
            }
            None => own.clone(),
        };
        if !own.is_checkpoint_of(&replayed) {
            let path = store::checkpoint_path(*machine, *number);
            return Err(VaultError::corrupt(path, "it differs from the records"));
        }
        state = Some(replayed);
    }
    Ok(())
}

/// The records up to a number.
async fn records_to(vault: &Vault, machine: MachineId, end: u64) -> Result<Vec<u64>> {
    let listed = vault.store().list(Some(&store::manifest_dir(machine)));
    let number = async |meta: object_store::ObjectMeta| Ok(store::number_of(&meta.location));
    let mut found: Vec<u64> = listed.try_filter_map(number).try_collect().await?;
    found.retain(|number| *number <= end);
    found.sort_unstable();
    Ok(found)
}

async fn delete(vault: &Vault, paths: Vec<Path>) -> Result<u64> {
    let store = vault.store().clone();
    let deleted = stream::iter(paths)
        .map(move |path| {
            let store = store.clone();
            async move { store::delete(&*store, &path).await.map(u64::from) }
        })
        .buffered(DEPTH);
    deleted.try_fold(0, async |sum, deleted| Ok(sum + deleted)).await
}
