//! What a session says to its peer, by whoever of it has something to say: one message at a time, and acknowledgements in order.

use crate::CollectorError;
use crate::lock::locked;
use crate::metrics::Metrics;
use highwater_delta::DeltaId;
use highwater_wire::message::CollectorMessage;
use highwater_wire::{FrameWriter, Timeouts, codec};
use std::pin::pin;
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

/// After how long a silence work for a machine shows that the collector lives. An agent waits for 15 s.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How long and how much of a refused peer's bytes are drained.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(2);
const DRAIN_BYTES_MAX: u64 = 64 << 20;

/// A session's way to its peer.
pub(super) struct Out<W> {
    frames: tokio::sync::Mutex<FrameWriter<W>>,
    /// When something was sent last.
    said: Mutex<Instant>,
    receipts: Mutex<Receipts>,
}

/// Chunks that were taken over, and what the peer knows of it.
#[derive(Default)]
struct Receipts {
    /// The last of them: its delta, and its number in it, from 1.
    taken: Option<(DeltaId, u64)>,
    /// Bytes whose `Received` is still due.
    due: usize,
    /// The last `Received` that went out. Only this one may be repeated: a later one would give the peer bytes that are
    /// not back in the window.
    told: Option<(DeltaId, u64)>,
}

impl<W: AsyncWrite + Unpin> Out<W> {
    pub(super) fn new(output: W, timeouts: Timeouts) -> Self {
        Self {
            frames: tokio::sync::Mutex::new(FrameWriter::new(output, timeouts)),
            said: Mutex::new(Instant::now()),
            receipts: Mutex::default(),
        }
    }

    pub(super) async fn send(&self, message: &CollectorMessage) -> Result<(), CollectorError> {
        let body = codec::encode(message)?;
        self.write(&mut *self.frames.lock().await, &body).await
    }

    async fn write(&self, frames: &mut FrameWriter<W>, body: &[u8]) -> Result<(), CollectorError> {
        frames.control(body).await?;
        frames.flush().await?;
        self.note_said();
        Ok(())
    }

    fn note_said(&self) {
        *locked(&self.said) = Instant::now();
    }

    /// A chunk was taken over, as were all before it.
    pub(super) fn taken(&self, chunk: (DeltaId, u64), bytes: usize, metrics: &Metrics) {
        let mut receipts = locked(&self.receipts);
        receipts.taken = Some(chunk);
        receipts.due += bytes;
        metrics.window(bytes);
    }

    /// Bytes taken over whose `Received` is still due.
    pub(super) fn due(&self) -> usize {
        locked(&self.receipts).due
    }

    /// Gives what is due back to the window, then says so: in this order, or a fast peer would find the window still full.
    pub(super) async fn acknowledge(
        &self,
        window: &Semaphore,
        metrics: &Metrics,
    ) -> Result<(), CollectorError> {
        // Looked at when it is our turn, so that counts never go back.
        let mut frames = self.frames.lock().await;
        let told = {
            let mut receipts = locked(&self.receipts);
            let due = std::mem::take(&mut receipts.due);
            let Some((delta, chunks)) = receipts.taken.filter(|_| due > 0) else { return Ok(()) };
            receipts.told = Some((delta, chunks));
            window.add_permits(due);
            metrics.window_returned(due);
            CollectorMessage::Received { delta, chunks }
        };
        let body = codec::encode(&told)?;
        self.write(&mut frames, &body).await
    }

    /// Waits for the vault, and repeats the last `Received` meanwhile. The vault's work is finished in any case: only then an
    /// error of the peer is answered.
    pub(super) async fn alive<T>(&self, work: impl Future<Output = T>) -> Result<T, CollectorError> {
        let mut work = pin!(work);
        let mut peer = Ok(());
        loop {
            // Since the last word, not since this work began: many short ones make a long silence too.
            let due = *locked(&self.said) + KEEPALIVE;
            match timeout_at(due, &mut work).await {
                Ok(done) => return peer.map(|()| done),
                // Somebody else has said something.
                Err(_) if *locked(&self.said) + KEEPALIVE > due => {}
                Err(_) if peer.is_ok() => {
                    self.note_said();
                    let message = match locked(&self.receipts).told {
                        Some((delta, chunks)) => CollectorMessage::Received { delta, chunks },
                        None => CollectorMessage::Pong(0),
                    };
                    peer = self.send(&message).await;
                }
                Err(_) => self.note_said(),
            }
        }
    }

    /// Says goodbye, if there is still somebody to hear it.
    pub(super) async fn shutdown(&self) {
        let _ = timeout(DRAIN_MAX, async { self.frames.lock().await.shutdown().await }).await;
    }

    /// Says why, and drains what the peer still sends, or a reset would overtake the word.
    pub(super) async fn turn_away<R: AsyncRead + Unpin>(&self, rest: R, error: &CollectorError) {
        // A peer that cannot be reached hears nothing.
        let told = async {
            let _ = self.send(&CollectorMessage::Refused(error.refusal())).await;
            let _ = self.frames.lock().await.shutdown().await;
            let _ = tokio::io::copy(&mut rest.take(DRAIN_BYTES_MAX), &mut tokio::io::sink()).await;
        };
        let _ = timeout(DRAIN_MAX, told).await;
    }
}
