//! Erasing a machine: everything stored of it becomes unreadable for everybody, also in copies, and then goes away.
//!
//! # Contract
//!
//! - First a tombstone is created (`control/erased/<machine>`, for ever): from then on no writer of the machine is opened and it cannot
//!   be registered again. Then its key object is deleted: **from here on it is unreadable**, whoever holds copies of the rest. Then all
//!   else of it.
//! - Nothing is deleted unless [`may_erase`] lets it, which is asked first, each time, and again when the tombstone is there (and is taken away
//!   if the answer is another then). A crash between leaves the tombstone, and all that is stored.
//! - A crash or failure at any step leaves what was not done; doing it again does the rest, and with nothing left changes nothing.
//! - Whoever has a copy of the *key object* and a key of the vault can read a copy of the rest: of a bucket with versions or backups,
//!   old versions of `machines/<machine>/key` have to go too.
//! - A session that was under way may store objects for as long as it lasts; nobody can read them, and doing it again deletes them.

use crate::{
    Hold, Result, Vault, VaultError, maintain,
    policy::Rules,
    store::{self, delete_if_there},
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::MachineId;
use object_store::{ObjectStore, path::Path};
use serde::Serialize;
use std::time::Duration;

/// How often it is looked for objects that somebody still writes.
const ROUNDS_MAX: usize = 8;

/// What there is to erase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The machine.
    pub machine: MachineId,
    /// Its host name, if it can still be read.
    pub host_name: Option<String>,
    /// Its recovery points, if they can still be read.
    pub points: Option<u64>,
    /// Objects stored of it.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whether it was begun earlier.
    pub begun: bool,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The machine.
    pub machine: MachineId,
    /// Objects that were deleted, its key among them.
    pub deleted: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Objects that are still there: somebody writes them, or the store would not delete them. Nobody can read them.
    pub left: u64,
}

/// Whether a machine may be erased at this moment, in milliseconds since 1970. Asked before anything is deleted; whatever may forbid
/// it belongs here.
///
/// # Errors
/// [`VaultError::EraseRefused`]: a point of it is under legal hold, or immutable still, by the clock of whoever asks. Others: that cannot
/// be told.
pub async fn may_erase(vault: &Vault, machine: MachineId, now_ms: u64) -> Result<()> {
    let state = match vault.machine(machine).await {
        Ok(state) => state,
        // Its key is gone for ever.
        Err(VaultError::Erased(_)) => return Ok(()),
        // There may be a copy of its key, and holds that nobody can read here.
        Err(VaultError::UnknownMachine(_)) if !manifest_is_empty(vault, machine).await? => {
            let cause = "its key is missing, so that nobody can tell what is held of it; bring it back from a copy, or delete its folder with the store's own tools";
            return Err(VaultError::EraseRefused { machine, cause: cause.to_owned() });
        }
        Err(VaultError::UnknownMachine(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let refuse = |cause: String| Err(VaultError::EraseRefused { machine, cause });
    if let Some((point, _)) = state.holds.iter().find(|(_, hold)| hold.hold == Hold::Legal) {
        return refuse(format!("its point {point} is under legal hold"));
    }
    let rules = Rules::load(vault, machine).await?;
    let until = |stored_at_ms| rules.immutable_until_ms(stored_at_ms);
    let longest = state.points.iter().max_by_key(|point| until(point.stored_at_ms));
    match longest.filter(|point| until(point.stored_at_ms) > now_ms) {
        Some(point) => refuse(format!("its point {} is immutable still", point.id)),
        None => Ok(()),
    }
}

async fn manifest_is_empty(vault: &Vault, machine: MachineId) -> Result<bool> {
    let mut listed = vault.store().list(Some(&store::manifest_dir(machine)));
    Ok(listed.try_next().await?.is_none())
}

/// A moment that is past by the clock here and by the store's, which must agree: by one that runs ahead, what is immutable would seem to be
/// so no more.
async fn checked_ms(vault: &Vault) -> Result<u64> {
    let store_ms = vault.store_time().await?.now_ms();
    let here_ms = vault.now_ms();
    let skew = Duration::from_millis(here_ms.abs_diff(store_ms));
    if skew > maintain::SKEW_MAX { Err(VaultError::Clock(skew.as_secs())) } else { Ok(here_ms.min(store_ms)) }
}

/// What [`erase`] would do.
///
/// # Errors
/// As [`may_erase`]; [`VaultError::UnknownMachine`]: nothing is stored of it; [`VaultError::Clock`]: the clock here is not the store's.
pub async fn plan(vault: &Vault, machine: MachineId) -> Result<Plan> {
    let begun = vault.is_erased(machine).await?;
    let objects = objects(vault, machine).await?;
    if objects.is_empty() && !begun {
        return Err(VaultError::UnknownMachine(machine));
    }
    may_erase(vault, machine, checked_ms(vault).await?).await?;
    let state = vault.machine(machine).await.ok();
    Ok(Plan {
        machine,
        host_name: state.as_ref().map(|state| state.host_name.clone()),
        points: state.map(|state| state.points.len() as u64),
        objects: objects.len() as u64,
        bytes: objects.iter().map(|(_, bytes)| bytes).sum(),
        begun,
    })
}

/// Erases a machine, or what is left of it.
///
/// # Errors
/// As [`plan`]; a failure of the store leaves what was not done.
pub async fn erase(vault: &Vault, machine: MachineId) -> Result<Report> {
    plan(vault, machine).await?;
    begin(vault, machine).await?;
    let mut report = Report { machine, deleted: 0, deleted_bytes: 0, left: 0 };
    let mut all = objects(vault, machine).await?;
    let key = store::key_path(machine);
    // Before anything else: whatever happens then, nobody can read it.
    delete_if_there(&**vault.store(), &key).await?;
    for _ in 0..ROUNDS_MAX {
        let before: u64 = all.len() as u64;
        let bytes: u64 = all.iter().map(|(_, bytes)| bytes).sum();
        delete_all(&**vault.store(), all).await?;
        all = objects(vault, machine).await?;
        report.left = all.len() as u64;
        report.deleted += before.saturating_sub(report.left);
        report.deleted_bytes += bytes.saturating_sub(all.iter().map(|(_, bytes)| bytes).sum());
        if all.is_empty() {
            break;
        }
    }
    Ok(report)
}

/// Creates the tombstone, unless the machine must be kept after all. No hold can be put on its points from there on; one that was put, or a
/// policy that was set, since it was asked before, is seen.
pub(crate) async fn begin(vault: &Vault, machine: MachineId) -> Result<()> {
    let is_new = vault.bury(machine).await?;
    let asked = match checked_ms(vault).await {
        Ok(now_ms) => may_erase(vault, machine, now_ms).await,
        Err(error) => Err(error),
    };
    if asked.is_err() && is_new {
        vault.unbury(machine).await?;
    }
    asked
}

/// What a tombstone says, for people: no name, since that is to be gone.
#[derive(Serialize)]
struct Tombstone {
    erased_at_ms: u64,
}

fn tombstone(machine: MachineId) -> String {
    format!("erased/{machine}")
}

impl Vault {
    /// Whether a machine was erased, or its erasure begun.
    pub async fn is_erased(&self, machine: MachineId) -> Result<bool> {
        Ok(self.control_get(&tombstone(machine)).await?.is_some())
    }

    /// The machines that were erased, sorted.
    pub async fn erased_machines(&self) -> Result<Vec<MachineId>> {
        let names = self.control_list("erased").await?;
        Ok(names.iter().filter_map(|name| name.strip_prefix("erased/")?.parse().ok()).collect())
    }

    pub(crate) async fn refuse_erased(&self, machine: MachineId) -> Result<()> {
        if self.is_erased(machine).await? { Err(VaultError::Erased(machine)) } else { Ok(()) }
    }

    /// Whether it was not there.
    async fn bury(&self, machine: MachineId) -> Result<bool> {
        let text = serde_json::to_vec(&Tombstone { erased_at_ms: self.stamp_ms().await? });
        let text = text.map_err(|_| VaultError::Limit("bytes of a control document"))?;
        // One that is there says the same.
        self.control_create(&tombstone(machine), &text).await
    }

    /// Takes a tombstone back of which nothing came.
    async fn unbury(&self, machine: MachineId) -> Result<()> {
        self.control_delete(&tombstone(machine)).await
    }
}

/// Everything that is stored of a machine, with sizes.
async fn objects(vault: &Vault, machine: MachineId) -> Result<Vec<(Path, u64)>> {
    let listed = vault.store().list(Some(&store::machine_dir(machine)));
    Ok(listed.map_ok(|meta| (meta.location, meta.size)).try_collect().await?)
}

async fn delete_all(objects: &dyn ObjectStore, all: Vec<(Path, u64)>) -> Result<()> {
    let paths = stream::iter(all).map(|(path, _)| Ok(path)).boxed();
    let mut deleted = objects.delete_stream(paths);
    while let Some(one) = deleted.next().await {
        match one {
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
