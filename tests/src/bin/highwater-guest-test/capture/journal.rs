//! Writers like those of a database with its log on another volume: what changes is in the log before it is in the data.
//!
//! A transaction is two writes: its record into the log, and when that has completed, one to some blocks of data. A writer begins a
//! write only when the one before has completed, so of each a state has the first `k` writes exactly; and a shared clock tells what
//! had ended when a write of another writer began ([`Journals::check`]).

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

/// What a state must have, kept for one position after the other.
pub struct Journals {
    plan: Plan,
    writers: Vec<Journal>,
    /// How many writes of each writer each position had.
    pub positions: Vec<Vec<u64>>,
}

/// Of one writer: how many of its writes there were, and of which transaction each of its blocks is then.
struct Journal {
    writes: u64,
    data: Vec<u64>,
    log: Vec<u64>,
}

impl Journals {
    /// Before the first write.
    pub fn new(plan: Plan) -> Self {
        let journal =
            |_| Journal { writes: 0, data: vec![0; DATA_BLOCKS as usize], log: vec![0; LOG_BLOCKS as usize] };
        Self { writers: (0..plan.writers).map(journal).collect(), plan, positions: vec![] }
    }

    /// Holds the volumes' content at a position to be the outcome of the first writes of each writer.
    pub fn check(&mut self, data: &[u8], log: &[u8]) -> Result<()> {
        let plan = &self.plan;
        let mut all = vec![];
        for (writer, journal) in (0..).zip(&mut self.writers) {
            let found = |volume| {
                let content = if volume == Volume::Data { data } else { log };
                transactions(plan, volume, writer, content).with_context(|| format!("writer {writer}"))
            };
            let (data, log) = (found(Volume::Data)?, found(Volume::Log)?);
            let last = |found: &[u64]| found.iter().copied().max().unwrap_or(0);
            let (changed, logged) = (last(&data), last(&log));
            ensure!(
                changed <= logged,
                "writer {writer}: data of transaction {changed} is there, but its log has {logged} only"
            );
            let writes = if changed == logged { logged * 2 } else { logged * 2 - 1 };
            ensure!(
                writes >= journal.writes,
                "writer {writer}: {writes} writes are there, {} were before",
                journal.writes
            );
            journal.advance(plan, writer, writes);
            for (volume, found, expected) in
                [(Volume::Data, &data, &journal.data), (Volume::Log, &log, &journal.log)]
            {
                let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
                if let Some(at) = wrong {
                    anyhow::bail!(
                        "writer {writer}, {writes} writes: block {at} of its {volume:?} is of transaction {}, not {}",
                        found[at],
                        expected[at]
                    );
                }
            }
            all.push(writes);
        }
        self.positions.push(all);
        Ok(())
    }

    /// Holds every position to have whatever had ended before something began that it has; the last, to have all.
    pub fn check_order(&self, times: &[Times]) -> Result<()> {
        for (number, position) in self.positions.iter().enumerate() {
            for (writer, writes) in position.iter().enumerate() {
                let Some(last) = (*writes as usize).checked_sub(1) else { continue };
                let began = times[writer][last].0;
                for (other, others) in times.iter().enumerate() {
                    let ended = others.partition_point(|(_, ended)| *ended < began) as u64;
                    ensure!(
                        position[other] >= ended,
                        "position {number}: write {writes} of writer {writer} is there, but not write {ended} of writer {other}, \
                         which had ended before it began"
                    );
                }
            }
        }
        let all: Vec<u64> = times.iter().map(|times| times.len() as u64).collect();
        ensure!(self.positions.last() == Some(&all), "at rest, not all writes are there");
        Ok(())
    }
}

impl Journal {
    fn advance(&mut self, plan: &Plan, writer: u64, writes: u64) {
        for index in self.writes + 1..=writes {
            let write = plan.write(writer, index);
            let (start, _) = plan.part(write.volume, writer);
            let blocks = if write.volume == Volume::Data { &mut self.data } else { &mut self.log };
            let first = (write.first - start) as usize;
            blocks[first..first + write.blocks as usize].fill(write.transaction);
        }
        self.writes = writes;
    }
}

/// Of which transaction each block of a writer's part is; 0: of none yet. Every sector is looked at.
fn transactions(plan: &Plan, volume: Volume, writer: u64, content: &[u8]) -> Result<Vec<u64>> {
    let (start, blocks) = plan.part(volume, writer);
    let mut expected = [0; SECTOR];
    (start..start + blocks)
        .map(|block| {
            let content = &content[block as usize * BLOCK..][..BLOCK];
            // load::encode: the fifth word is the sequence.
            let transaction = u64::from_le_bytes(content[32..40].try_into()?);
            for (sector, content) in (block * (BLOCK / SECTOR) as u64..).zip(content.chunks_exact(SECTOR)) {
                expected.fill(0);
                if transaction > 0 {
                    encode(&mut expected, plan.seed, sector, writer, transaction);
                }
                ensure!(
                    content == expected,
                    "{volume:?} block {block} is of transaction {transaction}, but its sector {sector} is not"
                );
            }
            Ok(transaction)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The volumes after so many writes of each writer.
    fn after(plan: &Plan, writes: &[u64]) -> [Vec<u8>; 2] {
        let mut volumes = [vec![0; 512 * BLOCK], vec![0; 64 * BLOCK]];
        for (writer, writes) in (0..).zip(writes) {
            for write in (1..=*writes).map(|index| plan.write(writer, index)) {
                let volume = &mut volumes[usize::from(write.volume == Volume::Log)];
                let at = write.first as usize * BLOCK;
                plan.fill(&mut volume[at..at + write.blocks as usize * BLOCK], writer, &write);
            }
        }
        volumes
    }

    fn plan() -> Plan {
        Plan { data: "/".into(), log: "/".into(), writers: 3, middle: 256, seed: 7 }
    }

    #[test]
    fn states_between_writes_are_right_and_no_others() {
        let plan = plan();
        let mut journals = Journals::new(plan.clone());
        for writes in [[0, 0, 0], [1, 0, 2], [7, 4, 2], [80, 4, 33]] {
            let [data, log] = after(&plan, &writes);
            journals.check(&data, &log).unwrap();
            assert_eq!(journals.positions.last().unwrap()[..], writes);
        }
        // The log's volume is of before the data's.
        let told = |writes: [u64; 3], log_writes: [u64; 3]| {
            let ([data, _], [_, log]) = (after(&plan, &writes), after(&plan, &log_writes));
            Journals::new(plan.clone()).check(&data, &log).unwrap_err().to_string()
        };
        assert!(told([80, 4, 34], [80, 4, 32]).contains("its log has 16 only"));
        // A change of data is lacking, though later ones are there or not.
        assert!(told([78, 4, 34], [81, 4, 34]).contains("is of transaction"));
        let [mut data, log] = after(&plan, &[80, 4, 34]);
        let write = plan.write(0, 80);
        data[write.first as usize * BLOCK..][..SECTOR].fill(0);
        let torn = format!("{:#}", Journals::new(plan.clone()).check(&data, &log).unwrap_err());
        assert!(torn.contains("but its sector"), "{torn}");
        // A position before the last one.
        let [data, log] = after(&plan, &[79, 4, 33]);
        assert!(journals.check(&data, &log).unwrap_err().to_string().contains("were before"));
    }

    #[test]
    fn what_had_ended_must_be_there() {
        let plan = plan();
        let mut journals = Journals::new(plan.clone());
        let [data, log] = after(&plan, &[2, 1, 0]);
        journals.check(&data, &log).unwrap();
        let ended_first = vec![vec![(1, 2), (5, 6)], vec![(3, 4)], vec![]];
        journals.check_order(&ended_first).unwrap();
        let lacking = vec![vec![(1, 2), (9, 10)], vec![(3, 4), (5, 6)], vec![]];
        assert!(journals.check_order(&lacking).unwrap_err().to_string().contains("had ended before"));
    }
}
