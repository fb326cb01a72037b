//! Reads a session's frames ahead of its owner, within the window.
//!
//! A chunk takes its bytes out of the window before it is queued; the owner gives them back when it acknowledges the
//! chunk. A peer that keeps to the window can therefore never find it empty, and one that does not is told so.
//!
//! A message takes what it weighs out of [`MESSAGES_BYTES`] until it was worked off. They are not part of the window, since
//! an agent may send one at any time; one for which there is no room is not refused but waits, and nothing behind it is
//! read. What waits in memory is therefore at most the window, [`MESSAGES_BYTES`], [`QUEUE_FRAMES`] headers, and the one frame that
//! was read last.

use crate::CollectorError;
use bytes::Bytes;
use highwater_delta::{CommitKind, DeltaId, PointDisk};
use highwater_wire::message::{AgentMessage, DeltaCommit, DiskInfo};
use highwater_wire::{Frame, FrameReader, codec};
use std::sync::Arc;
use tokio::io::AsyncRead;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Frames that may wait for the owner.
pub const QUEUE_FRAMES: usize = 64;
/// Bytes of messages that may wait for the owner: somewhat more than the largest has.
pub const MESSAGES_BYTES: u32 = 128 << 10;
/// What any message weighs.
const MESSAGE_BYTES: usize = 256;

/// What the owner gets.
#[derive(Debug)]
pub enum Incoming {
    /// A message, and what it weighs, until it was worked off.
    Message(AgentMessage, OwnedSemaphorePermit),
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
    let messages = Arc::new(Semaphore::new(MESSAGES_BYTES as usize));
    let work = async {
        loop {
            let incoming = next(&mut frames, &window, window_bytes, &messages).await;
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
    messages: &Arc<Semaphore>,
) -> Incoming {
    match frames.next().await {
        Ok(None) => Incoming::End,
        Ok(Some(Frame::Control(body))) => match codec::decode(&body) {
            Ok(message) => {
                let weight = u32::try_from(weight(&message)).unwrap_or(u32::MAX).min(MESSAGES_BYTES);
                // Never closed.
                match messages.clone().acquire_many_owned(weight).await {
                    Ok(permit) => Incoming::Message(message, permit),
                    Err(_) => Incoming::End,
                }
            }
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

/// Bytes of memory of a message.
fn weight(message: &AgentMessage) -> usize {
    let more = match message {
        AgentMessage::Disks(disks) => {
            disks.iter().map(|disk| size_of::<DiskInfo>() + disk.name.capacity()).sum()
        }
        AgentMessage::DeltaCommit(DeltaCommit { kind: CommitKind::Point(point), .. }) => {
            point.disks.capacity() * size_of::<PointDisk>()
        }
        AgentMessage::Renew { csr_pem } => csr_pem.capacity(),
        AgentMessage::Hello(hello) => {
            hello.agent_version.capacity() + hello.host_name.capacity() + hello.kernel.capacity()
        }
        _ => 0,
    };
    MESSAGE_BYTES + more
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_delta::DiskId;
    use highwater_wire::message::{MAX_DISKS, MAX_NAME_BYTES};
    use highwater_wire::{FrameWriter, Timeouts};
    use std::time::Duration;
    use tokio::time::timeout;

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

    fn largest() -> AgentMessage {
        let name = "n".repeat(MAX_NAME_BYTES);
        let disk = || DiskInfo { disk: DiskId::new(), name: name.clone(), size_bytes: 1 };
        AgentMessage::Disks((0..MAX_DISKS).map(|_| disk()).collect())
    }

    /// Sends these until none is taken any more; answers how many were, and how many bytes of them wait for the owner.
    async fn pile(message: &AgentMessage) -> (usize, usize) {
        let (near, far) = tokio::io::duplex(1024);
        let mut writer = FrameWriter::new(near, Timeouts::default());
        let (sender, mut receiver) = mpsc::channel(QUEUE_FRAMES);
        let frames = FrameReader::new(far, Timeouts::default());
        let stop = CancellationToken::new();
        let reading = tokio::spawn(read(frames, Arc::new(Semaphore::new(0)), 0, sender, stop.clone()));
        let body = codec::encode(message).unwrap();
        let sent = async |writer: &mut FrameWriter<_>| {
            writer.control(&body).await.is_ok() && writer.flush().await.is_ok()
        };
        let mut taken = 0;
        while timeout(Duration::from_millis(300), sent(&mut writer)).await.is_ok() {
            taken += 1;
            assert!(taken < 1000, "it goes on for ever");
        }
        let waiting = receiver.len();
        // Once they are worked off, it goes on.
        for _ in 0..taken {
            let Some(Incoming::Message(_, counted)) = receiver.recv().await else { panic!() };
            drop(counted);
        }
        stop.cancel();
        reading.await.unwrap();
        (taken, waiting * weight(message))
    }

    #[tokio::test]
    async fn messages_pile_up_in_bounds() {
        assert!(weight(&largest()) <= MESSAGES_BYTES as usize);
        let (taken, bytes) = pile(&largest()).await;
        assert!((1..=3).contains(&taken) && bytes <= MESSAGES_BYTES as usize, "{taken} of {bytes} bytes");
        let (taken, bytes) = pile(&AgentMessage::Ping(1)).await;
        assert!(taken >= QUEUE_FRAMES && bytes <= MESSAGES_BYTES as usize, "{taken} of {bytes} bytes");
    }
}
