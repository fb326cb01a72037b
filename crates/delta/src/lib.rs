//! The delta log: the words that every part of Highwater shares (ids, blocks, extents) and the encoded form in
//! which changed blocks travel from the agent to the vault and back.
//!
//! This crate is pure: no I/O, no clock, no runtime. Every decoder takes untrusted bytes and answers a typed
//! error; nothing is allocated before its length has been checked against a limit.
//!
//! The byte layout of a chunk is described in `docs/FORMAT.md`.

pub mod blockset;
pub mod chunk;
pub mod code;
pub mod hash;
pub mod ids;
pub mod point;
pub mod size;
pub mod units;

pub use blockset::BlockSet;
pub use chunk::{
    CHUNK_BLOCKS_MAX, CHUNK_BYTES_MAX, ChunkEncoder, ChunkError, ChunkView, Codec, EXTENTS_MAX, Extent, Fill,
    encode_chunk, split_zero_blocks,
};
pub use code::Code;
pub use hash::{BlockHash, HashKey};
pub use ids::{CommitId, DeltaId, DiskId, GroupId, MachineId, RelayId, SegmentId, VaultId};
pub use point::{CommitKind, Consistency, PointDisk, PointInfo, StoredBlock};
pub use units::{BLOCK_BYTES, Block, BlockRange, SECTOR_BYTES};
