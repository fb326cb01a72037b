//! The background comparison: the disks against the vault, a little at a time, for ever.
//!
//! It bounds what nothing else can see: a buffer that an application changed while its direct write was in flight, a device that
//! changed its content by itself, a bug. Block by block, what the disk has is held against the hash that the vault has. A block
//! that is marked, or is being written, is passed over. What differs is looked at again, some times, a moment apart; what differs
//! still and was never marked meanwhile is told, marked, and sent.
//!
//! **Limits:** `compare-rate` bytes a second, one question to the collector for each [`WINDOW_BLOCKS`]. Where it was is not kept over
//! a restart: it begins at another place each time.

use super::{Engine, Link, disk::Disk, session::Patience, state::DiskState};
use crate::{source::SourceError, tracker::Tracker};
use highwater_delta::{BLOCK_BYTES, BlockRange, DiskId, StoredBlock};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Blocks compared at once.
const WINDOW_BLOCKS: u64 = 256;
/// Looks at a block that differs, and the time between two of them.
const LOOKS: u32 = 4;
const LOOK_AFTER: Duration = Duration::from_millis(700);

/// When it could not be told, it is tried again so much later.
const NOT_NOW: Duration = Duration::from_secs(5);

/// Where the comparison is.
pub(super) struct Comparison {
    bytes_per_s: u64,
    next: Instant,
    /// The disk, and the block on it.
    at: Option<(DiskId, u64)>,
    /// Differed at this many looks.
    suspects: BTreeMap<u64, u32>,
    look_at: Instant,
}

impl Comparison {
    pub(super) fn new(bytes_per_s: u64) -> Self {
        let now = Instant::now();
        Self { bytes_per_s, next: now, at: None, suspects: BTreeMap::new(), look_at: now }
    }
}

impl Engine {
    /// Compares the next blocks, if it is time; false if there was nothing to do.
    pub(super) fn compare_some(&mut self) -> bool {
        let now = Instant::now();
        // A store that lags is not to be asked on top.
        let idle = matches!(self.link, Link::Up(_)) && self.awaited.is_empty() && !self.has_work();
        if self.comparison.bytes_per_s == 0 || !idle {
            return false;
        }
        let looks = !self.comparison.suspects.is_empty();
        if now < if looks { self.comparison.look_at } else { self.comparison.next } {
            return false;
        }
        let Some((id, from)) = self.compare_where() else { return false };
        let blocks: Vec<BlockRange> = if looks {
            self.comparison.suspects.keys().map(|block| BlockRange::new(*block, 1)).collect()
        } else {
            let Some(disk) = self.disk_mut(id) else { return false };
            let end = disk.size_bytes().div_ceil(BLOCK_BYTES as u64);
            vec![BlockRange::new(from, WINDOW_BLOCKS.min(end.saturating_sub(from)))]
        };
        let differing = match self.compare_blocks(id, &blocks) {
            Some(Ok(differing)) => differing,
            Some(Err(error)) => {
                self.comparison.suspects.clear();
                self.unreadable(id, &error);
                return true;
            }
            // The session ended, or the disk changed: later.
            None => {
                self.comparison.suspects.clear();
                self.comparison.next = now + NOT_NOW;
                return true;
            }
        };
        let compared: u64 = blocks.iter().map(|range| range.count).sum();
        if !looks {
            self.metrics.background_compared(compared);
        }
        self.judge(id, looks, differing);
        if self.comparison.suspects.is_empty() {
            let took = compared * BLOCK_BYTES as u64 * 1_000_000 / self.comparison.bytes_per_s;
            self.comparison.next = now + Duration::from_micros(took);
            self.comparison.at = Some((id, from + WINDOW_BLOCKS));
        } else {
            self.comparison.look_at = Instant::now() + LOOK_AFTER;
        }
        true
    }

    /// Whether something else is to be done now.
    pub(super) fn has_work(&self) -> bool {
        let now = Instant::now();
        !self.point_wanted.is_empty()
            || !self.put_off.is_empty()
            || (self.in_order() && now >= self.ordered.due)
            || (now >= self.point_due && self.points_possible())
            || self.ordered.is_pressed()
    }

    /// Where it goes on: the same disk, or the next one that can be compared.
    fn compare_where(&mut self) -> Option<(DiskId, u64)> {
        let may = |d: &Disk| {
            matches!(d.state.state(), DiskState::Bitmap | DiskState::WriteOrdered)
                && d.device.is_some()
                && d.protected.replicated
        };
        let blocks = |d: &Disk| d.size_bytes().div_ceil(BLOCK_BYTES as u64);
        let (id, block) = match self.comparison.at {
            Some(at) => at,
            None => {
                let first = self.disks.iter().find(|d| may(d))?;
                // Anywhere: who is restarted often would else compare the beginning alone.
                let any = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos().into());
                (first.id(), any * WINDOW_BLOCKS % blocks(first).max(1))
            }
        };
        let at = self.disks.iter().position(|d| d.id() == id);
        if let Some(disk) = at.and_then(|at| self.disks.get(at)).filter(|d| may(d))
            && block < blocks(disk)
        {
            self.comparison.at = Some((id, block));
            return self.comparison.at;
        }
        self.comparison.suspects.clear();
        let behind = at.map_or(0, |at| at + 1);
        let next = self.disks[behind..].iter().chain(&self.disks[..behind]).find(|d| may(d))?;
        self.comparison.at = Some((next.id(), 0));
        self.comparison.at
    }

    /// Which of these blocks differ and are not marked. `None`: it cannot be told now.
    fn compare_blocks(&mut self, id: DiskId, blocks: &[BlockRange]) -> Option<Result<Vec<u64>, SourceError>> {
        let (asked_of, shift) =
            self.disks.iter().find(|d| d.id() == id).map(|d| (d.device.clone(), d.shift))?;
        let marked = |tracker: &Tracker, block: u64| tracker.is_marked(id, block >> shift);
        let mut before = BTreeSet::new();
        for block in blocks.iter().flat_map(|range| range.start.0..range.end()) {
            if marked(&self.tracker, block).ok()? {
                before.insert(block);
            }
        }
        let known = self.known_within(id, blocks, Patience::Idle)?;
        let Link::Up(session) = &self.link else { return None };
        let key = session.key.clone();
        let pool = self.pool.clone();
        let disk = self.disk_mut(id).filter(|d| d.device == asked_of)?;
        let skipped = disk.blocks(disk.ledger.skipped());
        let mut different = vec![];
        let mut read = || -> Result<(), SourceError> {
            let Some(reader) = disk.open(1, &pool) else { return Ok(()) };
            let mut job = reader?.read_ranges(blocks.to_vec());
            while let Some(run) = job.next_blocking() {
                let run = run?;
                for (number, content) in (run.range.start.0..).zip(run.buffer.as_chunks::<BLOCK_BYTES>().0) {
                    let same = match known.get(&number) {
                        Some(StoredBlock::Data(hash)) => key.hash(content) == *hash,
                        Some(StoredBlock::Zero) => content.iter().all(|byte| *byte == 0),
                        Some(StoredBlock::Absent) | None => false,
                    };
                    if !same {
                        different.push(number);
                    }
                }
            }
            Ok(())
        };
        if let Err(error) = read() {
            return Some(Err(error));
        }
        // Marked before it was asked for, or since: the vault need not have it yet.
        let skips = |block: u64| skipped.iter().any(|r| r.start.0 <= block && block < r.end());
        let mut unmarked = vec![];
        for block in different {
            if !before.contains(&block) && !skips(block) && !marked(&self.tracker, block).ok()? {
                unmarked.push(block);
            }
        }
        Some(Ok(unmarked))
    }

    /// What differed at enough looks is marked, and told.
    fn judge(&mut self, id: DiskId, looked: bool, differing: Vec<u64>) {
        let before = std::mem::take(&mut self.comparison.suspects);
        let mut proved = vec![];
        for block in differing {
            let looks = before.get(&block).copied().unwrap_or(0) + 1;
            if looked && looks >= LOOKS {
                proved.push(block);
            } else {
                self.comparison.suspects.insert(block, looks);
            }
        }
        let Some(disk) = self.disks.iter_mut().find(|d| d.id() == id).filter(|_| !proved.is_empty()) else {
            return;
        };
        tracing::error!(
            code = "HW-1497",
            disk = disk.protected.name,
            blocks = proved.len(),
            first = proved[0],
            "the vault's copy was not the disk's, though nothing was written: it is healed"
        );
        let mut set = highwater_delta::BlockSet::new(disk.granules());
        let shift = disk.shift;
        proved.iter().for_each(|block| {
            set.insert(block >> shift);
        });
        if let Err(error) = self.tracker.mark(id, set.words()) {
            tracing::warn!(%error, "the blocks that differ could not be marked");
            return;
        }
        disk.ledger.again(proved.iter().map(|block| block >> shift));
        self.metrics.background_different(proved.len() as u64);
    }
}
