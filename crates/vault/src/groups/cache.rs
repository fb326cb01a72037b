//! What was read of groups' documents. They are never changed, so that only what is new is read: one list, and no more, if nothing is.

use super::{Decision, Groups, READ_DEPTH};
use crate::{Result, Vault, VaultError};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::{GroupId, MachineId};
use highwater_group::Marker;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};
use tokio::sync::Mutex;

/// Decisions on the markers of a group.
#[derive(Default)]
pub(super) struct Decisions {
    pub(super) decided: BTreeMap<Marker, Arc<Decision>>,
    /// Those of which the document is damaged: they were decided, and nobody can tell how. They are read again each time, since a document may be
    /// brought back from a copy.
    pub(super) damaged: BTreeMap<Marker, Arc<VaultError>>,
}

impl Decisions {
    /// Whether a marker was decided.
    pub(super) fn has(&self, marker: &Marker) -> bool {
        self.decided.contains_key(marker) || self.damaged.contains_key(marker)
    }
}

/// Shared by all copies of a [`Vault`].
#[derive(Default)]
pub(crate) struct Cache {
    groups: Mutex<Arc<Groups>>,
    decisions: Mutex<HashMap<GroupId, Arc<Decisions>>>,
    /// Markers that were decided, and whose reports the store does not delete.
    pub(super) kept_by_store: Mutex<HashSet<(GroupId, Marker)>>,
    /// Of each machine the number of its newest document, and what it says.
    pub(super) addresses: Mutex<HashMap<MachineId, (u64, String)>>,
}

impl Vault {
    /// The groups as they are now.
    pub async fn groups(&self) -> Result<Arc<Groups>> {
        let names = self.control_list("groups").await?;
        let numbers: BTreeSet<u64> = names.iter().filter_map(|name| number(name)).collect();
        let mut known = self.groups.groups.lock().await;
        if *known.numbers() == numbers {
            return Ok(known.clone());
        }
        // A copy of the vault may have been made in any order.
        let goes_on = known.numbers().is_subset(&numbers)
            && numbers.range(..known.next_number()).count() == known.numbers().len();
        let mut groups = if goes_on { Groups::clone(&known) } else { Groups::default() };
        let new: Vec<u64> = numbers.difference(groups.numbers()).copied().collect();
        let mut read = stream::iter(new)
            .map(|number| async move { Ok::<_, VaultError>((number, read(self, &name_of(number)).await?)) })
            .buffered(READ_DEPTH);
        while let Some((number, group)) = read.try_next().await? {
            groups.apply(number, group);
        }
        *known = Arc::new(groups);
        Ok(known.clone())
    }

    /// The groups as they were when they were read last.
    pub async fn groups_known(&self) -> Arc<Groups> {
        self.groups.groups.lock().await.clone()
    }

    /// All decisions on the markers of a group. One that is damaged does not stop the others.
    pub(super) async fn decisions(&self, group: GroupId) -> Result<Arc<Decisions>> {
        let folder = format!("group-points/{group}");
        let names = self.control_list(&folder).await?;
        let markers: Vec<Marker> =
            names.iter().filter_map(|name| name.rsplit('/').next()?.parse().ok()).collect();
        let known = self.groups.decisions.lock().await.get(&group).cloned().unwrap_or_default();
        let (mut decisions, mut new) = (Decisions::default(), Vec::new());
        for marker in markers {
            match known.decided.get(&marker) {
                Some(decision) => drop(decisions.decided.insert(marker, decision.clone())),
                None => new.push(marker),
            }
        }
        if new.is_empty() && decisions.decided.len() == known.decided.len() && known.damaged.is_empty() {
            return Ok(known);
        }
        let mut read = stream::iter(new)
            .map(|marker| async move { (marker, self.decision(group, marker).await) })
            .buffer_unordered(READ_DEPTH);
        while let Some((marker, decision)) = read.next().await {
            match decision {
                // Deleted meanwhile?
                Ok(decision) => {
                    decisions.decided.extend(decision.map(|decision| (marker, Arc::new(decision))));
                }
                Err(error) if error.is_damage() => drop(decisions.damaged.insert(marker, Arc::new(error))),
                Err(error) => return Err(error),
            }
        }
        drop(read);
        let decisions = Arc::new(decisions);
        self.groups.decisions.lock().await.insert(group, decisions.clone());
        Ok(decisions)
    }

    /// What was decided on a marker, if it was.
    pub async fn decision(&self, group: GroupId, marker: Marker) -> Result<Option<Decision>> {
        find(self, &decision_name(group, marker)).await
    }
}

pub(super) fn decision_name(group: GroupId, marker: Marker) -> String {
    format!("group-points/{group}/{marker}")
}

pub(super) fn name_of(number: u64) -> String {
    format!("groups/{number:08}")
}

fn number(name: &str) -> Option<u64> {
    let number = name.strip_prefix("groups/")?.parse().ok()?;
    (name_of(number) == name).then_some(number)
}

/// A document, if it is there.
pub(super) async fn find<T: DeserializeOwned>(vault: &Vault, name: &str) -> Result<Option<T>> {
    let Some(text) = vault.control_get(name).await? else { return Ok(None) };
    let document = serde_json::from_slice(&text);
    document.map(Some).map_err(|e| VaultError::corrupt(format!("control/{name}"), e.to_string()))
}

/// One that must be.
pub(super) async fn read<T: DeserializeOwned>(vault: &Vault, name: &str) -> Result<T> {
    let gone = || VaultError::corrupt(format!("control/{name}"), "it is gone");
    find(vault, name).await?.ok_or_else(gone)
}

/// False if there is one of this name.
pub(super) async fn create<T: Serialize>(vault: &Vault, name: &str, document: &T) -> Result<bool> {
    let text = serde_json::to_vec(document).map_err(|_| VaultError::Limit("bytes of a document"))?;
    vault.control_create(name, &text).await
}
