//! Bodies: those of requests are read as a whole, within their length, and within time.

use crate::RelayError;
use bytes::Bytes;
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::body::{Body, Incoming};
use object_store::PutPayload;
use std::{io, time::Duration};
use tokio::time::{Instant, timeout_at};

/// Nothing may come for so long.
pub const BODY_IDLE_MAX: Duration = Duration::from_secs(30);
/// And a body comes this fast on average, or within [`BODY_IDLE_MAX`].
pub const BODY_BYTES_A_SECOND: u64 = 32 * 1024;

/// Of an answer.
pub(super) type Answer = UnsyncBoxBody<Bytes, io::Error>;

/// The length that a request announces; it must.
pub(super) fn length(body: &Incoming) -> Result<u64, RelayError> {
    body.size_hint().exact().ok_or(RelayError::BadRequest("its length is not announced"))
}

/// Reads a body of `bytes`, for which there is memory. `told` hears of what came.
pub(super) async fn read(
    mut body: Incoming,
    bytes: u64,
    told: impl Fn(u64),
) -> Result<(PutPayload, u32), RelayError> {
    let begun = Instant::now();
    let until = begun + BODY_IDLE_MAX + Duration::from_secs(bytes / BODY_BYTES_A_SECOND);
    let (mut pieces, mut came, mut crc) = (Pieces::new(bytes), 0, 0);
    loop {
        let limit = until.min(Instant::now() + BODY_IDLE_MAX);
        let frame = timeout_at(limit, body.frame()).await.map_err(|_| RelayError::Slow(begun.elapsed()))?;
        let Some(frame) = frame else { break };
        let Ok(piece) = frame.map_err(|_| RelayError::BrokenOff)?.into_data() else { continue };
        came += piece.len() as u64;
        if came > bytes {
            return Err(RelayError::BadRequest("its body is longer than announced"));
        }
        told(piece.len() as u64);
        crc = crc32c::crc32c_append(crc, &piece);
        pieces.add(&piece);
    }
    if came < bytes {
        return Err(RelayError::BrokenOff);
    }
    Ok((pieces.done(), crc))
}

/// What comes, in pieces of its own: those that come may be small parts of large buffers.
struct Pieces {
    full: Vec<Bytes>,
    filling: Vec<u8>,
    left: u64,
}

/// Bytes of a piece.
const PIECE_BYTES: u64 = 256 * 1024;

impl Pieces {
    const fn new(bytes: u64) -> Self {
        Self { full: Vec::new(), filling: Vec::new(), left: bytes }
    }

    fn add(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.filling.len() == self.filling.capacity() {
                let next = usize::try_from(self.left.min(PIECE_BYTES)).unwrap_or(0);
                let full = std::mem::replace(&mut self.filling, Vec::with_capacity(next));
                self.full.push(full.into());
            }
            let room = (self.filling.capacity() - self.filling.len()).min(data.len());
            let (now, later) = data.split_at(room);
            self.filling.extend_from_slice(now);
            self.left -= now.len() as u64;
            data = later;
        }
    }

    fn done(mut self) -> PutPayload {
        self.full.push(self.filling.into());
        self.full.retain(|piece| !piece.is_empty());
        self.full.into_iter().collect()
    }
}
