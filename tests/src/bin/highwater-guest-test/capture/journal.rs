//! Writers like those of a database with its log on another volume: what changes is in the log before it is in the data.
//!
//! A transaction is two writes: its record into the log, and when that has completed, one to some blocks of data. A writer begins a
//! write only when the one before has completed, so of each a state has the first `k` writes exactly; and a shared clock tells what
//! had ended when a write of another writer began: see [`check`].

pub mod check;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use highwater_tests::buffer::{Aligned, open_direct};
use highwater_tests::random::Random;

use super::super::load::encode;
use super::super::subject::BLOCK;

const SECTOR: usize = 512;
/// Blocks of a writer in the log, used in turn, and in the data.
const LOG_BLOCKS: u64 = 16;
const DATA_BLOCKS: u64 = 48;
/// Blocks of data that a transaction writes at most.
const CHANGE_BLOCKS_MAX: u64 = 8;

/// Where the writers write.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The volume of the data.
    pub data: PathBuf,
    /// The volume of the log.
    pub log: PathBuf,
    /// How many.
    pub writers: u64,
    /// The block of the data in whose midst the writers' parts lie: the one in the middle writes on both sides of it.
    pub middle: u64,
    /// Of what is random.
    pub seed: u64,
}

/// Which of the volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Volume {
    Data,
    Log,
}

/// One write.
#[derive(Clone, Copy, Debug)]
struct Write {
    volume: Volume,
    first: u64,
    blocks: u64,
    transaction: u64,
}

impl Plan {
    /// The first block of a writer's part of a volume, and how many there are.
    fn part(&self, volume: Volume, writer: u64) -> (u64, u64) {
        match volume {
            Volume::Log => (writer * LOG_BLOCKS, LOG_BLOCKS),
            Volume::Data => {
                (self.middle + writer * DATA_BLOCKS - self.writers * DATA_BLOCKS / 2, DATA_BLOCKS)
            }
        }
    }

    /// The `index`th write of a writer, from 1.
    fn write(&self, writer: u64, index: u64) -> Write {
        let transaction = index.div_ceil(2);
        if index % 2 == 1 {
            let (start, blocks) = self.part(Volume::Log, writer);
            let first = start + transaction % blocks;
            return Write { volume: Volume::Log, first, blocks: 1, transaction };
        }
        let mut random = Random::new(self.seed ^ writer << 48 ^ transaction.wrapping_mul(0x9e37_79b9));
        let (start, all) = self.part(Volume::Data, writer);
        let blocks = 1 + random.below(CHANGE_BLOCKS_MAX);
        let first = start + random.below(all - blocks + 1);
        Write { volume: Volume::Data, first, blocks, transaction }
    }

    fn fill(&self, content: &mut [u8], writer: u64, write: &Write) {
        let sectors = (write.first * (BLOCK / SECTOR) as u64)..;
        for (sector, content) in sectors.zip(content.chunks_exact_mut(SECTOR)) {
            encode(content, self.seed, sector, writer, write.transaction);
        }
    }

    /// Zeroes what the writers will write to.
    pub fn clear(&self) -> Result<()> {
        for volume in [Volume::Data, Volume::Log] {
            let (start, blocks) = self.part(volume, 0);
            let zeros = Aligned::zeroed((self.writers * blocks) as usize * BLOCK);
            self.open(volume)?.write_all_at(&zeros, start * BLOCK as u64)?;
        }
        Ok(())
    }

    fn open(&self, volume: Volume) -> Result<File> {
        let path = if volume == Volume::Data { &self.data } else { &self.log };
        open_direct(path, true).with_context(|| format!("cannot open {}", path.display()))
    }
}

/// When each of a writer's writes began and ended, by the shared clock.
pub type Times = Vec<(u64, u64)>;

/// Writes until told to stop.
pub fn write(plan: &Plan, writer: u64, clock: &AtomicU64, stop: &AtomicBool) -> Result<Times> {
    // SAFETY: plain numbers; a thread of its own.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
    let (data, log) = (plan.open(Volume::Data)?, plan.open(Volume::Log)?);
    let mut buffer = Aligned::zeroed(CHANGE_BLOCKS_MAX as usize * BLOCK);
    let mut times = vec![];
    while !stop.load(Ordering::Relaxed) {
        let write = plan.write(writer, times.len() as u64 + 1);
        let content = &mut buffer[..write.blocks as usize * BLOCK];
        plan.fill(content, writer, &write);
        let file = if write.volume == Volume::Data { &data } else { &log };
        let began = clock.fetch_add(1, Ordering::SeqCst);
        put(file, content, write.first * BLOCK as u64, write.volume, write.transaction)?;
        times.push((began, clock.fetch_add(1, Ordering::SeqCst)));
    }
    Ok(times)
}

/// A record of the log is made durable at once, or by a flush behind it, or not at all, as transactions go; of the data, some are.
fn put(file: &File, content: &[u8], at: u64, volume: Volume, transaction: u64) -> Result<()> {
    match (volume, transaction % 4) {
        (Volume::Log, 0 | 1) | (Volume::Data, 3) => write_durably(file, content, at)?,
        (Volume::Log, 2) => {
            file.write_all_at(content, at)?;
            file.sync_data()?;
        }
        _ => file.write_all_at(content, at)?,
    }
    Ok(())
}

/// One write that is on the medium when it has completed: the block layer's FUA, or a flush.
pub fn write_durably(file: &File, content: &[u8], at: u64) -> Result<()> {
    let vector = libc::iovec { iov_base: content.as_ptr().cast_mut().cast(), iov_len: content.len() };
    let at = i64::try_from(at)?;
    // SAFETY: the vector is of the content, which is only read.
    let written = unsafe { libc::pwritev2(file.as_raw_fd(), &raw const vector, 1, at, libc::RWF_DSYNC) };
    let written = nix::errno::Errno::result(written)?;
    ensure!(written as usize == content.len(), "only {written} bytes were written");
    Ok(())
}
