//! The content of blocks: which chunks hold it, fetched several at a time, and checked block by block.
//!
//! What small reads fetch is kept for others nearby, in the vault's cache of chunks; large ones, which go through a disk, pass it by.

use super::{BlockMap, Blocks, Place, Slot};
use crate::{
    Result, VaultError,
    pages::Cached,
    record::SegmentRef,
    runs::Kind,
    segment::{FrameAt, SegmentReader},
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::{BLOCK_BYTES, Block, BlockHash, BlockRange, ChunkError, ChunkView};
use std::{collections::BTreeMap, sync::Arc};

/// Encoded bytes fetched by one request.
const FETCH_BYTES_MAX: u64 = 4 << 20;
/// Such requests at once.
const FETCH_DEPTH: usize = 3;
/// What reads of more blocks fetch is not kept.
const CACHED_BLOCKS_MAX: u64 = 32;

/// A block wanted from a chunk: its index in the answer, in the chunk, and its hash.
type Wanted = (usize, u8, BlockHash);

impl BlockMap {
    /// Reads a range of at most 65,536 blocks; absent blocks are zeros. Every block is checked against its hash.
    pub async fn read(&self, range: BlockRange, out: &mut [u8]) -> Result<()> {
        if out.len() as u64 != range.bytes() {
            return Err(VaultError::Order("the buffer is not as long as the range"));
        }
        let slots = self.resolve(range).await?;
        out.fill(0);
        let (blocks, _) = out.as_chunks_mut::<BLOCK_BYTES>();
        let mut frames: BTreeMap<Place, Vec<Wanted>> = BTreeMap::new();
        for (index, slot) in slots.iter().enumerate() {
            if let Slot::Data { place, payload_block, hash } = *slot {
                frames.entry(place).or_default().push((index, payload_block, hash));
            }
        }
        let mut raw = Vec::new();
        let is_small = range.count <= CACHED_BLOCKS_MAX;
        let mut lacking = Vec::new();
        for (place, wanted) in frames {
            match if is_small { self.kept(&place).await? } else { None } {
                Some(chunk) => self
                    .copy(&chunk, range.start.0, &wanted, &mut raw, blocks)
                    .map_err(|e| VaultError::corrupt("a chunk that was read before", e.to_string()))?,
                None => lacking.push((place, wanted)),
            }
        }
        let mut fetched = stream::iter(batches(lacking))
            .map(|batch| {
                let map = self.clone();
                async move { map.fetch(&batch).await.map(|fetched| (batch, fetched)) }
            })
            .buffered(FETCH_DEPTH);
        while let Some((batch, (reader, chunks))) = fetched.try_next().await? {
            for (chunk, (place, wanted)) in chunks.into_iter().zip(&batch) {
                self.copy(&chunk, range.start.0, wanted, &mut raw, blocks)
                    .map_err(|e| VaultError::corrupt(&reader.path, e.to_string()))?;
                if is_small {
                    let key = (reader.reference.id, place.at.frame);
                    self.inner.chunks.put(key, Cached::Chunk(Arc::new(chunk)));
                }
            }
        }
        Ok(())
    }

    /// A chunk that was read before.
    async fn kept(&self, place: &Place) -> Result<Option<Arc<Vec<u8>>>> {
        let (_, reference) = self.named(place.source, place.segment).await?;
        match self.inner.chunks.get((reference.id, place.at.frame)) {
            Some(Cached::Chunk(chunk)) => Ok(Some(chunk)),
            _ => Ok(None),
        }
    }

    /// Fetches chunks of one segment.
    async fn fetch(&self, batch: &[(Place, Vec<Wanted>)]) -> Result<(SegmentReader, Vec<Vec<u8>>)> {
        let Some((Place { source, segment, .. }, _)) = batch.first() else {
            return Err(VaultError::Order("nothing to fetch"));
        };
        let reader = self.segment(*source, *segment).await?;
        let places: Vec<FrameAt> = batch.iter().map(|(place, _)| place.at).collect();
        let chunks = reader.chunks(&places).await?;
        Ok((reader, chunks))
    }

    /// The segment that a source names by this number.
    pub(super) async fn segment(&self, source: usize, number: u32) -> Result<SegmentReader> {
        let (kind, reference) = self.named(source, number).await?;
        let Blocks { store, machine, keys, .. } = &*self.inner;
        SegmentReader::new(store.clone(), *machine, keys, kind, &reference)
    }

    async fn named(&self, source: usize, number: u32) -> Result<(Kind, SegmentRef)> {
        let source = &self.inner.sources[source];
        match source.kind {
            Kind::Map => self.row(source, number).await.map(|row| (row.kind, row.reference())),
            kind => Ok((kind, source.reader.reference.clone())),
        }
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
}

/// Splits what is wanted into what is fetched at once: of one segment, and not too much. A single frame is at most 16 MiB by its
/// check, and fetched even if it is larger than a batch.
fn batches(frames: Vec<(Place, Vec<Wanted>)>) -> Vec<Vec<(Place, Vec<Wanted>)>> {
    let mut batches: Vec<Vec<(Place, Vec<Wanted>)>> = Vec::new();
    let (mut of, mut bytes) = (None, 0);
    for (place, wanted) in frames {
        let len = u64::from(place.at.len);
        bytes += len;
        match batches.last_mut() {
            Some(batch) if of == Some((place.source, place.segment)) && bytes <= FETCH_BYTES_MAX => {
                batch.push((place, wanted));
            }
            _ => {
                (of, bytes) = (Some((place.source, place.segment)), len);
                batches.push(vec![(place, wanted)]);
            }
        }
    }
    batches
}
