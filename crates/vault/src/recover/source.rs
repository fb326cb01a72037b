//! What is recovered: a point's blocks, wherever maintenance puts them meanwhile.

use crate::{BlockMap, Result, Vault, VaultError, map::Lacking};
use highwater_delta::{BlockRange, CommitId, DiskId, MachineId};
use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};
use tokio::sync::RwLock;

/// Times that a range is read anew since its objects were merged away.
const READ_TRIES: usize = 4;

/// See the module.
pub(super) struct Source {
    vault: Vault,
    machine: MachineId,
    disk: DiskId,
    point: CommitId,
    /// And how often it was made anew.
    map: RwLock<(u64, BlockMap)>,
    /// Objects that are missing, by a map made after that was seen.
    missing: Mutex<HashSet<String>>,
}

impl Source {
    pub(super) fn new(
        vault: Vault,
        machine: MachineId,
        disk: DiskId,
        point: CommitId,
        map: BlockMap,
    ) -> Self {
        let (map, missing) = (RwLock::new((0, map)), Mutex::default());
        Self { vault, machine, disk, point, map, missing }
    }

    /// Reads a range; answers what of it lacks, if that is to be skipped.
    pub(super) async fn read(
        &self,
        range: BlockRange,
        out: &mut [u8],
        skip_damaged: bool,
    ) -> Result<Lacking> {
        let mut gone = None;
        for _ in 1..READ_TRIES {
            let (made, map) = self.map.read().await.clone();
            match map.read(range, out).await {
                // Merged since this map was made, and so long ago that it was deleted; or lost, which the next try tells.
                Err(VaultError::Missing { object }) if !self.is_missing(&object) => {
                    gone = Some(object);
                    self.renew(made).await?;
                }
                Err(error) if skip_damaged && error.is_damage() => break,
                done => return done.map(|()| Lacking::default()),
            }
        }
        let map = self.map.read().await.1.clone();
        if !skip_damaged {
            return map.read(range, out).await.map(|()| Lacking::default());
        }
        let lacking = map.read_rest(range, out).await?;
        if let (Some(object), false) = (gone, lacking.blocks.is_empty()) {
            self.missing.lock().unwrap_or_else(PoisonError::into_inner).insert(object);
        }
        Ok(lacking)
    }

    /// A map made anew names it still: it is not looked for again.
    fn is_missing(&self, object: &str) -> bool {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).contains(object)
    }

    async fn renew(&self, made: u64) -> Result<()> {
        let mut current = self.map.write().await;
        // Another task may have done it.
        if current.0 == made {
            let state = self.vault.machine(self.machine).await?;
            state.point(self.point)?;
            *current = (made + 1, self.vault.block_map_of(&state, self.disk, self.point).await?);
        }
        Ok(())
    }
}
