//! Segments: immutable objects that hold chunks, as they were sent, and an index of them.
//!
//! ```text
//! header (64) │ frame 0: chunk │ frame 1: chunk │ … │ index pages │ footer │ trailer (64)
//! ```
//!
//! Each frame is 16 bytes of header and an AES-256-GCM ciphertext with its tag. The key is the segment's own,
//! derived from the machine key, the segment id and 128 random bits drawn for it; the nonce is the frame's number,
//! counted from 0 and never repeated in a segment. Machine, segment, frame number, kind and length
//! are authenticated, so that neither frames nor objects can be exchanged.
//!
//! Index pages are sorted by disk and block and hold the blocks' hashes; where chunks of one segment overlap, the
//! later has won. The footer lists the pages, so a reader of one block reads the footer, one page and one chunk.

mod finishing;
mod frames;
mod index;
mod read;
mod upload;
mod write;

pub(crate) use finishing::Finishing;
pub(crate) use frames::FrameWriter;
pub(crate) use index::{
    Entry, IndexBuilder, PAGE_BYTES_TARGET, Page, PageKind, PageRef, array, encode_entry,
};
pub(crate) use read::{FrameAt, SegmentReader, Tail, Walked, Window};
pub(crate) use upload::Upload;
pub(crate) use write::SegmentWriter;

use crate::{Result, VaultError, runs::Kind};
use aws_lc_rs::aead::Aad;
use highwater_delta::{MachineId, SegmentId};
use serde::{Deserialize, Serialize};

const HEADER_MAGIC: [u8; 4] = *b"HWSG";
/// Of a map, which is an object of frames too ([`crate::maps`]).
const MAP_MAGIC: [u8; 4] = *b"HWMG";
const TRAILER_MAGIC: [u8; 4] = *b"HWSE";
const VERSION: u8 = 1;
/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = 64;
/// Bytes of the trailer.
pub(crate) const TRAILER_BYTES: usize = 64;
/// Bytes of a frame's header.
pub(crate) const FRAME_HEADER_BYTES: usize = 16;
/// Most bytes of a frame: the footer of the greatest segment stays far below.
pub(crate) const FRAME_BYTES_MAX: usize = 16 << 20;
/// A segment is finished at this size.
pub(crate) const SEGMENT_BYTES_TARGET: u64 = 64 << 20;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameKind {
    Chunk = 0,
    Page = 1,
    Footer = 2,
    /// Of a map: entries.
    Leaf = 3,
    /// Of a map: where leaves, or other inner pages, lie.
    Inner = 4,
    /// Of a map: the segments that its entries name.
    Table = 5,
}
impl FrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Chunk, Self::Page, Self::Footer, Self::Leaf, Self::Inner, Self::Table]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// The footer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Footer {
    /// Frames that hold chunks; they are numbered from 0.
    pub(crate) chunks: u32,
    /// Blocks with content and blocks of zeros, after overlaps were resolved.
    pub(crate) data_blocks: u64,
    pub(crate) zero_blocks: u64,
    /// Sorted by disk and block.
    pub(crate) pages: Vec<PageRef>,
}

impl Footer {
    pub(crate) fn memory_bytes(&self) -> usize {
        self.pages.len() * size_of::<PageRef>() + 64
    }
}

/// Names the segment in every frame's authentication.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) kind: Kind,
    pub(crate) machine: MachineId,
    pub(crate) segment: SegmentId,
    pub(crate) salt: [u8; 16],
}

impl Identity {
    fn aad(&self, header: &[u8; FRAME_HEADER_BYTES]) -> Aad<[u8; 48]> {
        let mut bytes = [0; 48];
        bytes[..16].copy_from_slice(self.machine.as_bytes());
        bytes[16..32].copy_from_slice(self.segment.as_bytes());
        bytes[32..].copy_from_slice(header);
        Aad::from(bytes)
    }

    /// magic, version, 3 zero bytes, machine, segment, salt, 4 zero bytes, CRC32C.
    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let magic = if self.kind == Kind::Map { MAP_MAGIC } else { HEADER_MAGIC };
        bytes[..4].copy_from_slice(&magic);
        bytes[4] = VERSION;
        bytes[8..24].copy_from_slice(self.machine.as_bytes());
        bytes[24..40].copy_from_slice(self.segment.as_bytes());
        bytes[40..56].copy_from_slice(&self.salt);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// magic, version, 3 zero bytes, segment, footer offset u64, length u32, frame u32, bytes u64, 12 zero bytes, CRC32C.
    fn trailer(
        &self,
        footer_offset: u64,
        footer_len: u32,
        footer_frame: u32,
        bytes_all: u64,
    ) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..4].copy_from_slice(&TRAILER_MAGIC);
        bytes[4] = VERSION;
        bytes[8..24].copy_from_slice(self.segment.as_bytes());
        bytes[24..32].copy_from_slice(&footer_offset.to_le_bytes());
        bytes[32..36].copy_from_slice(&footer_len.to_le_bytes());
        bytes[36..40].copy_from_slice(&footer_frame.to_le_bytes());
        bytes[40..48].copy_from_slice(&bytes_all.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// length u32, frame u32, kind u8, 7 zero bytes.
fn frame_header(body_len: usize, frame: u32, kind: FrameKind) -> Result<[u8; FRAME_HEADER_BYTES]> {
    if body_len > FRAME_BYTES_MAX - FRAME_HEADER_BYTES {
        return Err(VaultError::Limit("bytes of a frame"));
    }
    let mut bytes = [0; FRAME_HEADER_BYTES];
    bytes[..4].copy_from_slice(&(body_len as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&frame.to_le_bytes());
    bytes[8] = kind as u8;
    Ok(bytes)
}
