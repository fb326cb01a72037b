//! What runs were merged from, as the records tell.

use crate::{
    MachineState, Pace, Result, Vault, VaultError,
    key::MachineKeys,
    record::{KIND_MERGED, MergedBody},
    runs::Run,
    seal::DOCUMENT_BYTES_MAX,
    store,
    vault::open_record,
};
use highwater_delta::{CommitId, SegmentId};
use std::collections::HashMap;

/// The runs that became one, oldest first, by the first map of that one.
pub(super) type History = HashMap<SegmentId, Vec<Run>>;

/// Replays the records for the merges within a stretch. As far as they can be read: what is known of each merge holds by itself.
pub(super) async fn history(
    vault: &Vault,
    keys: &MachineKeys,
    now: &MachineState,
    (from, to): (CommitId, CommitId),
    pace: &Pace,
) -> Result<History> {
    let mut state = oldest(vault, keys, now).await?;
    let mut history = History::new();
    for number in state.last_record + 1..=now.last_record {
        let path = store::manifest_path(now.machine, number);
        let sealed = match store::read_object(&**vault.store(), &path, DOCUMENT_BYTES_MAX).await {
            Ok(sealed) => sealed,
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(_) => break,
        };
        pace.spend(sealed.len() as u64).await;
        let Ok(envelope) = open_record(keys, &path, &sealed) else { break };
        if envelope.kind == KIND_MERGED
            && let Ok(body) = postcard::from_bytes::<MergedBody>(&envelope.body)
            && body.replaces.is_some()
            && from <= body.from
            && body.to <= to
            && let Some(first) = body.maps.first()
            && let Ok(within) = state.runs_within(body.from, body.to)
        {
            history.insert(first.id, state.runs[within].to_vec());
        }
        if state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), path.as_ref()).is_err() {
            break;
        }
    }
    Ok(history)
}

/// The state before the first record that is there: of those that a checkpoint makes needless, some may have been deleted.
async fn oldest(vault: &Vault, keys: &MachineKeys, now: &MachineState) -> Result<MachineState> {
    let empty = MachineState::empty(now.machine, now.host_name.clone());
    let is_deleted = async |number| {
        let mark = store::pruned_path(now.machine, number);
        store::exists(&**vault.store(), &mark).await
    };
    if !is_deleted(1).await? {
        return Ok(empty);
    }
    for number in vault.checkpoint_numbers(now.machine).await? {
        if is_deleted(number + 1).await? {
            continue;
        }
        match vault.read_checkpoint(now.machine, keys, number).await {
            Ok(state) => return Ok(state),
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(empty)
}
