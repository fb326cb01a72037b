//! The rest of blocks that the stream tells in part: asked for, read from the device, and what that means for positions.

use super::{AHEAD, Assembler, BLOCK, CACHE_MAX, Wanted};
use crate::capture::ring::StreamPosition;
use highwater_abi::stream::{Header, kind};
use highwater_delta::BLOCK_BYTES;
use std::mem::take;

impl Assembler {
    /// Asks for the rest of a block, if nothing that it must have is in flight.
    pub(super) fn want(&mut self, at: usize, block: u64) {
        let disk = &mut self.disks[at];
        let Some(partial) = disk.missing.unasked_of(block) else { return };
        if !disk.in_flight.is_busy(block, partial.untold()) {
            self.asked += 1;
            disk.missing.asked(block, self.asked);
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

    pub(super) fn want_all(&mut self, at: usize) {
        self.disks[at].missing.unasked().into_iter().for_each(|block| self.want(at, block));
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
        if disk.missing.get_mut(wanted.block).is_none_or(|p| p.asked != Some(wanted.number)) {
            return;
        }
        let Some(partial) = disk.missing.remove(wanted.block) else { return };
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
        self.unfinished.is_empty() && self.disks.iter().all(|d| d.missing.counts().1 == 0)
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
            let Some((from, to)) = disk.part(header.at, end) else { return false };
            let blocks = from / BLOCK..to.div_ceil(BLOCK);
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
        let counts = self.disks.iter().map(|d| d.missing.counts());
        let (missing, unasked) = counts.fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        (self.unfinished.len(), missing - unasked, unasked)
    }

    /// The position that was applied is clean.
    pub fn settle_here(&mut self) {
        if self.all_read().is_some() {
            self.read_until = self.applied;
            self.settle();
        }
    }
}
