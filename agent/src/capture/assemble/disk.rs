//! What the assembler keeps of one disk.

use super::{
    BLOCK, CACHE_MAX, CapturedDisk,
    batch::{Batch, Said},
    captured::Captured,
    hashed::Map,
    in_flight::InFlight,
    missing::Missing,
    ranges::Ranges,
};
use crate::capture::{
    pool::{BlockPool, PoolBlock},
    ring::StreamPosition,
};
use highwater_delta::{BLOCK_BYTES, BlockRange};
use std::{
    collections::{BTreeMap, BTreeSet},
    mem::take,
    sync::Arc,
};

pub(super) struct Disk {
    pub is: CapturedDisk,
    pub settled: Batch,
    pub open: Batch,
    pub missing: Missing,
    /// Blocks of the batch that were written in part.
    pub edges: BTreeSet<u64>,
    pub cache: Map<u64, Box<[u8; BLOCK_BYTES]>>,
    /// Read before they were wanted, and the position from which on they are known, if no record has changed them until then.
    pub ahead: BTreeMap<u64, (Box<[u8; BLOCK_BYTES]>, StreamPosition)>,
    pub in_flight: InFlight,
    pub doubtful: BTreeSet<u64>,
    pub lacking: BTreeSet<u64>,
    pub captured: Captured,
    pub captured_before: Captured,
    /// Of writes that were taken to be over in this epoch.
    pub presumed: Ranges,
}

impl CapturedDisk {
    /// Whether none of these blocks is replicated.
    pub fn skips(&self, first: u64, end: u64) -> bool {
        self.skip.iter().any(|r| r.start.0 <= first && end <= r.end())
    }
}

impl Disk {
    pub fn new(is: CapturedDisk) -> Self {
        Self {
            is,
            settled: Batch::default(),
            open: Batch::default(),
            missing: Missing::default(),
            edges: BTreeSet::new(),
            cache: Map::default(),
            ahead: BTreeMap::new(),
            in_flight: InFlight::default(),
            doubtful: BTreeSet::new(),
            lacking: BTreeSet::new(),
            captured: Captured::default(),
            captured_before: Captured::default(),
            presumed: Ranges::default(),
        }
    }

    /// What of bytes `from..to` of the whole device lies on the disk, by its own count.
    pub fn part(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        let (from, to) = (from.max(self.is.start), to.min(self.is.start + self.is.bytes));
        (from < to).then(|| (from - self.is.start, to - self.is.start))
    }
    /// Whether none of these blocks is replicated.
    pub fn skips(&self, first: u64, end: u64) -> bool {
        self.is.skips(first, end)
    }
    /// Blocks of a range with a write in flight that was sealed already: no batch to come has it.
    pub fn sealed_in_flight(&self, range: BlockRange) -> Vec<u64> {
        let within = |block: &u64| range.start.0 <= *block && *block < range.end();
        let to_come = |block: &u64| {
            self.settled.contains(*block) || self.open.contains(*block) || self.missing.contains(*block)
        };
        let wide = self.in_flight.wide().flat_map(|(from, to)| from.max(range.start.0)..to.min(range.end()));
        self.in_flight.blocks().filter(within).chain(wide).filter(|block| !to_come(block)).collect()
    }
    /// Blocks `first..end` are about to change by a record that ends at `applied`: what was read ahead of them becomes known, or
    /// worthless.
    pub fn use_ahead(&mut self, first: u64, end: u64, applied: StreamPosition) {
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
    pub fn target(&mut self, opened: bool) -> &mut Batch {
        if opened { &mut self.open } else { &mut self.settled }
    }
    /// How many bytes of a block lie on the disk.
    pub fn end_of(&self, block: u64) -> usize {
        (self.is.bytes - block * BLOCK).min(BLOCK) as usize
    }
    /// The first block that bytes up to `to` do not cover to its end.
    pub fn whole_end(&self, to: u64) -> u64 {
        if to == self.is.bytes { to.div_ceil(BLOCK) } else { to / BLOCK }
    }
    /// Whether the rest of a block, of which `from..to` is told, is not known.
    pub fn lacks_base(&self, block: u64, from: u64, to: u64) -> bool {
        let (start, end) = (block * BLOCK, block * BLOCK + self.end_of(block) as u64);
        (from > start || to < end)
            && !self.settled.contains(block)
            && !self.open.contains(block)
            && !self.cache.contains_key(&block)
    }

    /// The content of a block as the stream has it, taken out or copied so that it can be changed.
    pub fn known(&mut self, block: u64, opened: bool, pool: &Arc<BlockPool>) -> Option<PoolBlock> {
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
    pub fn remember_edges(&mut self, batch: &mut Batch) {
        for block in take(&mut self.edges) {
            let newer = self.open.contains(block) || self.missing.contains(block);
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
