//! From runs of blocks to chunks.

use highwater_delta::{
    BLOCK_BYTES, Block, BlockRange, ChunkError, DiskId, Extent, Fill, HashKey,
    chunk::{CHUNK_BLOCKS_MAX, ChunkEncoder, EXTENTS_MAX, is_zero},
};

/// Packs blocks of one disk into chunks. Runs of zeros cost an extent, however long; scattered blocks share chunks.
pub struct Batcher<'k> {
    disk: DiskId,
    key: &'k HashKey,
    encoder: ChunkEncoder,
    extents: Vec<Extent>,
    payload: Vec<u8>,
}

impl<'k> Batcher<'k> {
    /// For one disk, compressing at this zstd level.
    ///
    /// # Errors
    /// The level is not zstd's.
    pub fn new(disk: DiskId, key: &'k HashKey, level: i32) -> Result<Self, ChunkError> {
        Ok(Self {
            disk,
            key,
            encoder: ChunkEncoder::new(level)?,
            extents: Vec::with_capacity(EXTENTS_MAX),
            payload: Vec::with_capacity(CHUNK_BLOCKS_MAX * BLOCK_BYTES),
        })
    }

    /// Adds a run. Each chunk that becomes full is given to `emit`.
    ///
    /// # Errors
    /// `emit`'s own, or the encoder's.
    pub fn push<E: From<ChunkError>>(
        &mut self,
        range: BlockRange,
        content: &[u8],
        emit: &mut impl FnMut(Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Extents of a chunk ascend; runs come in any order.
        if self.extents.last().is_some_and(|last| last.end() > range.start.0) {
            self.flush(emit)?;
        }
        let (blocks, _) = content.as_chunks::<BLOCK_BYTES>();
        let (mut number, mut rest) = (range.start.0, blocks);
        while let Some(first) = rest.first() {
            let zero = is_zero(first);
            let alike = rest.iter().take_while(|block| is_zero(block) == zero).count();
            let (run, others) = rest.split_at(alike);
            if zero {
                self.add(Extent { start: Block(number), count: alike as u32, fill: Fill::Zero }, emit)?;
            } else {
                self.push_data(number, run, emit)?;
            }
            (number, rest) = (number + alike as u64, others);
        }
        Ok(())
    }

    /// Adds a range of zeros, however long.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_zeros<E: From<ChunkError>>(
        &mut self,
        range: BlockRange,
        emit: &mut impl FnMut(Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.extents.last().is_some_and(|last| last.end() > range.start.0) {
            self.flush(emit)?;
        }
        let mut at = range.start.0;
        while at < range.end() {
            let count = u32::try_from(range.end() - at).unwrap_or(u32::MAX);
            self.add(Extent { start: Block(at), count, fill: Fill::Zero }, emit)?;
            at += u64::from(count);
        }
        Ok(())
    }

    fn push_data<E: From<ChunkError>>(
        &mut self,
        mut number: u64,
        mut run: &[[u8; BLOCK_BYTES]],
        emit: &mut impl FnMut(Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        while !run.is_empty() {
            let room = CHUNK_BLOCKS_MAX - self.payload.len() / BLOCK_BYTES;
            let (part, others) = run.split_at(run.len().min(room));
            let extent = Extent { start: Block(number), count: part.len() as u32, fill: Fill::Data };
            if self.extents.is_empty() && part.len() == CHUNK_BLOCKS_MAX {
                // A whole chunk, as in every copy of a disk: made from where it was read to.
                let mut chunk = Vec::new();
                self.encoder.encode(self.disk, &[extent], part.as_flattened(), self.key, &mut chunk)?;
                emit(chunk)?;
            } else {
                self.add(extent, emit)?;
                self.payload.extend_from_slice(part.as_flattened());
                if self.payload.len() == CHUNK_BLOCKS_MAX * BLOCK_BYTES {
                    self.flush(emit)?;
                }
            }
            (number, run) = (number + part.len() as u64, others);
        }
        Ok(())
    }

    /// Notes an extent, joined with the last one if it continues it.
    fn add<E: From<ChunkError>>(
        &mut self,
        extent: Extent,
        emit: &mut impl FnMut(Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(last) = self.extents.last_mut()
            && last.fill == extent.fill
            && last.end() == extent.start.0
            && let Some(count) = last.count.checked_add(extent.count)
        {
            last.count = count;
            return Ok(());
        }
        if self.extents.len() == EXTENTS_MAX {
            self.flush(emit)?;
        }
        self.extents.push(extent);
        Ok(())
    }

    /// Gives the last, partly filled chunk to `emit`.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn flush<E: From<ChunkError>>(
        &mut self,
        emit: &mut impl FnMut(Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let mut chunk = Vec::new();
        self.encoder.encode(self.disk, &self.extents, &self.payload, self.key, &mut chunk)?;
        self.extents.clear();
        self.payload.clear();
        emit(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_delta::ChunkView;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn every_block_arrives_once(runs in proptest::collection::vec((0u64..3000, 1u64..80, 0u8..3), 1..30)) {
            let key = HashKey::new([7; 32]);
            let disk = DiskId::new();
            let mut batcher = Batcher::new(disk, &key, 1).unwrap();
            let mut expected = BTreeMap::new();
            let mut chunks = vec![];
            let mut emit = |c: Vec<u8>| -> Result<(), ChunkError> { chunks.push(c); Ok(()) };
            for (start, count, kind) in runs {
                let mut content = vec![0u8; (count as usize) * BLOCK_BYTES];
                for (i, block) in content.chunks_exact_mut(BLOCK_BYTES).enumerate() {
                    if kind == 1 || (kind == 2 && i % 3 != 0) { block.fill((start + i as u64) as u8 | 1); }
                    expected.insert(start + i as u64, block[0]);
                }
                batcher.push(BlockRange::new(start, count), &content, &mut emit).unwrap();
            }
            batcher.flush(&mut emit).unwrap();
            let mut got = BTreeMap::new();
            for chunk in &chunks {
                let view = ChunkView::parse(chunk).unwrap();
                let mut raw = vec![];
                view.open(&key, &mut raw).unwrap();
                let mut data = raw.chunks_exact(BLOCK_BYTES);
                for extent in view.extents() {
                    for block in extent.start.0..extent.end() {
                        let value = if extent.fill == Fill::Zero { 0 } else { data.next().unwrap()[0] };
                        got.insert(block, value);
                    }
                }
            }
            prop_assert_eq!(got, expected);
        }
    }
}
