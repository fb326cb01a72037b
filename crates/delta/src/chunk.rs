//! Chunks: the encoded form of changed blocks, made once by the agent and kept as they are to the day of recovery.
//!
//! A chunk holds extents of one disk, sorted and apart from each other. A `Data` extent has payload and a keyed
//! hash for each of its blocks; a `Zero` extent has neither. Blocks that are all zero never travel as payload: the
//! encoder turns them into `Zero` extents. The payload of all data extents, in order, is compressed as one piece.
//!
//! Limits: [`CHUNK_BLOCKS_MAX`] data blocks, [`EXTENTS_MAX`] extents given to the encoder,
//! [`EXTENTS_ENCODED_MAX`] in the encoded form, [`CHUNK_BYTES_MAX`] bytes. Header, extents and hashes are covered
//! by a CRC32C (against accidents); the payload by the hashes, which need the machine's key to be checked.
//!
//! Byte layout (little endian), also in `docs/FORMAT.md`:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `HWCH` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | codec: 0 raw, 1 zstd |
//! | 6 | 2 | number of extents E |
//! | 8 | 16 | disk |
//! | 24 | 2 | number of data blocks D |
//! | 26 | 2 | zero |
//! | 28 | 4 | bytes of payload P |
//! | 32 | 16 E | extents: start u64, count u32, fill u8 (0 data, 1 zero), 3 zero bytes |
//! | … | 16 D | hashes |
//! | … | 4 | CRC32C of everything before |
//! | … | P | payload |

mod encode;
#[cfg(test)]
mod tests;

pub use encode::{ChunkEncoder, encode_chunk, is_zero, split_zero_blocks};

use crate::{BLOCK_BYTES, Block, BlockHash, DiskId, HashKey};
use std::cell::RefCell;

/// Most data blocks of a chunk: 128 KiB before compression.
pub const CHUNK_BLOCKS_MAX: usize = 32;
/// Most extents that the encoder takes.
pub const EXTENTS_MAX: usize = 256;
/// Most extents of an encoded chunk: splitting zero blocks out of the payload adds fewer than one a data block.
pub const EXTENTS_ENCODED_MAX: usize = EXTENTS_MAX + CHUNK_BLOCKS_MAX;
/// Most bytes of an encoded chunk.
pub const CHUNK_BYTES_MAX: usize = HEADER_BYTES
    + EXTENTS_ENCODED_MAX * EXTENT_BYTES
    + CHUNK_BLOCKS_MAX * HASH_BYTES
    + CRC_BYTES
    + CHUNK_BLOCKS_MAX * BLOCK_BYTES;
/// Blocks lie below this number, so that every byte offset fits into 63 bits.
pub const BLOCK_END_MAX: u64 = 1 << 51;

const MAGIC: [u8; 4] = *b"HWCH";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 32;
const EXTENT_BYTES: usize = 16;
const HASH_BYTES: usize = 16;
const CRC_BYTES: usize = 4;

/// What an extent's blocks hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fill {
    /// Content, in the payload.
    Data,
    /// Zeros; no payload.
    Zero,
}

/// Consecutive blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first block.
    pub start: Block,
    /// How many; at least 1.
    pub count: u32,
    /// What they hold.
    pub fill: Fill,
}

impl Extent {
    /// The first block behind it.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.0 + self.count as u64
    }
}

/// How a payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// Why a chunk was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The bytes do not begin as a chunk does.
    #[error("these bytes are no chunk")]
    Magic,
    /// A version that this program does not know.
    #[error("chunk version {0} is not known")]
    Version(u8),
    /// A field has an impossible value, or the length does not fit the fields.
    #[error("malformed chunk: {0}")]
    Malformed(&'static str),
    /// Extents out of order, overlapping, empty or beyond any disk.
    #[error("bad extents: {0}")]
    Extents(&'static str),
    /// More than a chunk may hold.
    #[error("too much for one chunk: {0}")]
    TooLarge(&'static str),
    /// The checksum of header, extents and hashes differs.
    #[error("chunk checksum differs")]
    Checksum,
    /// The payload does not decompress to its stated length.
    #[error("chunk payload does not decompress")]
    Payload,
    /// A block's content does not have its hash.
    #[error("content of block {0} does not have its hash")]
    Hash(Block),
    /// The compressor could not be set up.
    #[error("compressor: {0}")]
    Compressor(String),
}

impl ChunkError {
    /// Its stable number, shown as `HW-1001`.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Magic => 1001,
            Self::Version(_) => 1002,
            Self::Malformed(_) => 1003,
            Self::Extents(_) => 1004,
            Self::TooLarge(_) => 1005,
            Self::Checksum => 1006,
            Self::Payload => 1007,
            Self::Hash(_) => 1008,
            Self::Compressor(_) => 1009,
        }
    }
    /// What to do about it.
    #[must_use]
    pub const fn action(&self) -> &'static str {
        match self {
            Self::Version(_) => "Upgrade this program to at least the release that wrote the data.",
            Self::Compressor(_) => "Check the configured compression level and the free memory.",
            Self::Extents(_) | Self::TooLarge(_) => "Report this as a defect of the sender.",
            Self::Magic | Self::Malformed(_) | Self::Checksum | Self::Payload | Self::Hash(_) => {
                "The data was damaged on its way or in store: verify the vault; check memory and storage."
            }
        }
    }
}

/// A parsed chunk over borrowed bytes: every bound, the order of extents and the checksum have been checked; the
/// payload has not (see [`ChunkView::open`]).
#[derive(Clone, Copy, Debug)]
pub struct ChunkView<'a> {
    disk: DiskId,
    codec: Codec,
    extents: &'a [u8],
    hashes: &'a [u8],
    payload: &'a [u8],
}

impl<'a> ChunkView<'a> {
    /// Checks and takes apart an encoded chunk; `bytes` must be exactly one.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ChunkError> {
        if bytes.len() < HEADER_BYTES + EXTENT_BYTES + CRC_BYTES {
            return Err(ChunkError::Malformed("shorter than the least chunk"));
        }
        if bytes.len() > CHUNK_BYTES_MAX {
            return Err(ChunkError::TooLarge("longer than the greatest chunk"));
        }
        if bytes[..4] != MAGIC {
            return Err(ChunkError::Magic);
        }
        if bytes[4] != VERSION {
            return Err(ChunkError::Version(bytes[4]));
        }
        let codec = match bytes[5] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return Err(ChunkError::Malformed("unknown codec")),
        };
        let extent_count = usize::from(u16_at(bytes, 6));
        let data_blocks = usize::from(u16_at(bytes, 24));
        let payload_len = u32_at(bytes, 28) as usize;
        if u16_at(bytes, 26) != 0 {
            return Err(ChunkError::Malformed("reserved bytes are not zero"));
        }
        if extent_count == 0 || extent_count > EXTENTS_ENCODED_MAX {
            return Err(ChunkError::TooLarge("number of extents"));
        }
        if data_blocks > CHUNK_BLOCKS_MAX {
            return Err(ChunkError::TooLarge("number of data blocks"));
        }
        let raw_len = data_blocks * BLOCK_BYTES;
        let plausible = match codec {
            Codec::Raw => payload_len == raw_len,
            Codec::Zstd => payload_len > 0 && payload_len < raw_len,
        };
        if !plausible {
            return Err(ChunkError::Malformed("payload length does not fit the extents"));
        }
        let hashes_at = HEADER_BYTES + extent_count * EXTENT_BYTES;
        let crc_at = hashes_at + data_blocks * HASH_BYTES;
        let payload_at = crc_at + CRC_BYTES;
        if bytes.len() != payload_at + payload_len {
            return Err(ChunkError::Malformed("length does not fit the fields"));
        }
        if crc32c::crc32c(&bytes[..crc_at]) != u32_at(bytes, crc_at) {
            return Err(ChunkError::Checksum);
        }
        let view = Self {
            disk: DiskId::from_bytes(array_at(bytes, 8)),
            codec,
            extents: &bytes[HEADER_BYTES..hashes_at],
            hashes: &bytes[hashes_at..crc_at],
            payload: &bytes[payload_at..],
        };
        view.check_extents(data_blocks)?;
        Ok(view)
    }

    fn check_extents(&self, data_blocks: usize) -> Result<(), ChunkError> {
        for raw in self.extents.chunks_exact(EXTENT_BYTES) {
            if raw[12] > 1 || raw[13..] != [0; 3] {
                return Err(ChunkError::Malformed("unknown fill"));
            }
        }
        let counted = check_extents(self.extents())?;
        if counted != data_blocks { Err(ChunkError::Malformed("data blocks miscounted")) } else { Ok(()) }
    }

    /// Whose blocks these are.
    #[must_use]
    pub const fn disk(&self) -> DiskId {
        self.disk
    }
    /// How the payload is stored.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }
    /// The extents, in order.
    pub fn extents(&self) -> impl ExactSizeIterator<Item = Extent> + Clone + use<'a> {
        self.extents.chunks_exact(EXTENT_BYTES).map(|raw| Extent {
            start: Block(u64::from_le_bytes(array_at(raw, 0))),
            count: u32_at(raw, 8),
            fill: if raw[12] == 0 { Fill::Data } else { Fill::Zero },
        })
    }
    /// The hashes of the data blocks, in order.
    pub fn hashes(&self) -> impl ExactSizeIterator<Item = BlockHash> + Clone + use<'a> {
        self.hashes.chunks_exact(HASH_BYTES).map(|raw| BlockHash(array_at(raw, 0)))
    }
    /// Every data block's number, in the order of the payload.
    pub fn data_block_numbers(&self) -> impl Iterator<Item = Block> + Clone + use<'a> {
        self.extents().filter(|e| e.fill == Fill::Data).flat_map(|e| (e.start.0..e.end()).map(Block))
    }
    /// How many data blocks there are.
    #[must_use]
    pub const fn data_blocks(&self) -> usize {
        self.hashes.len() / HASH_BYTES
    }
    /// Bytes of the payload before compression.
    #[must_use]
    pub const fn raw_len(&self) -> usize {
        self.data_blocks() * BLOCK_BYTES
    }
    /// Bytes of the payload as stored.
    #[must_use]
    pub const fn payload_len(&self) -> usize {
        self.payload.len()
    }

    /// Replaces `out` by the payload before compression, unchecked against the hashes. Never grows `out` beyond
    /// [`ChunkView::raw_len`].
    pub fn decompress_into(&self, out: &mut Vec<u8>) -> Result<(), ChunkError> {
        out.clear();
        match self.codec {
            Codec::Raw => out.extend_from_slice(self.payload),
            Codec::Zstd => {
                out.resize(self.raw_len(), 0);
                let written = decompress(self.payload, out)?;
                if written != self.raw_len() {
                    return Err(ChunkError::Payload);
                }
            }
        }
        Ok(())
    }

    /// Replaces `out` by the payload before compression, each block checked against its hash. Nothing of `out` may
    /// be used after an error.
    pub fn open(&self, key: &HashKey, out: &mut Vec<u8>) -> Result<(), ChunkError> {
        self.decompress_into(out)?;
        let (blocks, rest) = out.as_chunks::<BLOCK_BYTES>();
        debug_assert!(rest.is_empty(), "raw_len is a multiple of the block size");
        let mut found = Vec::with_capacity(blocks.len());
        key.hash_all(blocks, &mut found);
        for ((found, stated), number) in found.iter().zip(self.hashes()).zip(self.data_block_numbers()) {
            if *found != stated {
                return Err(ChunkError::Hash(number));
            }
        }
        Ok(())
    }
}

/// Checks order, overlap and bounds; answers the number of data blocks.
fn check_extents(extents: impl Iterator<Item = Extent>) -> Result<usize, ChunkError> {
    let mut end_before = 0;
    let mut data_blocks = 0_u64;
    for extent in extents {
        if extent.count == 0 {
            return Err(ChunkError::Extents("an extent is empty"));
        }
        if extent.start.0 < end_before {
            return Err(ChunkError::Extents("extents overlap or are out of order"));
        }
        if extent.start.0 >= BLOCK_END_MAX || extent.end() > BLOCK_END_MAX {
            return Err(ChunkError::Extents("an extent lies beyond any disk"));
        }
        end_before = extent.end();
        if extent.fill == Fill::Data {
            data_blocks += u64::from(extent.count);
        }
    }
    if data_blocks > CHUNK_BLOCKS_MAX as u64 {
        return Err(ChunkError::TooLarge("number of data blocks"));
    }
    Ok(data_blocks as usize)
}

fn decompress(payload: &[u8], out: &mut [u8]) -> Result<usize, ChunkError> {
    thread_local! {
        // A context is some 100 KiB; making one for each chunk would cost more than decompressing it.
        static CONTEXT: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|slot| {
        let context = match slot {
            Some(context) => context,
            None => {
                let made =
                    zstd::bulk::Decompressor::new().map_err(|e| ChunkError::Compressor(e.to_string()))?;
                slot.insert(made)
            }
        };
        context.decompress_to_buffer(payload, out).map_err(|_| ChunkError::Payload)
    })
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}
