//! Writes that are over: completed, failed, or taken to be over because their completion was not seen.

use super::{Assembler, BLOCK, Broken, OP_WRITE, Ranges, Tick};
use highwater_abi::stream::Header;

/// The most blocks of one change that are read again one by one. If more of a disk are not what the stream says, nothing is sealed any
/// more.
const BLOCKS_MAX: u64 = if cfg!(test) { 3 } else { 1 << 16 };
/// The most writes of a disk that were taken to be over and are remembered, because they may end still.
const LATE_MAX: usize = 1 << 16;
/// Long ranges of zeros may take so many times as long as other writes.
const WIDE_PATIENCE: Tick = 20;

impl Assembler {
    pub(super) fn complete(&mut self, header: &Header) {
        for at in 0..self.disks.len() {
            let disk = &mut self.disks[at];
            if disk.is.dev != header.dev {
                continue;
            }
            if let Some((from, to)) = disk.in_flight.ended_late(header.bio) {
                self.lack(at, from, to);
            }
            let disk = &mut self.disks[at];
            let (failed, op) = (header.flags & 0xff != 0, header.flags >> 8);
            // On a device of requests, a bio that ends by itself never became one: it was refused.
            let by_bio = disk.is.by_bio || header.bytes == 0;
            let over = if by_bio {
                disk.in_flight.completed_bio(header.bio)
            } else {
                disk.part(header.at, header.at + u64::from(header.bytes))
            };
            let Some((from, to)) = over else { continue };
            if !by_bio && !disk.skips(from / BLOCK, to.div_ceil(BLOCK)) {
                let mut foreign = vec![];
                disk.in_flight
                    .completed(header.bio, (from, to), op != OP_WRITE, |from, to| foreign.push((from, to)));
                for (from, to) in foreign {
                    self.figures.foreign += to.div_ceil(BLOCK) - from / BLOCK;
                    self.lack(at, from, to);
                }
            }
            if failed {
                self.fail(at, from, to);
            }
            if !self.disks[at].missing.is_empty() {
                self.want_all(at);
            }
        }
    }

    /// Bytes `from..to` have changed, and the stream does not say how.
    pub(super) fn lack(&mut self, at: usize, from: u64, to: u64) {
        let (disk, blocks) = (&mut self.disks[at], from / BLOCK..to.div_ceil(BLOCK));
        if blocks.end - blocks.start > BLOCKS_MAX {
            self.broken = Some(Broken::LongRange);
            return;
        }
        for block in blocks {
            disk.lacking.insert(block);
            disk.cache.remove(&block);
            disk.ahead.remove(&block);
        }
    }

    /// Bytes `from..to` are not, or not all, what the stream says.
    fn fail(&mut self, at: usize, from: u64, to: u64) {
        let (first, end) = (from / BLOCK, to.div_ceil(BLOCK));
        self.figures.failed += end - first;
        self.doubt(at, first, end);
    }

    /// Every write is taken to be over that was submitted more than `oldest` ago and not seen to complete. It is read again in the
    /// next epoch. If it completes after that, then the bits it leaves are explained by nothing.
    pub fn age(&mut self, now: Tick, oldest: Tick) {
        self.now = now;
        let before = |oldest: Tick| now.saturating_sub(oldest);
        self.end_those_before(before(oldest), before(oldest.saturating_mul(WIDE_PATIENCE)), true);
    }

    /// Nothing seems to be in flight: what was submitted is taken to be over, and need not wait to be read again.
    pub fn rest(&mut self, now: Tick) {
        self.now = now;
        self.end_those_before(now + 1, now + 1, false);
        self.disks.iter_mut().for_each(|disk| disk.presumed = Ranges::default());
    }

    fn end_those_before(&mut self, short: Tick, long: Tick, presumed: bool) {
        for at in 0..self.disks.len() {
            let disk = &mut self.disks[at];
            let mut over = vec![];
            disk.in_flight.stale(short, |block| over.push((block, block + 1)));
            disk.in_flight.stale_wide(short, long, |from, to| over.push((from / BLOCK, to.div_ceil(BLOCK))));
            if disk.in_flight.late() > LATE_MAX {
                self.broken = Some(Broken::Late);
            }
            for (first, end) in over {
                self.figures.stale += end - first;
                if presumed {
                    self.disks[at].presumed.insert(first, end);
                }
                self.doubt(at, first, end);
            }
            self.want_all(at);
        }
    }

    /// Blocks `first..end` are to be read again.
    pub(super) fn doubt(&mut self, at: usize, first: u64, end: u64) {
        if end - first > BLOCKS_MAX {
            self.broken = Some(Broken::LongRange);
            return;
        }
        let disk = &mut self.disks[at];
        for block in first..end {
            disk.doubtful.insert(block);
            disk.cache.remove(&block);
            disk.ahead.remove(&block);
        }
    }
}
