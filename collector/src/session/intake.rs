//! What waits between a session's reader and its owner, and how it gets out of the memory while the vault lags.
//!
//! Everything is passed on in the order it came. A chunk that has waited for [`LAG`] is put into the session's spool
//! ([`crate::cache`]), as are those behind it, until the owner has caught up; what is in the spool is acknowledged as received.
//! While the owner keeps up, or without a cache, nothing is written anywhere.
//!
//! **Memory.** Chunks that wait are within the window: one is acknowledged when the owner is done with it, or when it and all before
//! it are in the spool. Only the one chunk that the owner works on may then be acknowledged early. Of what is in the spool, a
//! number is kept. Frames that wait are [`QUEUE_FRAMES`] and, in the reader's queue, as many again.
//!
//! **Failure.** A spool that is full, or whose disk fails, takes no more: chunks wait in memory, the window runs empty, and the peer
//! waits. What cannot be read back ends the session. **Cancellation.** [`Intake::next`] may be dropped and called again.
//! [`Intake::run`] is stopped by its token, so that it never leaves half a message to the peer.

mod waiting;

use super::out::Out;
use super::reader::{Incoming, QUEUE_FRAMES};
use crate::CollectorError;
use crate::cache::Cache;
use crate::cache::spool::{Appended, Spool};
use crate::lock::locked;
use crate::metrics::Metrics;
use bytes::Bytes;
use highwater_delta::{DeltaId, MachineId};
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use waiting::{Chunk, Popped, Waiting};

/// After how long a wait a chunk is put into the spool. A store that works takes a whole window in less.
const LAG: Duration = Duration::from_millis(250);
/// How often a full cache is asked again.
const FULL_RETRY: Duration = Duration::from_millis(50);
/// How long a disk that failed is left alone.
const FAILED_RETRY: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Intake {
    machine: MachineId,
    cache: Option<Cache>,
    waiting: Mutex<Waiting>,
    /// Something has changed that the owner may wait for.
    changed: Notify,
    /// The same for [`Intake::run`].
    taken: Notify,
}

type Reading = JoinHandle<Result<(DeltaId, Bytes), CollectorError>>;

/// The owner's end of an intake: a chunk that is being read from the spool.
#[derive(Default)]
pub(super) struct Front(Option<Reading>);

impl Intake {
    pub(super) fn new(machine: MachineId, cache: Option<Cache>) -> Self {
        Self { machine, cache, waiting: Mutex::default(), changed: Notify::new(), taken: Notify::new() }
    }

    /// What comes next. A chunk from memory is in the owner's hand until [`Intake::done`].
    pub(super) async fn next(&self, front: &mut Front) -> Incoming {
        loop {
            if let Some(reading) = &mut front.0 {
                let read = reading.await;
                front.0 = None;
                return match read {
                    Ok(Ok((delta, chunk))) => {
                        self.read_back();
                        Incoming::Chunk(delta, chunk)
                    }
                    Ok(Err(error)) => {
                        if let Some(cache) = &self.cache {
                            cache.metrics.failed();
                        }
                        Incoming::Failed(error)
                    }
                    Err(panic) => std::panic::resume_unwind(panic.into_panic()),
                };
            }
            let changed = self.changed.notified();
            match locked(&self.waiting).pop() {
                Popped::Incoming(incoming) => {
                    self.taken.notify_one();
                    return incoming;
                }
                Popped::Spooled(spool) => {
                    front.0 = Some(spawn_blocking(move || spool.take()));
                    continue;
                }
                Popped::Nothing => {}
            }
            changed.await;
        }
    }

    fn read_back(&self) {
        locked(&self.waiting).read_back();
        self.taken.notify_one();
    }

    /// The owner is done with the chunk that it got last.
    pub(super) fn done<W: AsyncWrite + Unpin>(&self, out: &Out<W>, metrics: &Metrics) {
        // One from the spool was acknowledged when it went there.
        let mut waiting = locked(&self.waiting);
        if let Some((delta, number, bytes)) = waiting.in_hand.take() {
            out.taken((delta, number), bytes, metrics);
        }
    }

    /// Takes in what the reader brings, and puts it into the spool where it has to wait. Ends when it is told to.
    pub(super) async fn run<W: AsyncWrite + Unpin>(
        &self,
        mut reader: mpsc::Receiver<Incoming>,
        (out, window, metrics): (&Out<W>, &Semaphore, &Metrics),
        stop: &CancellationToken,
    ) {
        let mut open = true;
        let mut not_before = Instant::now();
        // Since when chunks have waited that should be in the spool.
        let mut full_since: Option<Instant> = None;
        loop {
            let (room, due) = {
                let waiting = locked(&self.waiting);
                (waiting.frames < QUEUE_FRAMES, self.cache.as_ref().and_then(|_| waiting.due()))
            };
            let due = due.map(|due| due.max(not_before));
            if due.is_none() {
                self.note_wait(&mut full_since);
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return self.note_wait(&mut full_since),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    // A disk that hangs must not keep a session from its end.
                    let moved = tokio::select! {
                        biased;
                        () = stop.cancelled() => return self.note_wait(&mut full_since),
                        moved = self.move_out(out, metrics) => moved,
                    };
                    match moved {
                        Moved::All => self.note_wait(&mut full_since),
                        Moved::Full => {
                            full_since.get_or_insert_with(Instant::now);
                            not_before = Instant::now() + FULL_RETRY;
                        }
                        Moved::Failed => not_before = Instant::now() + FAILED_RETRY,
                    }
                    if let Err(error) = out.acknowledge(window, metrics).await {
                        self.fail(error);
                    }
                }
                incoming = reader.recv(), if open && room => {
                    open = !matches!(incoming, None | Some(Incoming::End | Incoming::Failed(_)));
                    locked(&self.waiting).push(incoming.unwrap_or(Incoming::End));
                    self.changed.notify_one();
                }
                () = self.taken.notified() => {}
            }
        }
    }

    fn note_wait(&self, full_since: &mut Option<Instant>) {
        if let (Some(since), Some(cache)) = (full_since.take(), &self.cache) {
            cache.metrics.waited(since.elapsed());
        }
    }

    fn fail(&self, error: CollectorError) {
        locked(&self.waiting).failed = Some(error);
        self.changed.notify_one();
    }

    /// Puts the first chunks that wait in memory into the spool.
    async fn move_out<W: AsyncWrite + Unpin>(&self, out: &Out<W>, metrics: &Metrics) -> Moved {
        let Some(cache) = &self.cache else { return Moved::All };
        let (chunks, spool) = {
            let mut waiting = locked(&self.waiting);
            let spool = match waiting.spool(cache) {
                Ok(Some(spool)) => spool,
                // It failed, and is not empty yet.
                Ok(None) => return Moved::Failed,
                Err(error) => return self.failed(cache, &error),
            };
            (waiting.begin_moving(), spool)
        };
        if chunks.is_empty() {
            return Moved::All;
        }
        let work = spawn_blocking(move || {
            let (appended, end) = append(&spool, &chunks);
            (chunks, appended, end)
        });
        let (mut chunks, appended, end) = match work.await {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let rest = chunks.split_off(appended);
        {
            let mut waiting = locked(&self.waiting);
            // Whatever is before them was taken over as well, the one in the owner's hand included.
            if appended > 0
                && let Some((delta, number, bytes)) = waiting.in_hand.take()
            {
                out.taken((delta, number), bytes, metrics);
            }
            for chunk in &chunks {
                out.taken((chunk.delta, chunk.number), chunk.bytes.len(), metrics);
                cache.metrics.spooled(chunk.bytes.len() as u64);
            }
            waiting.end_moving(appended, rest);
        }
        self.changed.notify_one();
        match end {
            Ok(Appended::Yes) => Moved::All,
            Ok(Appended::Full) => Moved::Full,
            Err(source) => {
                let error = CollectorError::CacheFailed { doing: "writing", source };
                self.failed(cache, &error)
            }
        }
    }

    fn failed(&self, cache: &Cache, error: &CollectorError) -> Moved {
        cache.complain(self.machine, error);
        Moved::Failed
    }
}

enum Moved {
    All,
    Full,
    Failed,
}

/// Appends what there is room for, and syncs it. Answers how many are there, and what ended it.
fn append(spool: &Spool, chunks: &[Chunk]) -> (usize, std::io::Result<Appended>) {
    let mut appended = 0;
    let mut end = Ok(Appended::Yes);
    for chunk in chunks {
        end = spool.append(chunk.delta, &chunk.bytes);
        if !matches!(end, Ok(Appended::Yes)) {
            break;
        }
        appended += 1;
    }
    match spool.sync() {
        Ok(()) => (appended, end),
        Err(error) => (0, Err(error)),
    }
}

#[cfg(test)]
mod tests;
