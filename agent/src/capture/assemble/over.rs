//! Writes that are over: completed, failed, or taken to be over because their completion was not seen.

use super::{Assembler, BLOCK, OP_WRITE, Tick};
use highwater_abi::stream::Header;

/// The most blocks of one failed write that are read again one by one. If more of a disk were not zeroed, nothing is sealed any more.
const FAILED_BLOCKS_MAX: u64 = if cfg!(test) { 3 } else { 1 << 16 };

impl Assembler {
    pub(super) fn complete(&mut self, header: &Header) {
        for at in 0..self.disks.len() {
            let disk = &mut self.disks[at];
            if disk.is.dev != header.dev {
                continue;
            }
            let (failed, op) = (header.flags & 0xff != 0, header.flags >> 8);
            let over = if disk.is.by_bio {
                disk.in_flight.completed_bio(header.bio)
            } else {
                disk.part(header.at, header.at + u64::from(header.bytes))
            };
            let Some((from, to)) = over else { continue };
            let by_bio = disk.is.by_bio;
            if !by_bio && !disk.skips(from / BLOCK, to.div_ceil(BLOCK)) {
                let mut foreign = vec![];
                disk.in_flight.completed(header.bio, (from, to), op != OP_WRITE, |block, unknown| {
                    if unknown != 0 {
                        foreign.push(block);
                    }
                });
                for block in &foreign {
                    disk.lacking.insert(*block);
                    disk.cache.remove(block);
                    disk.ahead.remove(block);
                }
                self.figures.foreign += foreign.len() as u64;
            }
            if failed {
                self.fail(at, from, to);
            }
            if !self.disks[at].missing.is_empty() {
                self.want_all(at);
            }
        }
    }

    /// Bytes `from..to` are not, or not all, what the stream says.
    fn fail(&mut self, at: usize, from: u64, to: u64) {
        let disk = &mut self.disks[at];
        let blocks = from / BLOCK..to.div_ceil(BLOCK);
        self.figures.failed += blocks.end - blocks.start;
        if blocks.end - blocks.start > FAILED_BLOCKS_MAX {
            self.broken = true;
            return;
        }
        for block in blocks {
            disk.doubtful.insert(block);
            disk.cache.remove(&block);
        }
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
}
