//! Writers on a disk whose writes are logged beneath, such that the log has writes to one sector in their order.
//!
//! The log has a write that is durable by itself (FUA) when it completes, and any other when it was flushed, by the flush that took
//! it. So durable writes have sectors of their own; there is one flush at a time; and a writer has its own sectors.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use anyhow::{Context, Result};
use highwater_tests::buffer::{Aligned, open_direct};
use highwater_tests::random::Random;

use super::super::load::{BLKDISCARD, encode, range};
use super::journal::write_durably;

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
const WRITE_BYTES_MAX: u64 = 64 << 10;
/// One operation of so many: a discard, a durable write, a flush, a write that is not of whole blocks.
const DISCARD_EVERY: u64 = 24;
const DURABLE_EVERY: u64 = 8;
const FLUSH_EVERY: u64 = 8;
const PARTIAL_EVERY: u64 = 48;
/// One block of so many of a writer's part is for durable writes.
const DURABLE_PART: u64 = 4;

/// Where and how they write, and how they are held still.
pub struct Writers {
    /// The disk.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// How many.
    pub count: u64,
    /// Of what is random.
    pub seed: u64,
    /// Held while something is written; who has it for writing finds all completed.
    pub still: RwLock<()>,
    /// Held for a flush.
    pub flush: Mutex<()>,
    /// They are to end.
    pub stop: AtomicBool,
    /// Operations.
    pub done: AtomicU64,
}

impl Writers {
    /// Writes until told to stop.
    pub fn write(&self, writer: u64) -> Result<()> {
        // SAFETY: plain numbers; a thread of its own.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
        let file = open_direct(&self.path, true).context("cannot open the logged disk")?;
        let mut random = Random::new(self.seed ^ writer << 32);
        let mut buffer = Aligned::zeroed(WRITE_BYTES_MAX as usize);
        let part = self.bytes / self.count / BLOCK * BLOCK;
        let (start, durable) = (writer * part, part / DURABLE_PART / BLOCK * BLOCK);
        for sequence in 1.. {
            let is_durable = random.below(DURABLE_EVERY) == 0;
            let area = if is_durable { start..start + durable } else { start + durable..start + part };
            let unit = if random.below(PARTIAL_EVERY) == 0 { SECTOR } else { BLOCK };
            let most = if random.below(4) == 0 { WRITE_BYTES_MAX } else { 2 * BLOCK };
            let bytes = (1 + random.below(most / unit)) * unit;
            let at = area.start + random.below((area.end - area.start - bytes) / unit + 1) * unit;
            let content = &mut buffer[..bytes as usize];
            for (number, sector) in (at / SECTOR..).zip(content.chunks_mut(SECTOR as usize)) {
                encode(sector, self.seed, number, writer, sequence);
            }
            let _moving = self.still.read().unwrap_or_else(PoisonError::into_inner);
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if is_durable {
                let _flushing = self.flush.lock().unwrap_or_else(PoisonError::into_inner);
                write_durably(&file, content, at)?;
            } else if unit == BLOCK && random.below(DISCARD_EVERY) == 0 {
                range(&file, BLKDISCARD, at, bytes).context("cannot discard")?;
            } else {
                file.write_all_at(content, at).context("cannot write the logged disk")?;
            }
            if random.below(FLUSH_EVERY) == 0 {
                let _flushing = self.flush.lock().unwrap_or_else(PoisonError::into_inner);
                file.sync_data()?;
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}
