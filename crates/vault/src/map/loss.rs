//! Which blocks of a disk cannot be read at a commit: told from indexes; content is read only of what is known to be damaged.

use super::{BlockMap, Slot};
use crate::{Result, VaultError, segment::FrameAt};
use highwater_delta::{BlockHash, BlockRange, ChunkView, SegmentId};
use std::collections::{HashMap, HashSet, hash_map::Entry};

/// Blocks of a chunk, with their hashes.
type Blocks = Vec<(u64, BlockHash)>;

/// What is damaged, and what was found of it. Memory: of each damaged segment's chunks that were needed, 24 bytes a block.
#[derive(Default)]
pub(crate) struct Broken {
    /// Segments whose chunks have to be tried, and maps whose entries have to be.
    objects: HashSet<SegmentId>,
    /// By segment and place; none: it cannot be read.
    chunks: HashMap<(SegmentId, FrameAt), Option<Blocks>>,
}

impl Broken {
    pub(crate) fn new(objects: HashSet<SegmentId>) -> Self {
        Self { objects, chunks: HashMap::new() }
    }
}

impl BlockMap {
    /// The blocks of a range of at most 65,536 that cannot be read, as ranges from and to, sorted.
    pub(crate) async fn lost(&self, range: BlockRange, broken: &mut Broken) -> Result<Vec<(u64, u64)>> {
        let (slots, _) = self.resolve_all(range).await?;
        let mut lost: Vec<(u64, u64)> = Vec::new();
        for (block, slot) in (range.start.0..).zip(slots) {
            let is_lost = match slot {
                Slot::Absent | Slot::Zero => false,
                Slot::Lost => true,
                Slot::Data { place, payload_block, hash } => {
                    let of = self.inner.sources[place.source].reader.reference.id;
                    let wanted = (block, payload_block, hash);
                    let tried = self.tried(place.source, place.segment, place.at, of, wanted, broken).await;
                    match tried {
                        Ok(good) => !good,
                        Err(error @ VaultError::Store(_)) => return Err(error),
                        Err(_) => true,
                    }
                }
            };
            if is_lost {
                match lost.last_mut() {
                    Some((_, end)) if *end == block => *end += 1,
                    _ => lost.push((block, block + 1)),
                }
            }
        }
        Ok(lost)
    }

    /// Whether a block with content can be read. Of what is not damaged that is believed.
    async fn tried(
        &self,
        source: usize,
        segment: u32,
        at: FrameAt,
        of: SegmentId,
        (block, payload_block, hash): (u64, u8, BlockHash),
        broken: &mut Broken,
    ) -> Result<bool> {
        let reader = self.segment(source, segment).await?;
        let id = reader.reference.id;
        if !broken.objects.contains(&of) && !broken.objects.contains(&id) {
            return Ok(true);
        }
        let key = (id, at);
        if let Entry::Vacant(entry) = broken.chunks.entry(key) {
            let read = match reader.chunks(&[at]).await {
                Ok(chunks) => chunks.first().and_then(|chunk| self.blocks_of(chunk)),
                Err(error @ VaultError::Store(_)) => return Err(error),
                Err(_) => None,
            };
            entry.insert(read);
        }
        let blocks = broken.chunks.get(&key).and_then(Option::as_ref);
        Ok(blocks.and_then(|blocks| blocks.get(usize::from(payload_block))) == Some(&(block, hash)))
    }

    /// A chunk's blocks, if it is good.
    fn blocks_of(&self, chunk: &[u8]) -> Option<Blocks> {
        let view = ChunkView::parse(chunk).ok()?;
        view.open(&self.inner.hash, &mut Vec::new()).ok()?;
        let numbers = view.data_block_numbers().map(|number| number.0);
        (view.disk() == self.inner.disk).then(|| numbers.zip(view.hashes()).collect())
    }
}
