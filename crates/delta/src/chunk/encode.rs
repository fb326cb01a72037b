//! Making chunks.

use super::{
    CHUNK_BLOCKS_MAX, CRC_BYTES, ChunkError, Codec, EXTENT_BYTES, EXTENTS_MAX, Extent, Fill, HASH_BYTES,
    HEADER_BYTES, MAGIC, VERSION, check_extents,
};
use crate::{BLOCK_BYTES, Block, BlockHash, DiskId, HashKey};

/// Makes chunks. Holds a compressor's context and scratch space (about 1 MiB), so keep one for each thread.
pub struct ChunkEncoder {
    compressor: zstd::bulk::Compressor<'static>,
    level: i32,
    extents: Vec<Extent>,
    dense: Vec<u8>,
    hashes: Vec<BlockHash>,
    /// Room for the compressed payload.
    compressed: Vec<u8>,
}

impl ChunkEncoder {
    /// An encoder that compresses at a zstd level (negative ones are fast).
    pub fn new(level: i32) -> Result<Self, ChunkError> {
        Ok(Self {
            compressor: zstd::bulk::Compressor::new(level).map_err(compressor_error)?,
            level,
            extents: Vec::new(),
            dense: Vec::new(),
            hashes: Vec::with_capacity(CHUNK_BLOCKS_MAX),
            compressed: vec![0; CHUNK_BLOCKS_MAX * BLOCK_BYTES],
        })
    }

    /// Changes the level from the next chunk on.
    pub fn set_level(&mut self, level: i32) -> Result<(), ChunkError> {
        if level != self.level {
            self.compressor.set_compression_level(level).map_err(compressor_error)?;
            self.level = level;
        }
        Ok(())
    }

    /// Replaces `out` by a chunk. `payload` is the content of the data extents' blocks, concatenated; `extents`
    /// are sorted and do not overlap. Blocks of zeros in the payload become zero extents.
    pub fn encode(
        &mut self,
        disk: DiskId,
        extents: &[Extent],
        payload: &[u8],
        key: &HashKey,
        out: &mut Vec<u8>,
    ) -> Result<(), ChunkError> {
        if extents.is_empty() || extents.len() > EXTENTS_MAX {
            return Err(ChunkError::TooLarge("number of extents"));
        }
        let data_blocks = check_extents(extents.iter().copied())?;
        if payload.len() != data_blocks * BLOCK_BYTES {
            return Err(ChunkError::Malformed("payload length does not fit the extents"));
        }
        let payload = if payload.as_chunks::<BLOCK_BYTES>().0.iter().any(is_zero) {
            split_zero_blocks(extents, payload, &mut self.extents, &mut self.dense);
            &self.dense[..]
        } else {
            self.extents.clear();
            self.extents.extend_from_slice(extents);
            payload
        };

        // Less than 1/16 saved is not worth the decompression; zstd gives up where the room ends.
        let worthwhile = payload.len() - payload.len() / 16;
        let (codec, stored) = match self
            .compressor
            .compress_to_buffer(payload, &mut self.compressed[..worthwhile])
        {
            Ok(len) if !payload.is_empty() && len < payload.len() => (Codec::Zstd, &self.compressed[..len]),
            _ => (Codec::Raw, payload),
        };

        let blocks = payload.len() / BLOCK_BYTES;
        out.clear();
        out.reserve(
            HEADER_BYTES + self.extents.len() * EXTENT_BYTES + blocks * HASH_BYTES + CRC_BYTES + stored.len(),
        );
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, if codec == Codec::Raw { 0 } else { 1 }]);
        out.extend_from_slice(&(self.extents.len() as u16).to_le_bytes());
        out.extend_from_slice(disk.as_bytes());
        out.extend_from_slice(&(blocks as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&extent.start.0.to_le_bytes());
            out.extend_from_slice(&extent.count.to_le_bytes());
            out.extend_from_slice(&[u8::from(extent.fill == Fill::Zero), 0, 0, 0]);
        }
        key.hash_all(payload.as_chunks().0, &mut self.hashes);
        self.hashes.iter().for_each(|hash| out.extend_from_slice(&hash.0));
        let crc = crc32c::crc32c(out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(stored);
        Ok(())
    }
}

/// Makes one chunk with an encoder of its own; a [`ChunkEncoder`] kept is much cheaper for many.
pub fn encode_chunk(
    disk: DiskId,
    extents: &[Extent],
    payload: &[u8],
    key: &HashKey,
    level: i32,
    out: &mut Vec<u8>,
) -> Result<(), ChunkError> {
    ChunkEncoder::new(level)?.encode(disk, extents, payload, key, out)
}

/// Replaces `extents_out` by `extents` with every block of zeros in the payload turned into (part of) a zero
/// extent, and `payload_out` by the payload without those blocks. Neighbours of the same kind that came from one
/// extent are kept together. `payload` must be as long as the data extents say.
pub fn split_zero_blocks(
    extents: &[Extent],
    payload: &[u8],
    extents_out: &mut Vec<Extent>,
    payload_out: &mut Vec<u8>,
) {
    extents_out.clear();
    payload_out.clear();
    let mut blocks = payload.as_chunks::<BLOCK_BYTES>().0.iter();
    for extent in extents {
        if extent.fill == Fill::Zero {
            append(extents_out, *extent);
            continue;
        }
        for (number, content) in (extent.start.0..extent.end()).zip(blocks.by_ref()) {
            let fill = if is_zero(content) { Fill::Zero } else { Fill::Data };
            if fill == Fill::Data {
                payload_out.extend_from_slice(content);
            }
            append(extents_out, Extent { start: Block(number), count: 1, fill });
        }
    }
}

/// Adds an extent, joined with the last one where they touch and are of one kind.
fn append(extents: &mut Vec<Extent>, next: Extent) {
    if let Some(last) = extents.last_mut()
        && last.fill == next.fill
        && last.end() == next.start.0
        && let Some(count) = last.count.checked_add(next.count)
    {
        last.count = count;
        return;
    }
    extents.push(next);
}

/// Whether a block is all zero.
#[must_use]
pub fn is_zero(block: &[u8; BLOCK_BYTES]) -> bool {
    // Folded in large steps, so that it vectorises and yet ends early.
    block.as_chunks::<256>().0.iter().all(|step| step.iter().fold(0, |all, byte| all | byte) == 0)
}

fn compressor_error(error: std::io::Error) -> ChunkError {
    ChunkError::Compressor(error.to_string())
}
