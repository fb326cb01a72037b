//! Load on raw devices for capture: direct writes of one logical block to 64 KiB, discards and zeroing between them.
//!
//! A device begins with the area of dependent writes (`highwater_tests::Chains`), then comes a small one in which all writers
//! meet, so that writes to one sector are in flight together, whose order only the device knows; the rest is divided among them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use highwater_tests::buffer::{Aligned, open_direct};
use highwater_tests::random::Random;

use super::super::load::{BLKDISCARD, BLKZEROOUT, Done, encode, range};
use super::super::machine;
use super::super::subject::Subject;

/// Writers of dependent writes.
pub const CHAINS: u64 = 3;
/// The area of each on each device.
pub const CHAIN_BYTES: u64 = 256 << 10;
/// The areas of all.
pub const CHAINED_BYTES: usize = (CHAINS * CHAIN_BYTES) as usize;
const MEETING_BYTES: u64 = 256 << 10;
/// One write of so many goes where all writers meet.
const MEETING_EVERY: u64 = 24;
/// One operation of so many need not be of whole blocks: then the rest of two blocks has to be read, which takes long under emulation.
const PARTIAL_EVERY: u64 = 24;
const BLOCK: u64 = 4096;
const WRITE_BYTES_MAX: u64 = 64 << 10;
/// Operations in a row, and the rest between: what reads the stream must not fall behind for good.
const BURST: u64 = 8;
const REST: Duration = Duration::from_millis(100);

/// Blocks in which all writers meet.
pub fn meeting() -> std::ops::Range<u64> {
    let from = CHAINED_BYTES as u64;
    from / BLOCK..(from + MEETING_BYTES) / BLOCK
}

/// What is done to one device.
#[derive(Clone, Debug)]
pub struct Load {
    path: PathBuf,
    /// Threads.
    pub writers: u64,
    /// The smallest write.
    unit: u64,
    size: u64,
    discard: bool,
    zero: bool,
}

impl Load {
    /// As far as the device can.
    pub fn new(subject: &Subject, writers: u64) -> Self {
        let can = |name| machine::attribute(&subject.path, name).is_ok_and(|bytes| bytes > 0);
        Self {
            path: subject.path.clone(),
            writers,
            unit: u64::from(subject.device.logical_block_bytes),
            size: subject.device.size_bytes,
            discard: can("queue/discard_max_bytes"),
            zero: can("queue/write_zeroes_max_bytes"),
        }
    }

    /// The area of one writer, or the one where all meet.
    fn area(&self, writer: u64, random: &mut Random) -> std::ops::Range<u64> {
        let meeting = meeting().start * BLOCK..meeting().end * BLOCK;
        if random.below(MEETING_EVERY) == 0 {
            return meeting;
        }
        // Not of whole blocks: neighbours write into one, each its own sectors.
        let each = (self.size - meeting.end) / self.writers / self.unit * self.unit;
        meeting.end + writer * each..meeting.end + (writer + 1) * each
    }
}

/// Writes until told to stop.
pub fn write(load: &Load, writer: u64, seed: u64, stop: &AtomicBool, done: &Done) -> Result<()> {
    // SAFETY: plain numbers; a thread of its own.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
    let file =
        open_direct(&load.path, true).with_context(|| format!("cannot open {}", load.path.display()))?;
    let mut random = Random::new(seed ^ writer << 32);
    let mut buffer = Aligned::zeroed(WRITE_BYTES_MAX as usize);
    let mut sequence = 0;
    while !stop.load(Ordering::Relaxed) {
        sequence += 1;
        if sequence % BURST == 0 {
            thread::sleep(REST);
        }
        let area = load.area(writer, &mut random);
        let apart = area.start >= meeting().end * BLOCK;
        let most = if random.below(4) == 0 { WRITE_BYTES_MAX } else { 2 * BLOCK };
        let what = random.below(48);
        // What a device leaves of a discard that is not of whole blocks is its own affair.
        let partial = apart && random.below(PARTIAL_EVERY) == 0;
        let unit = if what == 0 || !partial { BLOCK } else { load.unit };
        let (first, end) = (area.start.div_ceil(unit), area.end / unit);
        let count = 1 + random.below(most / unit);
        let (at, bytes) = ((first + random.below(end - first - count + 1)) * unit, count * unit);
        if what == 0 && load.discard {
            range(&file, BLKDISCARD, at, bytes).context("cannot discard")?;
            done.discards.fetch_add(1, Ordering::Relaxed);
        } else if what == 1 && load.zero {
            range(&file, BLKZEROOUT, at, bytes).context("cannot zero")?;
            done.zeroes.fetch_add(1, Ordering::Relaxed);
        } else {
            let content = &mut buffer[..bytes as usize];
            for (number, unit) in (at / load.unit..).zip(content.chunks_mut(load.unit as usize)) {
                encode(unit, seed, number, writer, sequence);
            }
            std::os::unix::fs::FileExt::write_all_at(&file, content, at)
                .with_context(|| format!("cannot write {}", load.path.display()))?;
            done.writes.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
