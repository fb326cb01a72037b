//! From the stream's records to the content of disks at a position (pure).
//!
//! Records are [applied](Assembler::apply) in their order. What they do is kept as one [`Batch`] a disk, the last write of a
//! block winning, until the batch is [sealed](Assembler::seal): then it takes the disks from the last sealed position to this
//! one.
//!
//! **Blocks told in part.** A write need not cover whole blocks. Where the rest is not known from the stream, it is read from
//! the device, once no earlier write to it is in flight ([`Assembler::take_wanted`]). Such a read may have seen writes
//! up to the position that the stream had when it was over. So a position is *clean*, and can be sealed, only when the rest of
//! every block is known, and every read for it was over before that position: then the stream has repeated, in order, whatever
//! the reads may have seen. Nor does a clean position lie between two records of one bio. Records behind the last clean position are kept apart (`open`) until the next one.
//!
//! **What must be read again** ([`Assembler::take_again`]): blocks with two writes in flight to one sector, whose order only the
//! device knows; writes that failed; writes whose completion was not seen; and completions of writes that the stream lacks.
//! Until it has been, a sealed batch has the order of submission, and its caller keeps those blocks marked
//! ([`SealedDisk::doubtful`]).
//!
//! **Limits:** memory is bounded by the pool ([`Assembler::has_room_for`]), by what is in flight, and by a few bytes for each
//! block of the batch.

mod batch;
mod captured;
mod change;
mod disk;
mod hashed;
mod in_flight;
mod missing;
mod over;
mod partial;
mod ranges;
mod rest;
mod seal;

pub use batch::Batch;
pub use captured::Captured;
pub use in_flight::Tick;
pub use ranges::Ranges;

use super::{pool::BlockPool, ring::StreamPosition};
use disk::Disk;
use hashed::{Map, Set};
use highwater_abi::stream::{Header, kind};
use highwater_delta::{BLOCK_BYTES, BlockRange, DiskId};
use std::sync::Arc;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// REQ_OP_WRITE.
const OP_WRITE: u32 = 1;
/// Blocks that are read beside one that is wanted, where writes seem to go on in sequence: a journal's next write begins in the next
/// block, and what was read before it began need not be waited for.
const AHEAD: u64 = if cfg!(test) { 2 } else { 32 };
/// Blocks of a disk that were written in part are remembered, since the next write often begins where the last one ended.
const CACHE_MAX: usize = if cfg!(test) { 1 } else { 1024 };

/// A captured disk: where it lies, and how its completions are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedDisk {
    /// Which.
    pub id: DiskId,
    /// `dev_t` of its whole device.
    pub dev: u32,
    /// First byte on that device.
    pub start: u64,
    /// Its size.
    pub bytes: u64,
    /// Its device tells completions by bio.
    pub by_bio: bool,
    /// Blocks that are never replicated (swap).
    pub skip: Vec<BlockRange>,
}

/// Figures since the assembler was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Submissions, with or without data.
    pub records: u64,
    /// Bytes of data captured.
    pub bytes: u64,
    /// Bytes of blocks sealed: what is left after coalescing.
    pub sealed_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Blocks whose rest had to be read.
    pub completed_blocks: u64,
    /// Blocks with two writes to one sector in flight.
    pub overlaps: u64,
    /// Writes that failed, in blocks.
    pub failed: u64,
    /// Blocks whose write was taken to be over without its completion having been seen.
    pub stale: u64,
    /// Blocks that completed without having been submitted here.
    pub foreign: u64,
}

/// Something is lacking that cannot be told block by block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The pool was empty in spite of [`Assembler::has_room_for`].
    NoRoom,
    /// A change of a long range failed, or was not seen to end.
    LongRange,
    /// Too many writes were not seen to end.
    Late,
}

impl Broken {
    /// For a message.
    #[must_use]
    pub fn told(self) -> &'static str {
        match self {
            Self::NoRoom => "there was no memory for what was captured",
            Self::LongRange => "a discard or zeroing of a long range failed, or was not seen to end",
            Self::Late => "too many writes were not seen to end",
        }
    }
}

/// What takes the disks to a position.
#[derive(Debug)]
pub struct Sealed {
    /// The position.
    pub position: StreamPosition,
    /// One a disk.
    pub disks: Vec<SealedDisk>,
}

/// See [`Sealed`].
#[derive(Debug)]
pub struct SealedDisk {
    /// Which.
    pub id: DiskId,
    /// What it becomes.
    pub batch: Batch,
    /// Blocks that will have to be read again, now or later: they are not done with by this batch.
    pub doubtful: Vec<u64>,
}

/// What is to be read from a disk again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Again {
    /// The stream lacks a change to these: no position is right before they were read.
    pub lacking: Vec<u64>,
    /// The stream has them in the order of submission; the device may have decided otherwise.
    pub healing: Vec<u64>,
}

/// A block whose rest is to be read from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of this disk.
    pub disk: DiskId,
    /// Which.
    pub block: u64,
    /// Which question it is: a read that began for an earlier one is too old for this.
    pub number: u64,
    /// How many blocks behind it may be wanted soon: for [`Assembler::ahead`].
    pub ahead: u64,
    /// The window in which it was asked for.
    window: u64,
}

/// See the module.
pub struct Assembler {
    pool: Arc<BlockPool>,
    disks: Vec<Disk>,
    /// Everything before this was applied.
    applied: StreamPosition,
    /// What is settled takes the disks to this.
    clean: StreamPosition,
    /// Reads for blocks told in part were over at this position.
    read_until: StreamPosition,
    /// Blocks whose rest was read, and when that was over, as long as that position was not applied.
    resolved: Map<(DiskId, u64), StreamPosition>,
    /// Before this position there was none without a change that the stream lacked.
    lacked_until: StreamPosition,
    /// Records go to `open`.
    opened: bool,
    /// Bios of which more records are to come.
    unfinished: Set<u64>,
    wanted: Vec<Wanted>,
    /// Number of the last one.
    asked: u64,
    /// How often it was asked what explains an epoch.
    windows: u64,
    now: Tick,
    figures: Figures,
    probed: Option<Vec<u8>>,
    /// Nothing is sealed any more.
    broken: Option<Broken>,
}

impl Assembler {
    /// For these disks, from this position of the stream on.
    #[must_use]
    pub fn new(pool: Arc<BlockPool>, disks: Vec<CapturedDisk>, from: StreamPosition) -> Self {
        let disks = disks.into_iter().map(Disk::new).collect();
        Self {
            pool,
            disks,
            applied: from,
            clean: from,
            read_until: from,
            resolved: Map::default(),
            lacked_until: from,
            opened: false,
            unfinished: Set::default(),
            wanted: vec![],
            asked: 0,
            windows: 0,
            now: 0,
            figures: Figures::default(),
            probed: None,
            broken: None,
        }
    }

    /// Everything before this was applied.
    #[must_use]
    pub fn applied(&self) -> StreamPosition {
        self.applied
    }
    /// The last position that can be sealed.
    #[must_use]
    pub fn clean(&self) -> StreamPosition {
        self.clean
    }
    /// Why nothing is sealed any more, if that is so.
    #[must_use]
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }
    /// What happened so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.figures
    }
    /// The content of the last page that was read back.
    pub fn take_probed(&mut self) -> Option<Vec<u8>> {
        self.probed.take()
    }

    /// Whether the pool has room for a record of so many bytes.
    #[must_use]
    pub fn has_room_for(&self, bytes: usize) -> bool {
        // For each disk that shares the device: whole blocks, one more for a bad start, and copies of both edges.
        self.pool.room() >= (bytes / BLOCK_BYTES + 4) * self.disks.len().max(1)
    }

    /// Takes a record in, which ends at `end` of the stream; `now` never goes back.
    pub fn apply(&mut self, header: &Header, payload: &[u8], end: StreamPosition, now: Tick) {
        self.now = now;
        self.applied = end;
        match header.kind {
            kind::WRITE => {
                let goes_on = !self.unfinished.is_empty() && self.unfinished.remove(&header.bio);
                if header.more != 0 {
                    self.unfinished.insert(header.bio);
                    self.opened = true;
                }
                self.figures.records += 1;
                self.figures.bytes += payload.len() as u64;
                self.change(header, header.at + payload.len() as u64, Some(payload), goes_on);
            }
            kind::DISCARD | kind::ZEROES => {
                self.figures.records += 1;
                self.change(header, header.at + u64::from(header.bytes), None, false);
            }
            kind::FLUSH => self.figures.flushes += 1,
            kind::COMPLETE => self.complete(header),
            kind::PROBE => self.probed = Some(payload.to_vec()),
            _ => {}
        }
        self.settle();
    }

    /// Everything before this was applied: what was passed over told nothing.
    pub fn advance(&mut self, to: StreamPosition) {
        self.applied = self.applied.max(to);
        self.settle();
    }

    /// These blocks are about to be read from the disk. The read may not see a write that is in flight; if that was sealed before, and
    /// what was read is stored over it, the write is lost, though its completion will be explained. So they are read once more.
    pub fn will_read(&mut self, disk: DiskId, ranges: &[BlockRange]) {
        if let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == disk) {
            for range in ranges {
                let blocks = disk.sealed_in_flight(*range);
                disk.lacking.extend(blocks);
            }
        }
    }

    /// These blocks were read from the disk: what is remembered of them may be old.
    pub fn forget(&mut self, disk: DiskId, ranges: &[BlockRange]) {
        if let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == disk) {
            let within = |block: u64| ranges.iter().any(|r| r.start.0 <= block && block < r.end());
            disk.cache.retain(|block, _| !within(*block));
            disk.ahead.retain(|block, _| !within(*block));
        }
    }

    /// Blocks of these ranges are not replicated from now on.
    pub fn set_skip(&mut self, disk: DiskId, skip: Vec<BlockRange>) {
        if let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == disk) {
            disk.is.skip = skip;
        }
    }
}

#[cfg(test)]
mod tests;
