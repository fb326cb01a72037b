//! Objects that nobody names; why they can be deleted is said in [`crate::repair`].

use super::Settings;
use crate::{
    MachineState, Result, Vault, VaultError,
    journal::Journal,
    key::MachineKeys,
    maintain::turn::Turn,
    maps::rows,
    record::KIND_TAKEOVER,
    runs::{Item, Kind, ObjectName},
    segment::SegmentReader,
    store::{self, What},
};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use std::{collections::HashSet, time::Duration};

/// An object that nobody names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stray {
    pub(super) object: ObjectName,
    pub(super) bytes: u64,
    /// By the store's clock, in milliseconds since 1970.
    modified_ms: u64,
}

/// What nobody names.
pub(super) struct Found {
    strays: Vec<Stray>,
    /// Whether a map of a run cannot be read: what it names is not known.
    unknown: bool,
}

impl Found {
    /// What is there and a state does not name.
    pub(super) async fn list(vault: &Vault, keys: &MachineKeys, state: &MachineState) -> Result<Self> {
        let listed = all(vault, state).await?;
        Self::among(listed, vault, keys, state).await
    }

    /// Of these, what a state does not name.
    async fn among(
        listed: Vec<Stray>,
        vault: &Vault,
        keys: &MachineKeys,
        state: &MachineState,
    ) -> Result<Self> {
        let mut named: HashSet<ObjectName> = state.trash.iter().map(|trashed| trashed.object).collect();
        let mut unknown = false;
        for run in &state.runs {
            named.extend(super::names(Item::Run(run)));
            for map in run.objects().iter().filter(|_| run.is_merged()) {
                let reader = SegmentReader::new(vault.store().clone(), state.machine, keys, Kind::Map, map)?;
                match rows(&reader).await {
                    Ok(rows) => {
                        named.extend(rows.iter().map(|row| ObjectName { kind: row.kind, id: row.id }));
                    }
                    Err(error @ VaultError::Store(_)) => return Err(error),
                    Err(_) => unknown = true,
                }
            }
        }
        state.shortcuts.iter().for_each(|shortcut| named.extend(super::names(Item::Shortcut(shortcut))));
        let strays = listed.into_iter().filter(|stray| !named.contains(&stray.object)).collect();
        Ok(Self { strays, unknown })
    }

    /// Those that may go since they are old enough, and how many may not.
    pub(super) fn older_than(&self, age: Duration, now_ms: u64) -> (Vec<Stray>, u64) {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let may_go = |stray: &&Stray| {
            stray.modified_ms.saturating_add(age_ms) <= now_ms
                && (!self.unknown || stray.object.kind == Kind::Map)
        };
        let old: Vec<Stray> = self.strays.iter().filter(may_go).cloned().collect();
        let left = (self.strays.len() - old.len()) as u64;
        (old, left)
    }
}

/// All segments and maps of a machine.
async fn all(vault: &Vault, state: &MachineState) -> Result<Vec<Stray>> {
    let listed = vault.store().list(Some(&store::machine_dir(state.machine)));
    let all = listed.try_filter_map(async |meta| {
        let What::Object(object) = store::what_is(state.machine, &meta.location) else { return Ok(None) };
        let modified_ms = u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0);
        Ok(Some(Stray { object, bytes: meta.size, modified_ms }))
    });
    Ok(all.try_collect().await?)
}

/// Deletes what nobody names and can name any more; answers what is gone.
pub(super) async fn remove(
    journal: &mut Journal,
    turn: &mut Turn,
    settings: &Settings,
) -> Result<Vec<Stray>> {
    let (vault, keys) = (journal.vault.clone(), journal.keys.clone());
    // First: what comes later is somebody's who is not fenced.
    let listed = all(&vault, &journal.state).await?;
    let found = Found::among(listed, &vault, &keys, &journal.state).await?;
    // By the clock here: only whether it is worth a record.
    if found.older_than(settings.grace, vault.now_ms()).0.is_empty() {
        return Ok(Vec::new());
    }
    turn.begin(journal).await?;
    take_over(journal).await?;
    let put = vault.store().head(&store::manifest_path(journal.machine, journal.state.last_record)).await?;
    let now_ms = u64::try_from(put.last_modified.timestamp_millis()).unwrap_or(0);
    let found = Found::among(found.strays, &vault, &keys, &journal.state).await?;
    let mut deleted = Vec::new();
    for stray in found.older_than(settings.grace, now_ms).0 {
        let path = store::object_path(journal.machine, stray.object.kind, stray.object.id);
        if store::delete(&**vault.store(), &path).await? {
            deleted.push(stray);
        }
    }
    Ok(deleted)
}

/// Fences every writer.
async fn take_over(journal: &mut Journal) -> Result<()> {
    loop {
        let epoch = journal.state.epoch + 1;
        if journal.put(KIND_TAKEOVER, epoch, Vec::new()).await? {
            return Ok(());
        }
        // Somebody else got on.
        if journal.catch_up().await?.is_empty() {
            return Err(VaultError::Fenced(journal.machine));
        }
        if journal.state.maintainer != journal.identity() {
            return Err(VaultError::Maintained(journal.machine));
        }
    }
}
