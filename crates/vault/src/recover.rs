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
//! **Damage** ends it, unless what is damaged is to be skipped ([`Options::skip_damaged`]): then what lacks is written as zeros and told, and a
//! file gets a name that says that it is not all there.
//!
//! Memory: 8 MiB of blocks and at most 16 MiB of chunks for each thread, and the block map.

mod place;
mod source;
mod target;

pub use place::{Place, directory_place};
pub use target::Target;

use crate::{MachineState, Result, Vault, VaultError, map::Lacking};
use highwater_delta::{Block, BlockRange, CommitId, DiskId};
use serde::Serialize;
use source::Source;
use std::{
    num::NonZeroUsize,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
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
    /// Blocks that cannot be read are zeros, and told; else the first ends it.
    pub skip_damaged: bool,
}

impl Default for Options {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { threads, write_all: false, skip_damaged: false }
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
    /// Where it is now: the target, or beside it if something lacks.
    pub path: PathBuf,
    /// Its size, all of which is now as at the point, but for what lacks.
    pub size_bytes: u64,
    /// Bytes that were written; the rest was so already, or is a hole of a new file.
    pub written_bytes: u64,
    /// What could not be read, and is zeros now.
    pub lacking: Lacks,
}

/// What could not be read of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Lacks {
    /// Bytes.
    pub bytes: u64,
    /// Where, sorted and apart from each other; the first [`RANGES_MAX`] that were found.
    pub ranges: Vec<ByteRange>,
    /// Why, of one of them.
    pub why: Option<String>,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ByteRange {
    /// From here,
    pub offset: u64,
    /// so many.
    pub bytes: u64,
}

/// Ranges of a disk that lack and are told: some 16 MiB of memory.
pub const RANGES_MAX: usize = 1 << 20;

impl Lacks {
    fn take(&mut self, found: Lacking, size_bytes: u64) {
        self.why = self.why.take().or(found.why.map(|why| why.to_string()));
        for (from, to) in found.blocks {
            let offset = Block(from).byte_offset();
            let bytes = Block(to).byte_offset().min(size_bytes) - offset;
            self.bytes += bytes;
            if self.ranges.len() < RANGES_MAX {
                self.ranges.push(ByteRange { offset, bytes });
            }
        }
    }

    /// Puts neighbours together.
    fn sort(&mut self) {
        self.ranges.sort_by_key(|range| range.offset);
        self.ranges.dedup_by(|next, before| {
            let joined = before.offset + before.bytes == next.offset;
            if joined {
                before.bytes += next.bytes;
            }
            joined
        });
    }
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
    let source = Source::new(vault.clone(), state.machine, disk, point, map);
    let target_of = target.clone();
    let opened = Arc::new(blocking(move || OpenTarget::open(&target_of, size_bytes)).await?);
    let (written_bytes, lacking) = fill(source, &opened, size_bytes, options, progress).await?;
    let whole = lacking.bytes == 0;
    let path = blocking(move || opened.finish(whole)).await?;
    Ok(Report { disk, point, path, size_bytes, written_bytes, lacking })
}

async fn fill(
    source: Source,
    target: &Arc<OpenTarget>,
    size_bytes: u64,
    options: Options,
    progress: Arc<dyn Progress>,
) -> Result<(u64, Lacks)> {
    let blocks = Block::count_for(size_bytes);
    let source = Arc::new(source);
    let (done, written) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let lacks = Arc::new(Mutex::new(Lacks::default()));
    let mut tasks: JoinSet<Result<()>> = JoinSet::new();
    let mut start = 0;
    progress.at(0, size_bytes);
    loop {
        while start < blocks && tasks.len() < options.threads.get() {
            let range = BlockRange::new(start, WINDOW_BLOCKS.min(blocks - start));
            start = range.end();
            let (source, target, done, written, progress) =
                (source.clone(), target.clone(), done.clone(), written.clone(), progress.clone());
            let lacks = lacks.clone();
            tasks.spawn(async move {
                let mut content = vec![0; range.bytes() as usize];
                let lacking = source.read(range, &mut content, options.skip_damaged).await?;
                if !lacking.blocks.is_empty() {
                    lacks.lock().unwrap_or_else(PoisonError::into_inner).take(lacking, size_bytes);
                }
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
            None => {
                let mut lacks = std::mem::take(&mut *lacks.lock().unwrap_or_else(PoisonError::into_inner));
                lacks.sort();
                return Ok((written.load(Ordering::Relaxed), lacks));
            }
            Some(Ok(result)) => result?,
            Some(Err(_)) => return Err(VaultError::Order("a recovery task was cancelled")),
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(VaultError::Order("a recovery task was cancelled")))
}
