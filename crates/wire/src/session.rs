//! Frames over a stream.
//!
//! **Cancellation.** [`FrameReader::next`] may be dropped at any await and called again: what was read stays in the
//! reader, and its deadlines go on. A cancelled or failed write leaves the stream in an unknown state: the
//! writer is poisoned, and every later call answers [`WireError::Poisoned`].
//!
//! **Limits.** A reader holds one frame at most. The peer may be silent for `idle` between frames; a frame once begun
//! must be complete within `frame`; a frame must be taken over by the network within `write`. Idle time counts
//! only while somebody waits for the next frame, so that a long commit here is not held against the peer.

use crate::WireError;
use crate::frame::{DELTA_ID_BYTES, FrameHeader, FrameKind, HEADER_BYTES};
use bytes::{BufMut, Bytes, BytesMut};
use highwater_delta::DeltaId;
use std::io::IoSlice;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};

/// How long a peer may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Silence between two frames.
    pub idle: Duration,
    /// A frame from its first byte to its last.
    pub frame: Duration,
    /// A frame until the network has taken it.
    pub write: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { idle: Duration::from_secs(90), frame: Duration::from_secs(30), write: Duration::from_secs(60) }
    }
}

/// A frame as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The body of a control message, its checksum right.
    Control(Bytes),
    /// A chunk, undecoded.
    Chunk {
        /// The delta it belongs to.
        delta: DeltaId,
        /// Encoded chunk.
        chunk: Bytes,
    },
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    input: R,
    timeouts: Timeouts,
    sequence: u64,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    body: Option<(FrameHeader, BytesMut)>,
    deadline: Option<(Instant, &'static str, Duration)>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `input`, which stands at the beginning of a session.
    pub fn new(input: R, timeouts: Timeouts) -> Self {
        Self {
            input,
            timeouts,
            sequence: 0,
            header: [0; HEADER_BYTES],
            header_filled: 0,
            body: None,
            deadline: None,
        }
    }

    /// Other limits from the next frame on.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.timeouts = timeouts;
    }

    /// The stream, with whatever of it was not read yet.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next frame; `None` if the peer closed the connection between frames. Cancellation-safe.
    pub async fn next(&mut self) -> Result<Option<Frame>, WireError> {
        loop {
            let (deadline, what, after) =
                *self.deadline.get_or_insert_with(|| limit(self.timeouts.idle, "waiting for a frame"));
            // The reader's fields are only changed after a read has returned, and both reads take nothing
            // from the stream when they are dropped before.
            let read = match &mut self.body {
                None => timeout_at(deadline, self.input.read(&mut self.header[self.header_filled..])).await,
                Some((header, body)) => {
                    let rest = header.body_bytes - body.len();
                    timeout_at(deadline, self.input.read_buf(&mut body.limit(rest))).await
                }
            };
            let bytes = read.map_err(|_| WireError::TimedOut { what, after })??;
            if bytes == 0 {
                return if self.header_filled == 0 { Ok(None) } else { Err(WireError::Truncated) };
            }
            if self.body.is_none() {
                if self.header_filled == 0 {
                    self.deadline = Some(limit(self.timeouts.frame, "receiving a frame"));
                }
                self.header_filled += bytes;
                if self.header_filled == HEADER_BYTES {
                    let header = FrameHeader::decode(&self.header, self.sequence)?;
                    self.body = Some((header, BytesMut::with_capacity(header.body_bytes)));
                }
            } else if let Some((header, body)) = self.body.take_if(|(h, b)| b.len() == h.body_bytes) {
                header.check_body(&body)?;
                self.sequence += 1;
                self.header_filled = 0;
                self.deadline = None;
                return Ok(Some(frame(header.kind, body.freeze())));
            }
        }
    }
}

fn limit(after: Duration, what: &'static str) -> (Instant, &'static str, Duration) {
    (Instant::now() + after, what, after)
}

fn frame(kind: FrameKind, mut body: Bytes) -> Frame {
    match kind {
        FrameKind::Control => Frame::Control(body),
        FrameKind::Chunk => {
            let mut id = [0; DELTA_ID_BYTES];
            id.copy_from_slice(&body.split_to(DELTA_ID_BYTES));
            Frame::Chunk { delta: DeltaId::from_bytes(id), chunk: body }
        }
    }
}

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    output: W,
    write_max: Duration,
    sequence: u64,
    poisoned: bool,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes to `output`, which stands at the beginning of a session.
    pub fn new(output: W, timeouts: Timeouts) -> Self {
        Self { output, write_max: timeouts.write, sequence: 0, poisoned: false }
    }

    /// Sends a control message's body.
    pub async fn control(&mut self, body: &[u8]) -> Result<(), WireError> {
        let header = FrameHeader::new(FrameKind::Control, self.sequence, body, body.len())?;
        self.write(&header.encode(), body).await
    }

    /// Sends a chunk. The chunk's bytes are handed to the stream as they are.
    pub async fn chunk(&mut self, delta: DeltaId, chunk: &[u8]) -> Result<(), WireError> {
        let id = delta.as_bytes();
        let header = FrameHeader::new(FrameKind::Chunk, self.sequence, id, id.len() + chunk.len())?;
        let mut head = [0; HEADER_BYTES + DELTA_ID_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&header.encode());
        head[HEADER_BYTES..].copy_from_slice(id);
        self.write(&head, chunk).await
    }

    /// Waits until the network has everything.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        self.guarded(async |output| output.flush().await).await
    }

    /// Ends the stream in an orderly way.
    pub async fn shutdown(&mut self) -> Result<(), WireError> {
        self.guarded(async |output| output.shutdown().await).await
    }

    async fn write(&mut self, head: &[u8], body: &[u8]) -> Result<(), WireError> {
        self.guarded(async |output| write_both(output, head, body).await).await?;
        self.sequence += 1;
        Ok(())
    }

    async fn guarded(
        &mut self,
        work: impl AsyncFnOnce(&mut W) -> std::io::Result<()>,
    ) -> Result<(), WireError> {
        if self.poisoned {
            return Err(WireError::Poisoned);
        }
        // Stays set if this future is dropped at the await.
        self.poisoned = true;
        let after = self.write_max;
        timeout(after, work(&mut self.output))
            .await
            .map_err(|_| WireError::TimedOut { what: "sending", after })??;
        self.poisoned = false;
        Ok(())
    }
}

async fn write_both<W: AsyncWrite + Unpin>(output: &mut W, head: &[u8], body: &[u8]) -> std::io::Result<()> {
    let mut done = 0;
    while done < head.len() {
        let bytes = output.write_vectored(&[IoSlice::new(&head[done..]), IoSlice::new(body)]).await?;
        if bytes == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        done += bytes;
    }
    output.write_all(&body[done - head.len()..]).await
}

#[cfg(test)]
mod tests;
