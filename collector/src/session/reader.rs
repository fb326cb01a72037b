//! Reads a session's frames ahead of its owner, within the window.
//!
//! A chunk takes its bytes out of the window before it is queued; the owner gives them back when it acknowledges the
//! chunk. A peer that keeps to the window can therefore never find it empty, and one that does not is told so. What
//! waits in memory is at most the window, and [`QUEUE_FRAMES`] control messages.

use crate::CollectorError;
use bytes::Bytes;
use highwater_delta::DeltaId;
use highwater_wire::message::AgentMessage;
use highwater_wire::{Frame, FrameReader, codec};
use std::sync::Arc;
use tokio::io::AsyncRead;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Frames that may wait for the owner.
pub const QUEUE_FRAMES: usize = 64;

/// What the owner gets.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(AgentMessage),
    /// A chunk, its bytes taken out of the window.
    Chunk(DeltaId, Bytes),
    /// The peer closed the connection.
    End,
    /// The session cannot go on.
    Failed(CollectorError),
}

/// Reads until the end, an error, or `stop`; answers the stream, so that the rest can be drained.
pub async fn read<R: AsyncRead + Unpin>(
    mut frames: FrameReader<R>,
    window: Arc<Semaphore>,
    window_bytes: u64,
    queue: mpsc::Sender<Incoming>,
    stop: CancellationToken,
) -> R {
    let work = async {
        loop {
            let incoming = next(&mut frames, &window, window_bytes).await;
            let last = matches!(incoming, Incoming::End | Incoming::Failed(_));
            if queue.send(incoming).await.is_err() || last {
                return;
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = stop.cancelled() => {}
    }
    frames.into_inner()
}

async fn next<R: AsyncRead + Unpin>(
    frames: &mut FrameReader<R>,
    window: &Semaphore,
    window_bytes: u64,
) -> Incoming {
    match frames.next().await {
        Ok(None) => Incoming::End,
        Ok(Some(Frame::Control(body))) => match codec::decode(&body) {
            Ok(message) => Incoming::Message(message),
            Err(error) => Incoming::Failed(error.into()),
        },
        Ok(Some(Frame::Chunk { delta, chunk })) => {
            let bytes = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            match window.try_acquire_many(bytes) {
                Ok(permit) => {
                    permit.forget();
                    Incoming::Chunk(delta, chunk)
                }
                Err(_) => Incoming::Failed(CollectorError::Window(window_bytes)),
            }
        }
        Err(error) => Incoming::Failed(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_wire::{FrameWriter, Timeouts};

    async fn outcome(chunks: usize, window_bytes: usize) -> Vec<Incoming> {
        let (near, far) = tokio::io::duplex(1 << 20);
        let mut writer = FrameWriter::new(near, Timeouts::default());
        let delta = DeltaId::new();
        for _ in 0..chunks {
            writer.chunk(delta, &[7; 1000]).await.unwrap();
        }
        drop(writer);
        let (sender, mut receiver) = mpsc::channel(QUEUE_FRAMES);
        let window = Arc::new(Semaphore::new(window_bytes));
        let frames = FrameReader::new(far, Timeouts::default());
        read(frames, window, window_bytes as u64, sender, CancellationToken::new()).await;
        let mut found = Vec::new();
        while let Some(incoming) = receiver.recv().await {
            found.push(incoming);
        }
        found
    }

    #[tokio::test]
    async fn a_full_window_is_kept_to_the_byte() {
        let exact = outcome(10, 10_000).await;
        assert!(matches!(exact.last(), Some(Incoming::End)) && exact.len() == 11);
        let beyond = outcome(11, 10_999).await;
        assert_eq!(beyond.len(), 11);
        let Some(Incoming::Failed(error)) = beyond.last() else { panic!("{beyond:?}") };
        assert_eq!(error.code(), 1303);
    }
}
