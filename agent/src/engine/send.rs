//! Reads ranges of a disk and sends them as chunks of the open delta, with several encoders at work.

use super::{Engine, Link, batch::Batcher, link::Outgoing};
use crate::{
    capture::pool::PoolBlock,
    metrics::Metrics,
    pulse::Pulse,
    source::{Buffer, ReadJob, SourceError},
};
use highwater_delta::{
    BLOCK_BYTES, BlockHash, BlockRange, ChunkError, DeltaId, DiskId, HashKey, StoredBlock,
    chunk::CHUNK_BLOCKS_MAX,
};
use highwater_wire::message::AgentMessage;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};
use tokio::sync::mpsc;

/// Why sending stopped. Nothing is lost: what was taken is pending until it is stored.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The session ended.
    #[error("the connection to the collector was lost")]
    LinkDown,
    /// A disk cannot be read.
    #[error("disk {0}: {1}")]
    Source(DiskId, SourceError),
    /// A bug of the agent: the delta is not committed.
    #[error("{0} blocks were taken for a delta and not sent")]
    Incomplete(i64),
    /// A chunk could not be made.
    #[error("a chunk could not be made: {0}")]
    Chunk(#[from] ChunkError),
}

/// Blocks held in memory.
pub struct HeldRun {
    /// Which.
    pub range: BlockRange,
    /// Their content.
    pub content: Vec<u8>,
}

/// An open delta and the way to send it.
pub struct OpenDelta {
    /// Its id.
    pub delta: DeltaId,
    /// To the session.
    pub queue: mpsc::Sender<Outgoing>,
    /// Of this machine.
    pub key: HashKey,
    /// zstd's.
    pub level: i32,
    /// Encoders at work together.
    pub encoders: usize,
    /// Chunks sent so far.
    pub chunks: AtomicU64,
    /// Blocks taken from ledgers for this delta and not yet sent (or found equal). Must be 0 at its commit: a block taken and
    /// not sent would be forgotten when the delta is stored.
    pub unsent_blocks: AtomicI64,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The engine's sign of life.
    pub pulse: Arc<Pulse>,
}

enum Content {
    Pooled(Buffer),
    Held(Vec<u8>),
    /// All of the range.
    Zeros,
}
impl std::ops::Deref for Content {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Pooled(buffer) => buffer,
            Self::Held(bytes) => bytes,
            Self::Zeros => &[],
        }
    }
}

/// What the vault holds of a range, where only differences are to be sent: by block number.
pub type Known = HashMap<u64, StoredBlock>;

impl Engine {
    /// A new delta of the running session, of which the collector knows nothing yet.
    ///
    /// # Errors
    /// [`SendError::LinkDown`].
    pub(super) fn open_delta(&self, delta: DeltaId) -> Result<OpenDelta, SendError> {
        let Link::Up(session) = &self.link else { return Err(SendError::LinkDown) };
        Ok(OpenDelta {
            delta,
            queue: session.queue.clone(),
            key: session.key.clone(),
            level: self.options.compression_level,
            encoders: self.options.encoders,
            chunks: AtomicU64::new(0),
            unsent_blocks: AtomicI64::new(0),
            metrics: self.metrics.clone(),
            pulse: self.pulse.clone(),
        })
    }
}

impl OpenDelta {
    /// Tells the collector of it: before its first chunk.
    ///
    /// # Errors
    /// [`SendError::LinkDown`].
    pub fn begin(&self) -> Result<(), SendError> {
        let begin = Outgoing::Message(AgentMessage::DeltaBegin(self.delta));
        self.queue.blocking_send(begin).map_err(|_| SendError::LinkDown)
    }

    /// These blocks were taken from a ledger for this delta.
    pub fn expect(&self, ranges: &[BlockRange]) {
        let blocks: u64 = ranges.iter().map(|r| r.count).sum();
        self.unsent_blocks.fetch_add(blocks as i64, Ordering::AcqRel);
    }

    /// Whether all of them were sent.
    ///
    /// # Errors
    /// [`SendError::Incomplete`]: do not commit.
    pub fn check_complete(&self) -> Result<(), SendError> {
        match self.unsent_blocks.load(Ordering::Acquire) {
            0 => Ok(()),
            blocks => Err(SendError::Incomplete(blocks)),
        }
    }

    /// Sends everything that the job reads. With `known`, blocks that the vault holds already are left out; answers how many
    /// blocks were different (without `known`: all).
    ///
    /// # Errors
    /// See [`SendError`]; bad blocks are told after everything else was sent.
    pub fn send(&self, disk: DiskId, job: ReadJob, known: Option<&Known>) -> Result<u64, SendError> {
        let job = Mutex::new(job);
        self.send_from(disk, known, || {
            let run = job.lock().unwrap_or_else(PoisonError::into_inner).next_blocking()?;
            Some(run.map(|run| (run.range, Content::Pooled(run.buffer))))
        })
    }

    /// Sends what was captured: blocks, ascending, and ranges of zeros.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send_captured(
        &self,
        disk: DiskId,
        data: Vec<(u64, PoolBlock)>,
        zeros: Vec<BlockRange>,
    ) -> Result<u64, SendError> {
        self.expect(&zeros);
        self.unsent_blocks.fetch_add(data.len() as i64, Ordering::AcqRel);
        let work = Mutex::new((data.into_iter().peekable(), zeros.into_iter()));
        self.send_from(disk, None, || {
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            let (data, zeros) = &mut *work;
            if let Some(range) = zeros.next() {
                return Some(Ok((range, Content::Zeros)));
            }
            let (first, block) = data.next()?;
            let mut content = Vec::with_capacity(BLOCK_BYTES);
            content.extend_from_slice(&block[..]);
            let mut count = 1;
            while count < CHUNK_BLOCKS_MAX as u64
                && let Some((_, block)) = data.next_if(|(number, _)| *number == first + count)
            {
                content.extend_from_slice(&block[..]);
                count += 1;
            }
            Some(Ok((BlockRange::new(first, count), Content::Held(content))))
        })
    }

    /// Sends what was read into memory.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send_held(&self, disk: DiskId, runs: Vec<HeldRun>) -> Result<u64, SendError> {
        let runs = Mutex::new(runs);
        self.send_from(disk, None, || {
            let run = runs.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            Some(Ok((run.range, Content::Held(run.content))))
        })
    }

    fn send_from(
        &self,
        disk: DiskId,
        known: Option<&Known>,
        next: impl Fn() -> Option<Result<(BlockRange, Content), SourceError>> + Sync,
    ) -> Result<u64, SendError> {
        let different = AtomicU64::new(0);
        let work = || self.encode(disk, known, &next, &different);
        let results: Vec<Result<(), SendError>> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.encoders.max(1)).map(|_| scope.spawn(work)).collect();
            let mut results = vec![work()];
            // A panic of an encoder is a bug; it must not pass for success.
            results.extend(others.into_iter().map(|t| t.join().unwrap_or(Err(SendError::LinkDown))));
            results
        });
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(different.into_inner())
    }

    fn encode(
        &self,
        disk: DiskId,
        known: Option<&Known>,
        next: &(impl Fn() -> Option<Result<(BlockRange, Content), SourceError>> + Sync),
        different: &AtomicU64,
    ) -> Result<(), SendError> {
        let mut batcher = Batcher::new(disk, &self.key, self.level)?;
        let mut emit = |chunk: Vec<u8>| -> Result<(), SendError> {
            self.metrics.sent(chunk.len());
            self.chunks.fetch_add(1, Ordering::Relaxed);
            let sent = self.queue.blocking_send(Outgoing::Chunk(self.delta, chunk));
            self.pulse.work();
            sent.map_err(|_| SendError::LinkDown)
        };
        let mut bad = None;
        while let Some(run) = next() {
            let (range, content) = match run {
                Ok(run) => run,
                Err(error) => {
                    bad.get_or_insert(SendError::Source(disk, error));
                    continue;
                }
            };
            self.pulse.work();
            self.metrics.read(content.len());
            self.unsent_blocks.fetch_sub(range.count as i64, Ordering::AcqRel);
            match known {
                None if matches!(content, Content::Zeros) => batcher.push_zeros(range, &mut emit)?,
                None => {
                    different.fetch_add(range.count, Ordering::Relaxed);
                    batcher.push(range, &content, &mut emit)?;
                }
                Some(known) => {
                    for (number, block) in (range.start.0..).zip(content.chunks_exact(BLOCK_BYTES)) {
                        if self.differs(block, known.get(&number)) {
                            different.fetch_add(1, Ordering::Relaxed);
                            batcher.push(BlockRange::new(number, 1), block, &mut emit)?;
                        }
                    }
                }
            }
        }
        batcher.flush(&mut emit)?;
        bad.map_or(Ok(()), Err)
    }

    fn differs(&self, block: &[u8], stored: Option<&StoredBlock>) -> bool {
        match stored {
            None | Some(StoredBlock::Absent) => true,
            Some(StoredBlock::Zero) => block.iter().any(|b| *b != 0),
            Some(StoredBlock::Data(hash)) => self.hash(block) != Some(*hash),
        }
    }

    fn hash(&self, block: &[u8]) -> Option<BlockHash> {
        block.try_into().ok().map(|block| self.key.hash(block))
    }
}
