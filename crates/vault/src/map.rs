//! Where each block of a disk lies after some commit: the newest object that holds it wins.
//!
//! Nothing as long as the disk is kept: what is read of indexes is in the vault's cache, which all maps share. The objects looked
//! through are the commit's cover ([`crate::runs::cover`]): runs, and shortcuts over many of them. Their pages are fetched several
//! at a time.

mod content;
mod loss;

pub(crate) use loss::Broken;

use crate::{
    MachineState, Result, Vault, VaultError,
    key::MachineKeys,
    maps::{Inner, MapFooter},
    pages::{Cached, PageCache},
    record::SegmentRef,
    runs::{Kind, cover, touches},
    segment::{Entry, Footer, FrameAt, FrameKind, Page, PageKind, PageRef, SegmentReader},
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
const LOOK_DEPTH: usize = 24;
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

/// Where an object says that blocks of a range are, or why it cannot be read what it says of some.
struct Found {
    first: u64,
    end: u64,
    page: Result<Arc<Page>>,
}

impl std::fmt::Debug for BlockMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockMap({}, {} objects)", self.inner.disk, self.inner.sources.len())
    }
}

impl Found {
    /// # Errors
    /// The store failed: that says nothing of what is stored.
    fn of(reference: &PageRef, page: Result<Arc<Page>>) -> Result<Self> {
        match page {
            Err(error @ VaultError::Store(_)) => Err(error),
            page => Ok(Self { first: reference.first, end: reference.end, page }),
        }
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

    /// The pages of an object that touch a range.
    async fn pages(&self, source: &Source, from: u64, to: u64) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        let whole = |error| Found { first: source.first, end: source.end, page: Err(error) };
        if source.kind != Kind::Map {
            let footer = match self.footer(source).await {
                Ok(footer) => footer,
                Err(error @ VaultError::Store(_)) => return Err(error),
                Err(error) => return Ok(vec![whole(error)]),
            };
            let own = footer.pages.partition_point(|page| page.disk < self.inner.disk);
            let own = footer.pages[own..].iter().take_while(|page| page.disk == self.inner.disk);
            for reference in own.skip_while(|page| page.end <= from).take_while(|page| page.first < to) {
                let page = self.page(source, PageKind::Segment, reference).await;
                found.push(Found::of(reference, page)?);
            }
            return Ok(found);
        }
        let footer = match self.map_footer(source).await {
            Ok(footer) => footer,
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(error) => return Ok(vec![whole(error)]),
        };
        let own = footer.disks.iter().find(|disk| disk.root.disk == self.inner.disk);
        let mut stack: Vec<(PageRef, u8)> =
            own.map(|disk| (disk.root.clone(), disk.level)).into_iter().collect();
        while let Some((reference, level)) = stack.pop() {
            if level == 0 {
                found.push(Found::of(&reference, self.page(source, PageKind::Leaf, &reference).await)?);
                continue;
            }
            let inner = match self.inner_page(source, level, &reference).await {
                Ok(inner) => inner,
                Err(error) => {
                    found.push(Found::of(&reference, Err(error))?);
                    continue;
                }
            };
            let begin = stack.len();
            stack.extend(inner.touching(from, to).map(|page| (page.clone(), level - 1)));
            stack[begin..].reverse();
        }
        Ok(found)
    }

    async fn page(&self, source: &Source, kind: PageKind, reference: &PageRef) -> Result<Arc<Page>> {
        let key = (source.reader.reference.id, reference.frame);
        if let Some(Cached::Page(page)) = self.inner.cache.get(key) {
            return Ok(page);
        }
        let page = Arc::new(source.reader.page(reference, kind).await?);
        self.inner.cache.put(key, Cached::Page(page.clone()));
        Ok(page)
    }

    async fn inner_page(&self, source: &Source, level: u8, reference: &PageRef) -> Result<Arc<Inner>> {
        let key = (source.reader.reference.id, reference.frame);
        if let Some(Cached::Inner(inner)) = self.inner.cache.get(key) {
            return Ok(inner);
        }
        let plain = source.reader.one(reference.at(), FrameKind::Inner).await?;
        let inner = Arc::new(Inner::decode(&plain, level, reference, &source.reader.path)?);
        self.inner.cache.put(key, Cached::Inner(inner.clone()));
        Ok(inner)
    }

    async fn footer(&self, source: &Source) -> Result<Arc<Footer>> {
        let key = (source.reader.reference.id, source.reader.reference.footer_frame);
        if let Some(Cached::Footer(footer)) = self.inner.cache.get(key) {
            return Ok(footer);
        }
        let footer = Arc::new(source.reader.footer().await?);
        self.inner.cache.put(key, Cached::Footer(footer.clone()));
        Ok(footer)
    }

    async fn map_footer(&self, source: &Source) -> Result<Arc<MapFooter>> {
        let key = (source.reader.reference.id, source.reader.reference.footer_frame);
        if let Some(Cached::MapFooter(footer)) = self.inner.cache.get(key) {
            return Ok(footer);
        }
        let plain = source.reader.footer_frame().await?;
        let footer = Arc::new(MapFooter::decode(&plain, &source.reader.path)?);
        self.inner.cache.put(key, Cached::MapFooter(footer.clone()));
        Ok(footer)
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
