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
use futures::{StreamExt, stream};
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

/// What of a range cannot be read, since something stored is damaged or missing.
#[derive(Debug, Default)]
pub struct Lacking {
    /// From and to, sorted, apart from each other.
    pub blocks: Vec<(u64, u64)>,
    /// The first reason.
    pub why: Option<VaultError>,
}

impl BlockMap {
    /// Reads a range of at most 65,536 blocks; absent blocks are zeros. Every block is checked against its hash.
    ///
    /// # Errors
    /// Of damage, the first that is met; then `out` holds nothing of use.
    pub async fn read(&self, range: BlockRange, out: &mut [u8]) -> Result<()> {
        let slots = self.resolve(range).await?;
        self.contents(range, slots, out, None).await
    }

    /// The same, but what is damaged or missing is left out: these blocks are zeros, and said.
    ///
    /// # Errors
    /// The store fails, which says nothing of what it holds.
    pub async fn read_rest(&self, range: BlockRange, out: &mut [u8]) -> Result<Lacking> {
        let (slots, why) = self.resolve_all(range).await?;
        let is_lost = |slot: &Slot| matches!(slot, Slot::Lost);
        let mut aside = Aside { lost: slots.iter().map(is_lost).collect(), why };
        self.contents(range, slots, out, Some(&mut aside)).await?;
        Ok(aside.lacking(range))
    }

    /// Fills `out` with what is in `slots`. With `aside`, damage is noted there.
    async fn contents(
        &self,
        range: BlockRange,
        slots: Vec<Slot>,
        out: &mut [u8],
        mut aside: Option<&mut Aside>,
    ) -> Result<()> {
        if out.len() as u64 != range.bytes() {
            return Err(VaultError::Order("the buffer is not as long as the range"));
        }
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
            let kept = if is_small { self.kept(&place).await } else { Ok(None) };
            match kept {
                Ok(Some(chunk)) => {
                    if let Err(error) = self.copy(&chunk, range.start.0, &wanted, &mut raw, blocks) {
                        let error = VaultError::corrupt("a chunk that was read before", error.to_string());
                        put_aside(&mut aside, error, &wanted)?;
                        wanted.iter().for_each(|(index, ..)| blocks[*index].fill(0));
                    }
                }
                Ok(None) => lacking.push((place, wanted)),
                Err(error) => put_aside(&mut aside, error, &wanted)?,
            }
        }
        let mut waiting = batches(lacking);
        while !waiting.is_empty() {
            let mut fetched = stream::iter(std::mem::take(&mut waiting))
                .map(|batch| {
                    let map = self.clone();
                    async move { (map.fetch(&batch).await, batch) }
                })
                .buffered(FETCH_DEPTH);
            while let Some((fetched, batch)) = fetched.next().await {
                let (reader, chunks) = match fetched {
                    Ok(fetched) => fetched,
                    // One chunk of several: each is tried alone, unless all of their segment is gone.
                    Err(VaultError::Corrupt { .. }) if aside.is_some() && batch.len() > 1 => {
                        waiting.extend(batch.into_iter().map(|one| vec![one]));
                        continue;
                    }
                    Err(error) => {
                        put_aside(&mut aside, error, batch.iter().flat_map(|(_, wanted)| wanted))?;
                        continue;
                    }
                };
                for (chunk, (place, wanted)) in chunks.into_iter().zip(&batch) {
                    if let Err(error) = self.copy(&chunk, range.start.0, wanted, &mut raw, blocks) {
                        let error = VaultError::corrupt(&reader.path, error.to_string());
                        put_aside(&mut aside, error, wanted)?;
                        wanted.iter().for_each(|(index, ..)| blocks[*index].fill(0));
                    } else if is_small {
                        let key = (reader.reference.id, place.at.frame);
                        self.inner.chunks.put(key, Cached::Chunk(Arc::new(chunk)));
                    }
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
        let numbers: Vec<Block> = view.data_block_numbers().collect();
        // All together is some three times as fast as one by one.
        let mut hashes = Vec::new();
        let is_most = wanted.len() * 3 > content.len();
        if is_most {
            self.inner.hash.hash_all(content, &mut hashes);
        }
        for (index, payload_block, hash) in wanted {
            let number = Block(first + *index as u64);
            let place = usize::from(*payload_block);
            if numbers.get(place) != Some(&number) {
                return Err(ChunkError::Malformed("the index does not fit it"));
            }
            let found = if is_most { hashes[place] } else { self.inner.hash.hash(&content[place]) };
            if found != *hash {
                return Err(ChunkError::Hash(number));
            }
            out[*index] = content[place];
        }
        Ok(())
    }
}

/// What of a range was found to be damaged.
struct Aside {
    /// By the place in the range.
    lost: Vec<bool>,
    why: Option<VaultError>,
}

impl Aside {
    fn lacking(self, range: BlockRange) -> Lacking {
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        for (block, _) in (range.start.0..).zip(self.lost).filter(|(_, lost)| *lost) {
            match blocks.last_mut() {
                Some((_, end)) if *end == block => *end += 1,
                _ => blocks.push((block, block + 1)),
            }
        }
        Lacking { blocks, why: self.why }
    }
}

/// Notes what cannot be read because of an error; if that is not wanted, or it is no damage, answers the error.
fn put_aside<'a>(
    aside: &mut Option<&mut Aside>,
    error: VaultError,
    wanted: impl IntoIterator<Item = &'a Wanted>,
) -> Result<()> {
    let Some(aside) = aside.as_mut().filter(|_| error.is_damage()) else { return Err(error) };
    wanted.into_iter().for_each(|(index, ..)| aside.lost[*index] = true);
    aside.why.get_or_insert(error);
    Ok(())
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
