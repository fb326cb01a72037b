//! Where each block of a disk lies after some commit: the newest object that holds it wins.
//!
//! Nothing as long as the disk is kept: what is read of indexes is in the vault's cache, which all maps share. The objects looked
//! through are the commit's cover ([`crate::runs::cover`]): runs, and shortcuts over many of them. Their pages are fetched several
//! at a time.

mod content;
mod indexes;
mod loss;

pub use content::Lacking;
pub(crate) use loss::Broken;

use crate::{
    MachineState, Result, Vault, VaultError,
    key::MachineKeys,
    pages::PageCache,
    record::SegmentRef,
    runs::{Kind, cover, touches},
    segment::{Entry, FrameAt, Page, SegmentReader},
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::{
    Block, BlockHash, BlockRange, CommitId, DiskId, Fill, HashKey, MachineId, StoredBlock,
};
use object_store::ObjectStore;
use std::sync::Arc;

/// Most blocks of one call.
pub(crate) const RANGE_BLOCKS_MAX: u64 = 65_536;
/// Objects whose pages are fetched at once: all of a usual cover, or a far store is waited for several times.
const LOOK_DEPTH: usize = 48;
/// What an object costs a map: reference, path and key.
const SOURCE_BYTES: u64 = 1024;

/// The blocks of one disk after one commit. Cheap to clone; clones share the cache.
#[derive(Clone)]
pub struct BlockMap {
    inner: Arc<Blocks>,
}

struct Blocks {
    /// Newest first.
    sources: Vec<Source>,
    store: Arc<dyn ObjectStore>,
    machine: MachineId,
    keys: MachineKeys,
    hash: HashKey,
    disk: DiskId,
    size_bytes: u64,
    cache: Arc<PageCache>,
    chunks: Arc<PageCache>,
}
struct Source {
    reader: SegmentReader,
    kind: Kind,
    /// Of the disk.
    first: u64,
    end: u64,
}

/// Where one block is.
#[derive(Clone, Copy)]
enum Slot {
    Absent,
    /// The newest object that may hold it cannot be read.
    Lost,
    Zero,
    Data {
        place: Place,
        payload_block: u8,
        hash: BlockHash,
    },
}

/// A chunk: of which source, the number of the segment that the source names, and where in that.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    source: usize,
    segment: u32,
    at: FrameAt,
}

impl std::fmt::Debug for BlockMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockMap({}, {} objects)", self.inner.disk, self.inner.sources.len())
    }
}

impl BlockMap {
    pub(crate) fn load(
        vault: &Vault,
        keys: &MachineKeys,
        state: &MachineState,
        disk: DiskId,
        size_bytes: u64,
        at: CommitId,
    ) -> Result<Self> {
        let (store, machine) = (vault.store().clone(), state.machine);
        let (cache, chunks) = (vault.pages.clone(), vault.chunks.clone());
        let mut sources = Vec::new();
        for (kind, object) in holding(state, disk, at)? {
            let own = object.spans.iter().filter(|span| span.disk == disk);
            let (first, end) = own.fold((u64::MAX, 0), |(f, e), span| (f.min(span.first), e.max(span.end)));
            let reader = SegmentReader::new(store.clone(), machine, keys, kind, object)?;
            sources.push(Source { reader, kind, first, end });
        }
        let (hash, keys) = (keys.hash.clone(), keys.clone());
        let inner = Blocks { sources, store, machine, keys, hash, disk, size_bytes, cache, chunks };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The disk's size at that commit.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.size_bytes
    }
    /// The disk's blocks at that commit.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        Block::count_for(self.inner.size_bytes)
    }

    /// What is stored of each block of a range of at most 65,536; blocks behind the disk are absent.
    pub async fn hashes(&self, range: BlockRange) -> Result<Vec<StoredBlock>> {
        let slots = self.resolve(range).await?;
        Ok(slots
            .into_iter()
            .map(|slot| match slot {
                Slot::Absent | Slot::Lost => StoredBlock::Absent,
                Slot::Zero => StoredBlock::Zero,
                Slot::Data { hash, .. } => StoredBlock::Data(hash),
            })
            .collect())
    }

    /// Where each block of a range is. What of an index cannot be read matters only to blocks that nothing newer holds.
    async fn resolve(&self, range: BlockRange) -> Result<Vec<Slot>> {
        match self.resolve_all(range).await? {
            (_, Some(error)) => Err(error),
            (slots, None) => Ok(slots),
        }
    }

    /// The same with what is lost, and the first reason for that.
    async fn resolve_all(&self, range: BlockRange) -> Result<(Vec<Slot>, Option<VaultError>)> {
        if range.count > RANGE_BLOCKS_MAX {
            return Err(VaultError::Limit("blocks of one read"));
        }
        let mut slots = vec![Slot::Absent; range.count as usize];
        let from = range.start.0;
        let to = from.saturating_add(range.count).min(self.blocks());
        let mut missing = to.saturating_sub(from);
        let touching = self.inner.sources.iter().enumerate();
        let touching = touching.filter(|(_, source)| source.first < to && from < source.end);
        let touching: Vec<usize> = touching.map(|(index, _)| index).collect();
        let mut looked = stream::iter(touching)
            .map(|index| {
                let map = self.clone();
                async move { map.pages(&map.inner.sources[index], from, to).await.map(|pages| (index, pages)) }
            })
            .buffered(LOOK_DEPTH);
        let mut why = None;
        while missing > 0
            && let Some((index, pages)) = looked.try_next().await?
        {
            for found in pages {
                match found.page {
                    Ok(page) => {
                        for entry in page.touching(from, to) {
                            missing -= fill(&mut slots, from, to, index, entry, &page);
                        }
                    }
                    Err(error) => {
                        let own = found.first.clamp(from, to)..found.end.clamp(from, to);
                        let own = (own.start - from) as usize..(own.end - from) as usize;
                        let empty = slots[own].iter_mut().filter(|slot| matches!(slot, Slot::Absent));
                        let lost = empty.map(|slot| *slot = Slot::Lost).count() as u64;
                        missing -= lost;
                        if lost > 0 {
                            why = why.or(Some(error));
                        }
                    }
                }
            }
        }
        Ok((slots, why))
    }
}

/// The objects that hold something of a disk at a commit, newest first.
fn holding(
    state: &MachineState,
    disk: DiskId,
    at: CommitId,
) -> Result<impl Iterator<Item = (Kind, &SegmentRef)>> {
    let items = cover(&state.runs, &state.shortcuts, at)?;
    Ok(items
        .into_iter()
        .flat_map(|item| {
            let kind = if item.is_merged() { Kind::Map } else { Kind::Segment };
            item.objects().iter().rev().map(move |object| (kind, object))
        })
        .filter(move |(_, object)| touches(&object.spans, disk)))
}

/// Bytes of memory that a map costs, at most, before it is loaded.
pub(crate) fn memory_bytes(state: &MachineState, disk: DiskId, at: CommitId) -> u64 {
    holding(state, disk, at).map_or(0, |objects| objects.count() as u64 * SOURCE_BYTES)
}

/// Takes an entry's blocks into slots that are still empty; how many it took.
fn fill(slots: &mut [Slot], from: u64, to: u64, source: usize, entry: &Entry, page: &Page) -> u64 {
    let mut taken = 0;
    for block in entry.start.max(from)..entry.end().min(to) {
        let slot = &mut slots[(block - from) as usize];
        if !matches!(slot, Slot::Absent) {
            continue;
        }
        let index = block - entry.start;
        *slot = match entry.fill {
            Fill::Zero => Slot::Zero,
            Fill::Data => Slot::Data {
                place: Place {
                    source,
                    segment: entry.segment,
                    at: FrameAt { offset: entry.offset, len: entry.len, frame: entry.frame },
                },
                payload_block: entry.payload_block + index as u8,
                hash: page.hashes[entry.hash_at as usize + index as usize],
            },
        };
        taken += 1;
    }
    taken
}

/// A disk's size: as a point at this commit says, else as the machine's records do.
///
/// # Errors
/// [`VaultError::UnknownPoint`] of a commit that the state does not know of yet, as after a list of a moment ago: what there was
/// before must not be taken for it.
pub(crate) fn size_at(state: &MachineState, disk: DiskId, at: CommitId) -> Result<u64> {
    if at.0 > state.last_record {
        return Err(VaultError::UnknownPoint(at));
    }
    let record = state.disk(disk)?;
    let covered = state.point(at).ok().and_then(|p| p.info.disks.iter().find(|d| d.disk == disk));
    Ok(covered.map_or(record.size_bytes, |covered| covered.size_bytes))
}
