//! Frames: what lies between TLS and the messages. Pure: bytes in, bytes out.
//!
//! ```text
//! offset size
//!      0    4  magic "HWF1"
//!      4    1  kind: 1 control, 2 chunk
//!      5    3  zero
//!      8    8  sequence number, from 0 in each direction, one more with each frame
//!     16    4  length of the body
//!     20    4  crc32c of the body's checked part: all of a control body, the first 16 bytes of a chunk body
//!     24    4  crc32c of bytes 0..24
//! ```
//!
//! All numbers are little-endian. A control body is a postcard message; a chunk body is a 16-byte delta id and an
//! encoded chunk, which carries a checksum of its own. A length is checked before anything is allocated for it.

use crate::WireError;
use highwater_delta::chunk::CHUNK_BYTES_MAX as DELTA_CHUNK_BYTES_MAX;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"HWF1";
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 28;
/// Bytes of the delta id before a chunk.
pub const DELTA_ID_BYTES: usize = 16;
/// Most bytes of a control body. The largest message is an answer of 8192 block hashes, some 140 KiB.
pub const CONTROL_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of a chunk body: a delta id and the largest encoded chunk.
pub const CHUNK_BODY_BYTES_MAX: usize = DELTA_CHUNK_BYTES_MAX + DELTA_ID_BYTES;

/// What a frame's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A postcard message.
    Control,
    /// A delta id and an encoded chunk.
    Chunk,
}

impl FrameKind {
    const fn byte(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Chunk => 2,
        }
    }
    /// Most bytes of a body of this kind.
    #[must_use]
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Self::Control => CONTROL_BYTES_MAX,
            Self::Chunk => CHUNK_BODY_BYTES_MAX,
        }
    }
    /// How many of a body's first bytes the header's checksum covers.
    const fn checked_bytes(self, body_bytes: usize) -> usize {
        match self {
            Self::Control => body_bytes,
            Self::Chunk => DELTA_ID_BYTES,
        }
    }
}

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: FrameKind,
    /// Its place in the stream.
    pub sequence: u64,
    /// Bytes of the body, within the limits of its kind.
    pub body_bytes: usize,
    /// Checksum of the body's checked part.
    pub body_crc: u32,
}

impl FrameHeader {
    /// The header of a frame whose body begins with `checked` (all of a control body, the delta id of a chunk's).
    pub fn new(kind: FrameKind, sequence: u64, checked: &[u8], body_bytes: usize) -> Result<Self, WireError> {
        check_length(kind, body_bytes as u64)?;
        Ok(Self { kind, sequence, body_bytes, body_crc: crc32c::crc32c(checked) })
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.kind.byte();
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        let length = u32::try_from(self.body_bytes).expect("a body's length was checked against its limit");
        bytes[16..20].copy_from_slice(&length.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..24]);
        bytes[24..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks a header that must be number `expected` of its stream.
    pub fn decode(bytes: &[u8; HEADER_BYTES], expected: u64) -> Result<Self, WireError> {
        if bytes[..4] != MAGIC {
            return Err(WireError::BadFrame("it does not begin with HWF1"));
        }
        if crc32c::crc32c(&bytes[..24]) != u32_at(bytes, 24) {
            return Err(WireError::BadFrame("the header's checksum is wrong"));
        }
        let kind = match bytes[4] {
            1 => FrameKind::Control,
            2 => FrameKind::Chunk,
            _ => return Err(WireError::BadFrame("its kind is unknown")),
        };
        if bytes[5..8] != [0; 3] {
            return Err(WireError::BadFrame("reserved bytes are not zero"));
        }
        let mut sequence = [0; 8];
        sequence.copy_from_slice(&bytes[8..16]);
        let sequence = u64::from_le_bytes(sequence);
        if sequence != expected {
            return Err(WireError::Sequence { expected, found: sequence });
        }
        let length = u32_at(bytes, 16);
        check_length(kind, u64::from(length))?;
        Ok(Self { kind, sequence, body_bytes: length as usize, body_crc: u32_at(bytes, 20) })
    }

    /// Checks a whole body against the header.
    pub fn check_body(&self, body: &[u8]) -> Result<(), WireError> {
        let checked = body
            .get(..self.kind.checked_bytes(self.body_bytes))
            .filter(|_| body.len() == self.body_bytes)
            .ok_or(WireError::BadFrame("the body has another length than announced"))?;
        if crc32c::crc32c(checked) != self.body_crc {
            return Err(WireError::BadFrame("the body's checksum is wrong"));
        }
        Ok(())
    }
}

fn check_length(kind: FrameKind, bytes: u64) -> Result<(), WireError> {
    let bytes_max = kind.body_bytes_max() as u64;
    if bytes > bytes_max {
        return Err(WireError::Oversized { bytes, bytes_max });
    }
    let least = match kind {
        FrameKind::Control => 1,
        FrameKind::Chunk => DELTA_ID_BYTES as u64 + 1,
    };
    if bytes < least {
        return Err(WireError::BadFrame("the body is too short for its kind"));
    }
    Ok(())
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
