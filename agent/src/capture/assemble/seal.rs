//! Positions: what is settled, sealed, to be read again, and what explains an epoch's bits.

use super::{Again, Assembler, BLOCK, Captured, Sealed, SealedDisk};
use crate::capture::ring::StreamPosition;
use highwater_delta::DiskId;
use std::mem::take;

impl Assembler {
    /// If all of every block is known, what is open is settled.
    pub(super) fn settle(&mut self) {
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
        if self.clean < at_least || self.broken.is_some() {
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

    /// What can be read again now: nothing of it is in flight, and nothing of it waits to be sealed. What is only taken to be over waits
    /// for the epoch's end: whatever completes of it after that is explained by nothing.
    pub fn take_again(&mut self) -> Vec<(DiskId, Again)> {
        self.take_what_rests(false)
    }
    /// The same where everything stands still: also what is only taken to be over.
    pub fn take_again_frozen(&mut self) -> Vec<(DiskId, Again)> {
        self.take_what_rests(true)
    }

    fn take_what_rests(&mut self, frozen: bool) -> Vec<(DiskId, Again)> {
        let mut all = vec![];
        for disk in &mut self.disks {
            let (in_flight, settled, open, missing) =
                (&disk.in_flight, &disk.settled, &disk.open, &disk.missing);
            let mut again = Again::default();
            let rests = |block: u64| {
                !in_flight.is_busy(block, !0)
                    && !settled.contains(block)
                    && !open.contains(block)
                    && !missing.contains(block)
            };
            disk.doubtful.retain(|block| {
                let now = rests(*block) && (frozen || !disk.presumed.contains(*block));
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
            // If it ends after all, it shows: it is read again from now on, perhaps before that.
            take(&mut disk.presumed).iter().for_each(|r| before.remove(r.start.0, r.end()));
            disk.captured_before = before;
            all.push((disk.is.id, explained));
        }
        all
    }
}
