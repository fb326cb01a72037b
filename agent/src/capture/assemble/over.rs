//! Writes that are over: completed, failed, or taken to be over because their completion was not seen.

use super::{Assembler, BLOCK, OP_WRITE, Tick};
use highwater_abi::stream::Header;

/// The most blocks of one change that are read again one by one. If more of a disk are not what the stream says, nothing is sealed any
/// more.
const BLOCKS_MAX: u64 = if cfg!(test) { 3 } else { 1 << 16 };
/// The most writes of a disk that were taken to be over and may end still.
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
            self.broken = true;
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
        let (disk, blocks) = (&mut self.disks[at], from / BLOCK..to.div_ceil(BLOCK));
        self.figures.failed += blocks.end - blocks.start;
        if blocks.end - blocks.start > BLOCKS_MAX {
            self.broken = true;
            return;
        }
        for block in blocks {
            disk.doubtful.insert(block);
            disk.cache.remove(&block);
        }
    }

    /// Every write is taken to be over that was submitted more than `oldest` ago and not seen to complete. If it completes after all,
    /// what was read of it meanwhile is read once more.
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
            let mut wide = vec![];
            let before = |oldest: Tick| now.saturating_sub(oldest);
            let (short, long) = (before(oldest), before(oldest.saturating_mul(WIDE_PATIENCE)));
            disk.in_flight.stale_wide(short, long, |from, to| wide.push((from, to)));
            self.broken |= disk.in_flight.late() > LATE_MAX;
            for (from, to) in wide {
                self.figures.stale += to.div_ceil(BLOCK) - from / BLOCK;
                self.lack(at, from, to);
            }
            self.want_all(at);
        }
    }
}
