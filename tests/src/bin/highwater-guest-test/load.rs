//! Heavy load on a raw device: many threads of direct writes of 4 to 128 KiB, discards and zeroing between them.
//!
//! Each 4 KiB block names its device, place, writer and sequence, so a block that the tracker missed tells which write
//! it holds.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use highwater_tests::buffer::{Aligned, open_direct};
use highwater_tests::random::Random;

use super::machine;

const BLOCK: usize = 4096;
const BLOCKS_MAX: u64 = 32;
/// Operations in a row.
const BURST: u64 = 64;
/// Between two bursts, where there is a rest.
const REST: Duration = Duration::from_millis(80);
const MAGIC: u64 = u64::from_le_bytes(*b"HWGUESTB");
/// _IO(0x12, 119); takes an offset and a length.
pub const BLKDISCARD: u32 = 0x1277;
/// _IO(0x12, 127); likewise.
pub const BLKZEROOUT: u32 = 0x127f;

/// What the writers do to one device.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Threads.
    pub writers: u64,
    /// Out of 256 writes, so many are of one block; the others are of up to 32.
    pub small: u64,
    /// Whether discards come between.
    pub discard: bool,
    /// Whether zeroing comes between.
    pub zero: bool,
    /// Rest after each [`BURST`] operations: what reads after the load must not fall behind for good.
    pub rest: Duration,
}

impl Load {
    /// A mix, as far as the device can.
    pub fn mixed(device: &Path, writers: u64, zero: bool) -> Self {
        let can = |name| machine::attribute(device, name).is_ok_and(|bytes| bytes > 0);
        let zero = zero && can("queue/write_zeroes_max_bytes");
        Load { writers, small: 208, discard: can("queue/discard_max_bytes"), zero, rest: REST }
    }

    /// As many completions as the device gives.
    pub fn small(writers: u64) -> Self {
        Load { writers, small: 250, discard: false, zero: false, rest: Duration::ZERO }
    }
}

/// What was done.
#[derive(Debug, Default)]
pub struct Done {
    /// Writes.
    pub writes: AtomicU64,
    /// Discards.
    pub discards: AtomicU64,
    /// Zeroed ranges.
    pub zeroes: AtomicU64,
}

/// Writes until told to stop.
pub fn write(
    device: &Path,
    load: Load,
    writer: u64,
    seed: u64,
    stop: &AtomicBool,
    done: &Done,
) -> Result<()> {
    // Below the tracker's reader: on few processors it would come to nothing else.
    // SAFETY: plain numbers; a thread of its own.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
    let file = open_direct(device, true).with_context(|| format!("cannot open {}", device.display()))?;
    let blocks = machine::attribute(device, "size")? / 8;
    let mut random = Random::new(seed ^ writer << 32);
    let mut buffer = Aligned::zeroed(BLOCK * BLOCKS_MAX as usize);
    let mut sequence = 0;
    while !stop.load(Ordering::Relaxed) {
        sequence += 1;
        if sequence % BURST == 0 && !load.rest.is_zero() {
            thread::sleep(load.rest);
        }
        let single = random.below(256) < load.small;
        let count = if single { 1 } else { 1 + random.below(BLOCKS_MAX) };
        let first = random.below(blocks - count);
        let (at, bytes) = (first * BLOCK as u64, count * BLOCK as u64);
        let what = random.below(64);
        if what == 0 && load.discard {
            range(&file, BLKDISCARD, at, bytes).context("cannot discard")?;
            done.discards.fetch_add(1, Ordering::Relaxed);
        } else if what == 1 && load.zero {
            range(&file, BLKZEROOUT, at, bytes).context("cannot zero")?;
            done.zeroes.fetch_add(1, Ordering::Relaxed);
        } else {
            let content = &mut buffer[..bytes as usize];
            for (block, content) in (first..).zip(content.chunks_mut(BLOCK)) {
                encode(content, seed, block, writer, sequence);
            }
            file.write_all_at(content, at).with_context(|| format!("cannot write {}", device.display()))?;
            done.writes.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Discards or zeroes a range, in bytes.
pub fn range(file: &File, request: u32, at: u64, bytes: u64) -> Result<()> {
    let range = [at, bytes];
    // SAFETY: both requests read two words.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, range.as_ptr()) };
    nix::errno::Errno::result(result).map(drop)?;
    Ok(())
}

/// Fills a block, or a part of one.
pub fn encode(content: &mut [u8], seed: u64, block: u64, writer: u64, sequence: u64) {
    let filling =
        (seed ^ block.rotate_left(40) ^ writer << 32 ^ sequence).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let head = [MAGIC, seed, block, writer, sequence];
    for (index, word) in content.chunks_exact_mut(8).enumerate() {
        let value = head.get(index).copied().unwrap_or_else(|| filling.wrapping_add(index as u64));
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What a block tells of itself.
pub fn describe(content: &[u8]) -> String {
    let word = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&content[index * 8..index * 8 + 8]);
        u64::from_le_bytes(bytes)
    };
    if word(0) == MAGIC {
        format!("write {} of writer {} to block {} (load {:x})", word(4), word(3), word(2), word(1))
    } else if content.iter().all(|byte| *byte == 0) {
        "zeros".to_owned()
    } else {
        "other data".to_owned()
    }
}
