//! Positions and sizes on a disk.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of a sector, the kernel's unit in the block layer.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a block, Highwater's unit of change.
pub const BLOCK_BYTES: usize = 4096;

/// A block's number on its disk: byte offset / 4096. The last block of a disk whose size is no multiple of
/// 4096 is padded with zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Block(pub u64);

impl Block {
    /// Offset of its first byte on the disk.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 * BLOCK_BYTES as u64
    }
    /// How many blocks a disk of so many bytes has; a partial last block counts.
    #[must_use]
    pub const fn count_for(size_bytes: u64) -> u64 {
        size_bytes.div_ceil(BLOCK_BYTES as u64)
    }
}
impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `count` blocks from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// The first block.
    pub start: Block,
    /// How many; may be 0.
    pub count: u64,
}

impl BlockRange {
    /// `count` blocks from block number `start` on.
    #[must_use]
    pub const fn new(start: u64, count: u64) -> Self {
        Self { start: Block(start), count }
    }
    /// The first block behind the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.0 + self.count
    }
    /// Bytes it covers.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.count * BLOCK_BYTES as u64
    }
}
