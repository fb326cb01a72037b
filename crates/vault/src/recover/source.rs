//! What is recovered: a point's blocks, wherever maintenance puts them meanwhile.

use crate::{BlockMap, Result, Vault, map::Lacking};
use highwater_delta::{BlockRange, CommitId, DiskId, MachineId};
use std::time::{Duration, Instant};
use tokio::sync::RwLock;

/// Times that a range is read anew since its objects were merged away, or moved, or mended.
const READ_TRIES: usize = 4;
/// What a map says that is not older is so: nothing is merged and deleted within that, since readers have a grace.
const FRESH: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Source {
    vault: Vault,
    machine: MachineId,
    disk: DiskId,
    point: CommitId,
    map: RwLock<Made>,
}

#[derive(Clone)]
struct Made {
    map: BlockMap,
    at: Instant,
    /// How often it was made anew.
    times: u64,
}

impl Source {
    /// `map` may be of a state that was read long ago.
    pub(super) fn new(
        vault: Vault,
        machine: MachineId,
        disk: DiskId,
        point: CommitId,
        map: BlockMap,
    ) -> Self {
        let at = Instant::now().checked_sub(FRESH).unwrap_or_else(Instant::now);
        Self { vault, machine, disk, point, map: RwLock::new(Made { map, at, times: 0 }) }
    }

    /// Reads a range; answers what of it lacks, if that is to be skipped. Something that cannot be read is looked for in a map made anew,
    /// before it is believed to be damaged.
    pub(super) async fn read(
        &self,
        range: BlockRange,
        out: &mut [u8],
        skip_damaged: bool,
    ) -> Result<Lacking> {
        for _ in 1..READ_TRIES {
            let made = self.map.read().await.clone();
            match made.map.read(range, out).await {
                Err(error) if error.is_damage() && !(skip_damaged && made.is_fresh()) => {
                    self.renew(made.times).await?;
                }
                Err(error) if error.is_damage() => break,
                done => return done.map(|()| Lacking::default()),
            }
        }
        let mut made = self.map.read().await.clone();
        if !skip_damaged {
            return made.map.read(range, out).await.map(|()| Lacking::default());
        }
        let mut lacking = made.map.read_rest(range, out).await?;
        for _ in 1..READ_TRIES {
            if lacking.blocks.is_empty() || made.is_fresh() {
                break;
            }
            self.renew(made.times).await?;
            made = self.map.read().await.clone();
            lacking = made.map.read_rest(range, out).await?;
        }
        Ok(lacking)
    }

    async fn renew(&self, times: u64) -> Result<()> {
        let mut current = self.map.write().await;
        // Another task may have done it.
        if current.times == times {
            let map = match self.vault.machine(self.machine).await {
                Ok(state) => {
                    state.point(self.point)?;
                    self.vault.block_map_of(&state, self.disk, self.point).await?
                }
                // Behind a record that is damaged nobody knows what there is.
                Err(error) if error.is_damage() => current.map.clone(),
                Err(error) => return Err(error),
            };
            *current = Made { map, at: Instant::now(), times: times + 1 };
        }
        Ok(())
    }
}

impl Made {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < FRESH
    }
}
