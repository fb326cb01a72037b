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
mod in_flight;
mod partial;
mod ranges;

pub use batch::Batch;
pub use captured::Captured;
pub use in_flight::Tick;
pub use ranges::Ranges;

use super::{
    pool::{BlockPool, PoolBlock},
    ring::StreamPosition,
};
use batch::Said;
use highwater_abi::stream::{Header, kind};
use highwater_delta::{BLOCK_BYTES, BlockRange, DiskId};
use in_flight::{InFlight, Met};
use partial::Partial;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem::take,
    sync::Arc,
};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// REQ_OP_WRITE and REQ_OP_DISCARD.
const OP_WRITE: u32 = 1;
const OP_DISCARD: u32 = 3;
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

struct Disk {
    is: CapturedDisk,
    settled: Batch,
    open: Batch,
    missing: BTreeMap<u64, Partial>,
    /// Blocks of the batch that were written in part.
    edges: BTreeSet<u64>,
    cache: HashMap<u64, Box<[u8; BLOCK_BYTES]>>,
    /// Read before they were wanted, and the position from which on they are known, if no record has changed them until then.
    ahead: BTreeMap<u64, (Box<[u8; BLOCK_BYTES]>, StreamPosition)>,
    in_flight: InFlight,
    doubtful: BTreeSet<u64>,
    lacking: BTreeSet<u64>,
    captured: Captured,
    captured_before: Captured,
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
    resolved: HashMap<(DiskId, u64), StreamPosition>,
    /// Before this position there was none without a change that the stream lacked.
    lacked_until: StreamPosition,
    /// Records go to `open`.
    opened: bool,
    /// Bios of which more records are to come.
    unfinished: HashSet<u64>,
    wanted: Vec<Wanted>,
    /// Number of the last one.
    asked: u64,
    /// How often it was asked what explains an epoch.
    windows: u64,
    now: Tick,
    figures: Figures,
    probed: Option<Vec<u8>>,
    /// The pool was empty in spite of [`Assembler::has_room_for`]: something is lacking, and nothing is sealed any more.
    exhausted: bool,
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
            resolved: HashMap::new(),
            lacked_until: from,
            opened: false,
            unfinished: HashSet::new(),
            wanted: vec![],
            asked: 0,
            windows: 0,
            now: 0,
            figures: Figures::default(),
            probed: None,
            exhausted: false,
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

    /// Bytes up to `end` of the device are written, or (without payload) zeros.
    fn change(&mut self, header: &Header, end: u64, payload: Option<&[u8]>, goes_on: bool) {
        for at in 0..self.disks.len() {
            let disk = &self.disks[at];
            let (from, to) = (header.at.max(disk.is.start), end.min(disk.is.start + disk.is.bytes));
            if disk.is.dev != header.dev || from >= to {
                continue;
            }
            let payload = payload.map(|p| &p[(from - header.at) as usize..(to - header.at) as usize]);
            let (from, to) = (from - disk.is.start, to - disk.is.start);
            if !disk.skips(from / BLOCK, to.div_ceil(BLOCK)) {
                self.change_disk(at, (header.bio, goes_on), from, to, payload);
            }
        }
    }

    fn change_disk(
        &mut self,
        at: usize,
        (bio, goes_on): (u64, bool),
        from: u64,
        to: u64,
        payload: Option<&[u8]>,
    ) {
        let (first, end) = (from / BLOCK, to.div_ceil(BLOCK));
        let applied = self.applied;
        let disk = &mut self.disks[at];
        disk.use_ahead(first, end, applied);
        disk.captured.insert(first, end);
        let figures = &mut self.figures;
        let (doubtful, lacking, cache) = (&mut disk.doubtful, &mut disk.lacking, &mut disk.cache);
        let (lacked_until, applied) = (&mut self.lacked_until, self.applied);
        disk.in_flight.submitted((bio, goes_on), (from, to), self.now, payload.is_none(), |block, met| {
            match met {
                Met::Same => {
                    figures.overlaps += 1;
                    doubtful.insert(block);
                    cache.remove(&block);
                }
                // A whole block over one that was in doubt: what it was before does not matter any more.
                Met::Nothing if from <= block * BLOCK && (block + 1) * BLOCK <= to => {
                    doubtful.remove(&block);
                    if lacking.remove(&block) {
                        *lacked_until = applied;
                    }
                }
                Met::Nothing | Met::Neighbours => {}
            }
        });
        // Decided before the first byte is taken in: a record is not to be torn by a clean position.
        if !self.opened && (disk.lacks_base(first, from, to) || disk.lacks_base(end - 1, from, to)) {
            self.opened = true;
        }
        if let Some(payload) = payload {
            for block in first..end {
                let (start, stop) = (from.max(block * BLOCK), to.min((block + 1) * BLOCK));
                let piece = &payload[(start - from) as usize..(stop - from) as usize];
                self.put(at, block, (start - block * BLOCK) as usize, Piece::Data(piece));
            }
            return;
        }
        let (whole_first, whole_end) = (from.div_ceil(BLOCK), self.disks[at].whole_end(to));
        let edges = [first, end - 1];
        let edges = if first == end - 1 { &edges[..1] } else { &edges[..] };
        for &block in edges.iter().filter(|b| **b < whole_first || **b >= whole_end) {
            let (start, stop) = (from.max(block * BLOCK), to.min((block + 1) * BLOCK));
            self.put(at, block, (start - block * BLOCK) as usize, Piece::Zeros((stop - start) as usize));
        }
        if whole_first < whole_end {
            let (opened, disk) = (self.opened, &mut self.disks[at]);
            disk.missing.retain(|block, _| !(whole_first..whole_end).contains(block));
            disk.cache.retain(|block, _| !(whole_first..whole_end).contains(block));
            disk.target(opened).zero(whole_first, whole_end);
        }
    }

    fn put(&mut self, at: usize, block: u64, offset: usize, piece: Piece<'_>) {
        let (opened, disk) = (self.opened, &mut self.disks[at]);
        let end = disk.end_of(block);
        if offset == 0 && piece.len() >= end {
            let Some(mut content) = self.pool.take() else {
                self.exhausted = true;
                return;
            };
            piece.write(&mut content, 0);
            content[piece.len()..].fill(0);
            disk.missing.remove(&block);
            disk.cache.remove(&block);
            disk.target(opened).put(block, content);
            return;
        }
        if let Some(partial) = disk.missing.get_mut(&block) {
            match piece {
                Piece::Data(bytes) => partial.write(offset, bytes),
                Piece::Zeros(count) => partial.zero(offset, count),
            }
            if !partial.is_whole() {
                return self.want(at, block);
            }
            if let Some(partial) = disk.missing.remove(&block) {
                disk.target(opened).put(block, partial.into_whole());
            }
            return;
        }
        disk.edges.insert(block);
        if let Some(mut content) = disk.known(block, opened, &self.pool) {
            piece.write(&mut content, offset);
            disk.target(opened).put(block, content);
            return;
        }
        let Some(content) = self.pool.take() else {
            self.exhausted = true;
            return;
        };
        let mut partial = Partial::new(content, end);
        match piece {
            Piece::Data(bytes) => partial.write(offset, bytes),
            Piece::Zeros(count) => partial.zero(offset, count),
        }
        disk.missing.insert(block, partial);
        self.figures.completed_blocks += 1;
        self.want(at, block);
    }

    /// Asks for the rest of a block, if nothing that it must have is in flight.
    fn want(&mut self, at: usize, block: u64) {
        let disk = &mut self.disks[at];
        let Some(partial) = disk.missing.get_mut(&block).filter(|p| p.asked.is_none()) else { return };
        if !disk.in_flight.is_busy(block, partial.untold()) {
            self.asked += 1;
            partial.asked = Some(self.asked);
            let in_sequence =
                block > 0 && disk.captured.contains(block - 1) && !disk.ahead.contains_key(&(block + 1));
            let behind = disk.is.bytes.div_ceil(BLOCK) - block - 1;
            let ahead = if in_sequence { AHEAD.min(behind) } else { 0 };
            self.wanted.push(Wanted {
                disk: disk.is.id,
                block,
                number: self.asked,
                ahead,
                window: self.windows,
            });
        }
    }

    fn want_all(&mut self, at: usize) {
        let waiting: Vec<u64> = self.disks[at]
            .missing
            .iter()
            .filter(|(_, p)| p.asked.is_none())
            .map(|(block, _)| *block)
            .collect();
        waiting.into_iter().for_each(|block| self.want(at, block));
    }

    fn complete(&mut self, header: &Header) {
        for at in 0..self.disks.len() {
            let disk = &mut self.disks[at];
            if disk.is.dev != header.dev {
                continue;
            }
            let (failed, op) = (header.flags & 0xff != 0, header.flags >> 8);
            let figures = &mut self.figures;
            let (doubtful, cache, lacking) = (&mut disk.doubtful, &mut disk.cache, &mut disk.lacking);
            let mut fail = |block: u64| {
                figures.failed += 1;
                doubtful.insert(block);
                cache.remove(&block);
            };
            if disk.is.by_bio {
                disk.in_flight.completed_bio(header.bio, |block| {
                    if failed {
                        fail(block);
                    }
                });
            } else {
                let end = header.at + u64::from(header.bytes);
                let (from, to) = (header.at.max(disk.is.start), end.min(disk.is.start + disk.is.bytes));
                if from >= to {
                    continue;
                }
                let (from, to) = (from - disk.is.start, to - disk.is.start);
                if disk.is.skips(from / BLOCK, to.div_ceil(BLOCK)) {
                    continue;
                }
                let (mut foreign, mut gone) = (0, vec![]);
                disk.in_flight.completed(header.bio, (from, to), op != OP_WRITE, |block, unknown| {
                    if failed {
                        fail(block);
                    }
                    // One request can discard several ranges, of which it tells the first.
                    if unknown != 0 && op != OP_DISCARD {
                        foreign += 1;
                        lacking.insert(block);
                        gone.push(block);
                    }
                });
                gone.iter().for_each(|block| {
                    disk.cache.remove(block);
                    disk.ahead.remove(block);
                });
                self.figures.foreign += foreign;
            }
            if !self.disks[at].missing.is_empty() {
                self.want_all(at);
            }
        }
    }

    /// Blocks whose rest is to be read from the device.
    pub fn take_wanted(&mut self) -> Vec<Wanted> {
        take(&mut self.wanted)
    }

    /// The rest of a block was read, after it had been asked for; the read was over at `until`.
    pub fn base(&mut self, wanted: Wanted, content: &[u8; BLOCK_BYTES], until: StreamPosition) {
        let opened = self.opened;
        let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == wanted.disk) else { return };
        // Told as a whole meanwhile, it is not needed; told anew since, the read is too old.
        if disk.missing.get(&wanted.block).is_none_or(|p| p.asked != Some(wanted.number)) {
            return;
        }
        let Some(partial) = disk.missing.remove(&wanted.block) else { return };
        disk.target(opened).put(wanted.block, partial.over(content));
        self.read_until = self.read_until.max(until);
        self.resolved.insert((wanted.disk, wanted.block), until);
        self.settle();
    }

    /// A block behind one that was wanted was read too; the read was over at `until`.
    pub fn ahead(&mut self, wanted: Wanted, block: u64, content: &[u8; BLOCK_BYTES], until: StreamPosition) {
        let same_window = wanted.window == self.windows;
        let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == wanted.disk) else { return };
        // A write that was in flight while it was read may be lacking in it, though it has ended since.
        let busy = disk.in_flight.is_busy(block, !0)
            || disk.captured.contains(block)
            || disk.captured_before.contains(block);
        if !busy && same_window && disk.ahead.len() < CACHE_MAX && !disk.cache.contains_key(&block) {
            disk.ahead.insert(block, (Box::new(*content), until));
        }
    }

    /// Whether the position that was applied would be clean, if only what was asked for had been read.
    #[must_use]
    pub fn waits_for_reads_only(&self) -> bool {
        self.unfinished.is_empty()
            && self.disks.iter().all(|d| d.missing.values().all(|partial| partial.asked.is_some()))
    }

    /// If all that was asked for has been read: the position that the reads may have seen. The one that was applied is clean,
    /// if nothing in between [touches](Self::touches_what_was_read) what was read.
    #[must_use]
    pub fn all_read(&self) -> Option<StreamPosition> {
        let all = self.unfinished.is_empty() && self.disks.iter().all(|d| d.missing.is_empty());
        all.then_some(self.read_until)
    }

    /// Whether a record that was not applied yet changes a block whose rest was read.
    #[must_use]
    pub fn touches_what_was_read(&self, header: &Header) -> bool {
        if self.resolved.is_empty() || !matches!(header.kind, kind::WRITE | kind::DISCARD | kind::ZEROES) {
            return false;
        }
        let end = header.at + u64::from(header.bytes);
        self.disks.iter().filter(|d| d.is.dev == header.dev).any(|disk| {
            let (from, to) = (header.at.max(disk.is.start), end.min(disk.is.start + disk.is.bytes));
            if from >= to {
                return false;
            }
            let blocks = (from - disk.is.start) / BLOCK..(to - disk.is.start).div_ceil(BLOCK);
            if blocks.end - blocks.start > self.resolved.len() as u64 {
                return self.resolved.keys().any(|(id, block)| *id == disk.is.id && blocks.contains(block));
            }
            blocks.into_iter().any(|block| self.resolved.contains_key(&(disk.is.id, block)))
        })
    }

    /// What keeps a position from being clean: bios of which records are to come, blocks whose rest is being read, and blocks whose
    /// rest cannot be asked for yet.
    #[must_use]
    pub fn waits_for(&self) -> (usize, usize, usize) {
        let missing: usize = self.disks.iter().map(|d| d.missing.len()).sum();
        let unasked =
            self.disks.iter().flat_map(|d| d.missing.values()).filter(|p| p.asked.is_none()).count();
        (self.unfinished.len(), missing - unasked, unasked)
    }

    /// The position that was applied is clean.
    pub fn settle_here(&mut self) {
        if self.all_read().is_some() {
            self.read_until = self.applied;
            self.settle();
        }
    }

    /// Everything before this was applied: what was passed over told nothing.
    pub fn advance(&mut self, to: StreamPosition) {
        self.applied = self.applied.max(to);
        self.settle();
    }

    /// Every write is taken to be over that was submitted more than `oldest` ago and not seen to complete.
    pub fn age(&mut self, now: Tick, oldest: Tick) {
        self.now = now;
        for at in 0..self.disks.len() {
            let disk = &mut self.disks[at];
            let (doubtful, cache) = (&mut disk.doubtful, &mut disk.cache);
            let figures = &mut self.figures;
            disk.in_flight.stale(now.saturating_sub(oldest), |block| {
                figures.stale += 1;
                doubtful.insert(block);
                cache.remove(&block);
            });
            self.want_all(at);
        }
    }

    /// If all of every block is known, what is open is settled.
    fn settle(&mut self) {
        if !self.resolved.is_empty() {
            let applied = self.applied;
            self.resolved.retain(|_, until| *until > applied);
        }
        if !self.opened {
            self.clean = self.applied;
            return;
        }
        if self.applied < self.read_until
            || !self.unfinished.is_empty()
            || self.disks.iter().any(|d| !d.missing.is_empty())
        {
            return;
        }
        for disk in &mut self.disks {
            let mut open = take(&mut disk.open);
            disk.settled.append(&mut open);
        }
        self.opened = false;
        self.resolved.clear();
        self.clean = self.applied;
    }

    /// Takes out what leads to the last clean position, if that is `at_least` so far.
    pub fn seal(&mut self, at_least: StreamPosition) -> Option<Sealed> {
        if self.clean < at_least || self.exhausted {
            return None;
        }
        let mut disks = vec![];
        for disk in &mut self.disks {
            let mut batch = take(&mut disk.settled);
            self.figures.sealed_bytes += batch.held() as u64 * BLOCK;
            disk.remember_edges(&mut batch);
            let doubtful = disk.doubtful.iter().chain(&disk.lacking).copied().collect();
            disks.push(SealedDisk { id: disk.is.id, batch, doubtful });
        }
        Some(Sealed { position: self.clean, disks })
    }

    /// What can be read again now: nothing of it is in flight, and nothing of it waits to be sealed.
    pub fn take_again(&mut self) -> Vec<(DiskId, Again)> {
        let mut all = vec![];
        for disk in &mut self.disks {
            let (in_flight, settled, open, missing) =
                (&disk.in_flight, &disk.settled, &disk.open, &disk.missing);
            let mut again = Again::default();
            let rests = |block: u64| {
                !in_flight.is_busy(block, !0)
                    && !settled.contains(block)
                    && !open.contains(block)
                    && !missing.contains_key(&block)
            };
            disk.doubtful.retain(|block| {
                let now = rests(*block);
                if now {
                    again.healing.push(*block);
                }
                !now
            });
            disk.lacking.retain(|block| {
                let now = rests(*block);
                if now {
                    again.lacking.push(*block);
                }
                !now
            });
            if again != Again::default() {
                all.push((disk.is.id, again));
            }
        }
        all
    }

    /// Whether the stream is known to lack a change before this position: it is no state of the disks.
    #[must_use]
    pub fn is_lacking(&self, before: StreamPosition) -> bool {
        before < self.lacked_until || self.disks.iter().any(|d| !d.lacking.is_empty())
    }
    /// Blocks that will have to be read again.
    #[must_use]
    pub fn doubtful(&self) -> usize {
        self.disks.iter().map(|d| d.doubtful.len() + d.lacking.len()).sum()
    }
    /// These blocks were read from the disk: what is remembered of them may be old.
    pub fn forget(&mut self, disk: DiskId, ranges: &[BlockRange]) {
        if let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == disk) {
            let within = |block: u64| ranges.iter().any(|r| r.start.0 <= block && block < r.end());
            disk.cache.retain(|block, _| !within(*block));
            disk.ahead.retain(|block, _| !within(*block));
        }
    }

    /// Which blocks explain the bits of the epoch that has ended before everything up to now was applied; begins anew.
    pub fn explain(&mut self) -> Vec<(DiskId, Captured)> {
        self.windows += 1;
        let mut all = vec![];
        for disk in &mut self.disks {
            let mut explained = take(&mut disk.captured_before);
            explained.union(&disk.captured);
            // What completes in the next epoch was submitted in this one, or is in flight still.
            let mut before = take(&mut disk.captured);
            disk.in_flight.blocks().for_each(|block| before.insert(block, block + 1));
            disk.in_flight.wide().for_each(|(from, to)| before.insert(from, to));
            disk.captured_before = before;
            all.push((disk.is.id, explained));
        }
        all
    }

    /// Blocks of these ranges are not replicated from now on.
    pub fn set_skip(&mut self, disk: DiskId, skip: Vec<BlockRange>) {
        if let Some(disk) = self.disks.iter_mut().find(|d| d.is.id == disk) {
            disk.is.skip = skip;
        }
    }
}

impl CapturedDisk {
    fn skips(&self, first: u64, end: u64) -> bool {
        self.skip.iter().any(|r| r.start.0 <= first && end <= r.end())
    }
}

impl Disk {
    fn new(is: CapturedDisk) -> Self {
        Self {
            is,
            settled: Batch::default(),
            open: Batch::default(),
            missing: BTreeMap::new(),
            edges: BTreeSet::new(),
            cache: HashMap::new(),
            ahead: BTreeMap::new(),
            in_flight: InFlight::default(),
            doubtful: BTreeSet::new(),
            lacking: BTreeSet::new(),
            captured: Captured::default(),
            captured_before: Captured::default(),
        }
    }

    fn skips(&self, first: u64, end: u64) -> bool {
        self.is.skips(first, end)
    }
    /// Blocks `first..end` are about to change by a record that ends at `applied`: what was read ahead of them becomes known, or
    /// worthless.
    fn use_ahead(&mut self, first: u64, end: u64, applied: StreamPosition) {
        while let Some(block) = self.ahead.range(first..end).next().map(|(block, _)| *block) {
            if let Some((content, until)) = self.ahead.remove(&block)
                && until < applied
                && !self.settled.contains(block)
                && !self.open.contains(block)
                && !self.in_flight.is_busy(block, !0)
            {
                self.cache.insert(block, content);
            }
        }
    }
    fn target(&mut self, opened: bool) -> &mut Batch {
        if opened { &mut self.open } else { &mut self.settled }
    }
    /// How many bytes of a block lie on the disk.
    fn end_of(&self, block: u64) -> usize {
        (self.is.bytes - block * BLOCK).min(BLOCK) as usize
    }
    /// The first block that bytes up to `to` do not cover to its end.
    fn whole_end(&self, to: u64) -> u64 {
        if to == self.is.bytes { to.div_ceil(BLOCK) } else { to / BLOCK }
    }
    /// Whether the rest of a block, of which `from..to` is told, is not known.
    fn lacks_base(&self, block: u64, from: u64, to: u64) -> bool {
        let (start, end) = (block * BLOCK, block * BLOCK + self.end_of(block) as u64);
        (from > start || to < end)
            && !self.settled.contains(block)
            && !self.open.contains(block)
            && !self.cache.contains_key(&block)
    }

    /// The content of a block as the stream has it, taken out or copied so that it can be changed.
    fn known(&mut self, block: u64, opened: bool, pool: &Arc<BlockPool>) -> Option<PoolBlock> {
        let fresh = |content: &[u8; BLOCK_BYTES]| {
            let mut block = pool.take()?;
            block.copy_from_slice(content);
            Some(block)
        };
        let batches = if opened { vec![&mut self.open, &mut self.settled] } else { vec![&mut self.settled] };
        for batch in batches {
            match batch.get(block) {
                Said::Data(content) => return fresh(content),
                Said::Zeros => return fresh(&[0; BLOCK_BYTES]),
                Said::Nothing => {}
            }
        }
        self.cache.get(&block).and_then(|content| fresh(content))
    }

    /// Keeps what blocks that were written in part are at the position that is sealed.
    fn remember_edges(&mut self, batch: &mut Batch) {
        for block in take(&mut self.edges) {
            let newer = self.open.contains(block) || self.missing.contains_key(&block);
            if newer {
                self.edges.insert(block);
            }
            if newer || self.doubtful.contains(&block) || self.lacking.contains(&block) {
                self.cache.remove(&block);
                continue;
            }
            let content = match batch.get(block) {
                Said::Data(content) => Box::new(**content),
                Said::Zeros => Box::new([0; BLOCK_BYTES]),
                Said::Nothing => continue,
            };
            if self.cache.len() >= CACHE_MAX {
                self.cache.clear();
            }
            self.cache.insert(block, content);
        }
    }
}

/// What is written into a block.
#[derive(Clone, Copy)]
enum Piece<'p> {
    Data(&'p [u8]),
    Zeros(usize),
}

impl Piece<'_> {
    fn len(self) -> usize {
        match self {
            Self::Data(bytes) => bytes.len(),
            Self::Zeros(count) => count,
        }
    }
    fn write(self, content: &mut [u8; BLOCK_BYTES], at: usize) {
        match self {
            Self::Data(bytes) => content[at..at + bytes.len()].copy_from_slice(bytes),
            Self::Zeros(count) => content[at..at + count].fill(0),
        }
    }
}

#[cfg(test)]
mod tests;
