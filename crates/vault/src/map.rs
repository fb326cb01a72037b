//! Where each block of a disk lies after some commit: the newest segment that holds it wins.
//!
//! Nothing as long as the disk is kept: the page directories of its segments (48 bytes for each 64 KiB of index,
//! that is for some 3,000 blocks). Decoded pages are in the vault's cache, which all maps share.

use crate::{
    MachineState, Result, VaultError,
    key::MachineKeys,
    pages::PageCache,
    record::SegmentRef,
    segment::{Entry, FrameAt, Page, PageRef, SegmentReader},
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::{
    BLOCK_BYTES, Block, BlockHash, BlockRange, ChunkError, ChunkView, CommitId, DiskId, Fill, HashKey,
    StoredBlock,
};
use object_store::ObjectStore;
use std::{collections::BTreeMap, sync::Arc};

/// Most blocks of one call.
pub(crate) const RANGE_BLOCKS_MAX: u64 = 65_536;
/// Footers fetched at once.
const LOAD_DEPTH: usize = 16;
/// What a segment costs a map, besides its page directory: reference, path and key.
const SOURCE_BYTES: u64 = 1024;
/// Encoded bytes fetched at once by one read.
const FETCH_BYTES_MAX: u64 = 8 << 20;

/// The blocks of one disk after one commit. Cheap to clone; clones share the cache.
#[derive(Clone)]
pub struct BlockMap {
    inner: Arc<Inner>,
}

struct Inner {
    /// Newest first.
    segments: Vec<Source>,
    hash: HashKey,
    disk: DiskId,
    size_bytes: u64,
    cache: Arc<PageCache>,
}
struct Source {
    reader: SegmentReader,
    /// Of this disk only, sorted.
    pages: Vec<PageRef>,
}

/// Where one block is.
#[derive(Clone, Copy)]
enum Slot {
    Absent,
    Zero,
    Data { segment: usize, at: FrameAt, payload_block: u8, hash: BlockHash },
}

/// A block wanted from a chunk: its index in the answer, in the chunk, and its hash.
type Wanted = (usize, u8, BlockHash);

impl std::fmt::Debug for BlockMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockMap({}, {} segments)", self.inner.disk, self.inner.segments.len())
    }
}

impl BlockMap {
    pub(crate) async fn load(
        store: Arc<dyn ObjectStore>,
        cache: Arc<PageCache>,
        keys: &MachineKeys,
        state: &MachineState,
        disk: DiskId,
        size_bytes: u64,
        at: CommitId,
    ) -> Result<Self> {
        let mut readers = Vec::new();
        for reference in holding(state, disk, at) {
            readers.push(SegmentReader::new(store.clone(), state.machine, keys, reference)?);
        }
        let segments = stream::iter(readers)
            .map(|reader| async move {
                let mut pages = reader.footer().await?.pages;
                pages.retain(|page| page.disk == disk);
                Ok::<_, VaultError>(Source { reader, pages })
            })
            .buffered(LOAD_DEPTH)
            .try_collect()
            .await?;
        let hash = keys.hash.clone();
        Ok(Self { inner: Arc::new(Inner { segments, hash, disk, size_bytes, cache }) })
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
                Slot::Absent => StoredBlock::Absent,
                Slot::Zero => StoredBlock::Zero,
                Slot::Data { hash, .. } => StoredBlock::Data(hash),
            })
            .collect())
    }

    /// Reads a range of at most 65,536 blocks; absent blocks are zeros. Every block is checked against its hash.
    pub async fn read(&self, range: BlockRange, out: &mut [u8]) -> Result<()> {
        if out.len() as u64 != range.bytes() {
            return Err(VaultError::Order("the buffer is not as long as the range"));
        }
        let slots = self.resolve(range).await?;
        out.fill(0);
        let (blocks, _) = out.as_chunks_mut::<BLOCK_BYTES>();
        let mut frames: BTreeMap<(usize, FrameAt), Vec<Wanted>> = BTreeMap::new();
        for (index, slot) in slots.iter().enumerate() {
            if let Slot::Data { segment, at, payload_block, hash } = *slot {
                frames.entry((segment, at)).or_default().push((index, payload_block, hash));
            }
        }
        let frames: Vec<_> = frames.into_iter().collect();
        let mut raw = Vec::new();
        let mut rest = &frames[..];
        while let Some(((segment, _), _)) = rest.first() {
            let mut bytes = 0;
            let same = rest.iter().take_while(|((s, at), _)| {
                bytes += u64::from(at.len);
                s == segment && bytes <= FETCH_BYTES_MAX
            });
            // A single frame is at most 16 MiB by its check, and fetched even if it is larger than a batch.
            let (batch, after) = rest.split_at(same.count().max(1));
            rest = after;
            let reader = &self.inner.segments[*segment].reader;
            let places: Vec<FrameAt> = batch.iter().map(|((_, at), _)| *at).collect();
            for (chunk, (_, wanted)) in reader.chunks(&places).await?.iter().zip(batch) {
                self.copy(chunk, range.start.0, wanted, &mut raw, blocks)
                    .map_err(|e| VaultError::corrupt(&reader.path, e.to_string()))?;
            }
        }
        Ok(())
    }

    fn copy(
        &self,
        chunk: &[u8],
        first: u64,
        wanted: &[Wanted],
        raw: &mut Vec<u8>,
        out: &mut [[u8; BLOCK_BYTES]],
    ) -> Result<(), ChunkError> {
        let view = ChunkView::parse(chunk)?;
        if view.disk() != self.inner.disk {
            return Err(ChunkError::Malformed("it is of another disk"));
        }
        view.decompress_into(raw)?;
        let content = raw.as_chunks::<BLOCK_BYTES>().0;
        for (index, payload_block, hash) in wanted {
            let number = Block(first + *index as u64);
            let place = usize::from(*payload_block);
            if view.data_block_numbers().nth(place) != Some(number) {
                return Err(ChunkError::Malformed("the index does not fit it"));
            }
            if self.inner.hash.hash(&content[place]) != *hash {
                return Err(ChunkError::Hash(number));
            }
            out[*index] = content[place];
        }
        Ok(())
    }

    async fn resolve(&self, range: BlockRange) -> Result<Vec<Slot>> {
        if range.count > RANGE_BLOCKS_MAX {
            return Err(VaultError::Limit("blocks of one read"));
        }
        let mut slots = vec![Slot::Absent; range.count as usize];
        let from = range.start.0;
        let to = from.saturating_add(range.count).min(self.blocks());
        let mut missing = to.saturating_sub(from);
        for (segment, source) in self.inner.segments.iter().enumerate() {
            if missing == 0 {
                break;
            }
            let begin = source.pages.partition_point(|page| page.end <= from);
            for reference in source.pages.iter().skip(begin) {
                if reference.first >= to {
                    break;
                }
                let page = self.page(segment, reference).await?;
                for entry in page.touching(from, to) {
                    missing -= fill(&mut slots, from, to, segment, entry, &page);
                }
            }
        }
        Ok(slots)
    }

    async fn page(&self, segment: usize, reference: &PageRef) -> Result<Arc<Page>> {
        let reader = &self.inner.segments[segment].reader;
        let key = (reader.reference.id, reference.frame);
        if let Some(page) = self.inner.cache.get(key) {
            return Ok(page);
        }
        let page = Arc::new(reader.page(reference).await?);
        self.inner.cache.put(key, page.clone());
        Ok(page)
    }
}

/// The segments that hold something of a disk at a commit, newest first.
fn holding(state: &MachineState, disk: DiskId, at: CommitId) -> impl Iterator<Item = &SegmentRef> {
    state
        .segments
        .iter()
        .rev()
        .filter(move |segment| segment.commit <= at && segment.spans.iter().any(|span| span.disk == disk))
}

/// Bytes of memory that a map costs, at most, before it is loaded.
pub(crate) fn memory_bytes(state: &MachineState, disk: DiskId, at: CommitId) -> u64 {
    // A page's reference takes more in memory than in the footer, but not twice as much.
    holding(state, disk, at).map(|segment| SOURCE_BYTES + 2 * u64::from(segment.footer_len)).sum()
}

/// Takes an entry's blocks into slots that are still empty; how many it took.
fn fill(slots: &mut [Slot], from: u64, to: u64, segment: usize, entry: &Entry, page: &Page) -> u64 {
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
                segment,
                at: FrameAt { offset: entry.offset, len: entry.len, frame: entry.frame },
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
