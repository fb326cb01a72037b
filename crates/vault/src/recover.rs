//! Recovery of one disk at one point, into a raw file or onto a block device.
//!
//! A file is written beside its name (`….partial`), sparse, synced, and only then given its name: a file of the right
//! name is complete. A device is opened exclusively, which the kernel refuses for one that is mounted or held; only
//! blocks that differ are written unless asked otherwise, and it is synced at the end. An interrupted recovery onto a
//! device leaves it half old, half new; running it again completes it.
//!
//! Memory: 8 MiB of blocks and at most 16 MiB of chunks for each thread, and the block map.

mod place;
mod target;

pub use place::{Place, directory_place};
pub use target::Target;

use crate::{BlockMap, MachineState, Result, Vault, VaultError};
use highwater_delta::{BlockRange, CommitId, DiskId};
use serde::Serialize;
use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use target::OpenTarget;
use tokio::task::JoinSet;

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
    let target_of = target.clone();
    let opened = Arc::new(blocking(move || OpenTarget::open(&target_of, size_bytes)).await?);
    let written = fill(&map, &opened, size_bytes, options, progress).await;
    let written_bytes = written?;
    blocking(move || opened.finish()).await?;
    Ok(Report { disk, point, size_bytes, written_bytes })
}

async fn fill(
    map: &BlockMap,
    target: &Arc<OpenTarget>,
    size_bytes: u64,
    options: Options,
    progress: Arc<dyn Progress>,
) -> Result<u64> {
    let blocks = map.blocks();
    let (done, written) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut tasks: JoinSet<Result<()>> = JoinSet::new();
    let mut start = 0;
    progress.at(0, size_bytes);
    loop {
        while start < blocks && tasks.len() < options.threads.get() {
            let range = BlockRange::new(start, WINDOW_BLOCKS.min(blocks - start));
            start = range.end();
            let (map, target, done, written, progress) =
                (map.clone(), target.clone(), done.clone(), written.clone(), progress.clone());
            tasks.spawn(async move {
                let mut content = vec![0; range.bytes() as usize];
                map.read(range, &mut content).await?;
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

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(VaultError::Order("a recovery task was cancelled")))
}
