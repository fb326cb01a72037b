//! Recovery of one disk at one point, into a raw file or onto a block device.
//!
//! A file is written beside its name (`….partial`), sparse, synced, and only then given its name: a file of the right
//! name is complete. A device is opened exclusively, which the kernel refuses for one that is mounted or held; only
//! blocks that differ are written unless asked otherwise, and it is synced at the end. An interrupted recovery onto a
//! device leaves it half old, half new; running it again completes it.
//!
//! Maintenance may go on meanwhile, and merge what is read: then the point is looked up anew. One that expires meanwhile (HW-1216) was not
//! pinned.
//!
//! Memory: 8 MiB of blocks and at most 16 MiB of chunks for each thread, and the block map.

mod place;
mod target;

pub use place::{Place, directory_place};
pub use target::Target;

use crate::{BlockMap, MachineState, Result, Vault, VaultError};
use highwater_delta::{Block, BlockRange, CommitId, DiskId, MachineId};
use serde::Serialize;
use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use target::OpenTarget;
use tokio::{sync::RwLock, task::JoinSet};

/// Blocks handled at once.
const WINDOW_BLOCKS: u64 = 2048;

/// How to recover.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Windows under way at once.
    pub threads: NonZeroUsize,
    /// Write every block, without reading the target first.
    pub write_all: bool,
}

impl Default for Options {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { threads, write_all: false }
    }
}

/// Told how far a recovery is.
pub trait Progress: Send + Sync {
    /// So many bytes of the disk are done, of so many.
    fn at(&self, done_bytes: u64, total_bytes: u64);
}
impl Progress for () {
    fn at(&self, _: u64, _: u64) {}
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The disk.
    pub disk: DiskId,
    /// The point.
    pub point: CommitId,
    /// Its size, all of which is now as at the point.
    pub size_bytes: u64,
    /// Bytes that were written; the rest was so already, or is a hole of a new file.
    pub written_bytes: u64,
}

/// Recovers a disk as it was at a recovery point.
pub async fn recover_disk(
    vault: &Vault,
    state: &MachineState,
    disk: DiskId,
    point: CommitId,
    target: &Target,
    options: Options,
    progress: Arc<dyn Progress>,
) -> Result<Report> {
    let covered = state.point(point)?.info.disks.iter().find(|covered| covered.disk == disk);
    let size_bytes = covered.ok_or(VaultError::UnknownDisk(disk))?.size_bytes;
    let map = vault.block_map_of(state, disk, point).await?;
    let source =
        Source { vault: vault.clone(), machine: state.machine, disk, point, map: RwLock::new((0, map)) };
    let target_of = target.clone();
    let opened = Arc::new(blocking(move || OpenTarget::open(&target_of, size_bytes)).await?);
    let written = fill(source, &opened, size_bytes, options, progress).await;
    let written_bytes = written?;
    blocking(move || opened.finish()).await?;
    Ok(Report { disk, point, size_bytes, written_bytes })
}

async fn fill(
    source: Source,
    target: &Arc<OpenTarget>,
    size_bytes: u64,
    options: Options,
    progress: Arc<dyn Progress>,
) -> Result<u64> {
    let blocks = Block::count_for(size_bytes);
    let source = Arc::new(source);
    let (done, written) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut tasks: JoinSet<Result<()>> = JoinSet::new();
    let mut start = 0;
    progress.at(0, size_bytes);
    loop {
        while start < blocks && tasks.len() < options.threads.get() {
            let range = BlockRange::new(start, WINDOW_BLOCKS.min(blocks - start));
            start = range.end();
            let (source, target, done, written, progress) =
                (source.clone(), target.clone(), done.clone(), written.clone(), progress.clone());
            tasks.spawn(async move {
                let mut content = vec![0; range.bytes() as usize];
                source.read(range, &mut content).await?;
                let offset = range.start.byte_offset();
                content.truncate((size_bytes - offset) as usize);
                let len = content.len() as u64;
                let wrote = blocking(move || target.put(offset, &content, options.write_all)).await?;
                written.fetch_add(wrote, Ordering::Relaxed);
                let done = done.fetch_add(len, Ordering::Relaxed) + len;
                progress.at(done, size_bytes);
                Ok(())
            });
        }
        match tasks.join_next().await {
            None => return Ok(written.load(Ordering::Relaxed)),
            Some(Ok(result)) => result?,
            Some(Err(_)) => return Err(VaultError::Order("a recovery task was cancelled")),
        }
    }
}

/// Times that a range is read anew since its objects were merged away.
const READ_TRIES: usize = 4;

/// What is recovered: a point's blocks, wherever maintenance puts them meanwhile.
struct Source {
    vault: Vault,
    machine: MachineId,
    disk: DiskId,
    point: CommitId,
    /// And how often it was made anew.
    map: RwLock<(u64, BlockMap)>,
}

impl Source {
    async fn read(&self, range: BlockRange, out: &mut [u8]) -> Result<()> {
        for _ in 1..READ_TRIES {
            let (made, map) = self.map.read().await.clone();
            match map.read(range, out).await {
                // Merged since this map was made, and so long ago that it was deleted; or lost, which the next try tells.
                Err(VaultError::Missing { .. }) => self.renew(made).await?,
                done => return done,
            }
        }
        let map = self.map.read().await.1.clone();
        map.read(range, out).await
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

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(VaultError::Order("a recovery task was cancelled")))
}
