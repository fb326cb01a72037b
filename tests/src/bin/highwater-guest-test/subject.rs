//! A protected device and its replica, kept as the agent keeps one: what an epoch marked is read, after the epoch's end.
//!
//! The replica holds a 64-bit hash of each sector, which is enough to see that one was missed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use highwater_agent::device::{self, BlockDevice};
use highwater_agent::tracker::{Fault, Tracker};
use highwater_delta::DiskId;
use highwater_tests::buffer::{Aligned, open_direct};

use super::load;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const RUN_BLOCKS_MAX: usize = 64;
/// So many tries to find a device at rest after its writers have stopped.
const SETTLE_TRIES_MAX: usize = 50;

/// Of a block's sectors.
type Hashes = [u64; BLOCK / SECTOR];

/// Marked words of one disk.
pub type Marked = BTreeMap<usize, u64>;

/// One device under test.
pub struct Subject {
    /// How it is called in reports.
    pub name: &'static str,
    /// Its node.
    pub path: PathBuf,
    /// What the tracker knows it by.
    pub id: DiskId,
    /// What the agent sees.
    pub device: BlockDevice,
    /// What the tracker found wrong with it.
    pub faults: Vec<Fault>,
    replica: Vec<Hashes>,
    direct: File,
}

impl Subject {
    /// Looks at a device.
    pub fn new(name: &'static str, path: &Path) -> Result<Self> {
        let device = device::inspect(path).with_context(|| format!("cannot inspect {}", path.display()))?;
        let blocks = usize::try_from(device.sectors() / 8)?;
        Ok(Subject {
            name,
            path: path.to_owned(),
            id: DiskId::new(),
            direct: open_direct(path, false)?,
            device,
            faults: Vec::new(),
            replica: vec![Hashes::default(); blocks],
        })
    }

    /// Copies all of it.
    pub fn copy(&mut self) -> Result<()> {
        let all = 0..self.replica.len();
        let mut replica = std::mem::take(&mut self.replica);
        self.read(all, |block, content| replica[block] = hash(content))?;
        self.replica = replica;
        Ok(())
    }

    /// Reads what was marked into the replica.
    pub fn take(&mut self, marked: &Marked) -> Result<usize> {
        let blocks: Vec<usize> = marked
            .iter()
            .flat_map(|(word, bits)| {
                (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
            })
            .filter(|block| *block < self.replica.len())
            .collect();
        let mut replica = std::mem::take(&mut self.replica);
        for run in blocks.chunk_by(|a, b| a + 1 == *b) {
            self.read(run[0]..run[run.len() - 1] + 1, |block, content| replica[block] = hash(content))?;
        }
        self.replica = replica;
        Ok(blocks.len())
    }

    /// A block of the replica becomes this.
    pub fn set(&mut self, block: usize, content: &[u8]) {
        self.replica[block] = hash(content);
    }

    /// Where it differs from the replica; the first few blocks are told.
    fn differing(&self) -> Result<Differing> {
        let mut differing = Differing::default();
        self.read(0..self.replica.len(), |block, content| {
            let found = hash(content);
            if self.replica[block] == found {
                return;
            }
            if differing.blocks < 4 {
                println!("  {}: block {block} was missed; it holds {}", self.name, load::describe(content));
            }
            differing.blocks += 1;
            let sectors = (0..).zip(self.replica[block].iter().zip(found));
            let others = sectors.filter(|(_, (known, found))| *known != found);
            differing.bytes.extend(others.map(|(sector, _)| (block * BLOCK + sector * SECTOR) as u64));
        })?;
        Ok(differing)
    }

    /// Reads blocks past the page cache.
    pub fn read(&self, blocks: std::ops::Range<usize>, mut each: impl FnMut(usize, &[u8])) -> Result<()> {
        let mut buffer = Aligned::zeroed(BLOCK * RUN_BLOCKS_MAX.min(blocks.len()));
        for first in blocks.clone().step_by(RUN_BLOCKS_MAX) {
            let count = RUN_BLOCKS_MAX.min(blocks.end - first);
            let bytes = &mut buffer[..BLOCK * count];
            self.direct
                .read_exact_at(bytes, (first * BLOCK) as u64)
                .with_context(|| format!("cannot read {} at block {first}", self.name))?;
            for (block, content) in (first..).zip(bytes.chunks(BLOCK)) {
                each(block, content);
            }
        }
        Ok(())
    }
}

/// Where a device differs from its replica.
#[derive(Clone, Debug, Default)]
pub struct Differing {
    /// So many blocks.
    pub blocks: usize,
    /// The beginnings of their sectors that differ.
    pub bytes: Vec<u64>,
}

fn hash(content: &[u8]) -> Hashes {
    let mut hashes = Hashes::default();
    for (hash, sector) in hashes.iter_mut().zip(content.chunks_exact(SECTOR)) {
        *hash = 0x51_7c_c1_b7_27_22_0a_95;
        for word in sector.chunks_exact(8) {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            *hash = (hash.rotate_left(5) ^ u64::from_le_bytes(bytes)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    hashes
}

/// Begins to track every device, then copies them.
pub fn protect(tracker: &mut Tracker, subjects: &mut [Subject]) -> Result<()> {
    for subject in subjects.iter_mut() {
        subject.faults.clear();
        let protected = tracker.protect(subject.id, &subject.device);
        protected.with_context(|| format!("cannot protect {}", subject.name))?;
    }
    thread::scope(|scope| {
        let copies: Vec<_> = subjects.iter_mut().map(|subject| scope.spawn(|| subject.copy())).collect();
        copies.into_iter().try_for_each(|copy| copy.join().expect("readers do not panic"))
    })
}

/// Compares devices with their replicas: how many blocks of each were missed.
pub fn missed(subjects: &[Subject]) -> Result<Vec<usize>> {
    Ok(differing(subjects)?.iter().map(|differing| differing.blocks).collect())
}

/// Compares devices with their replicas: where they differ.
pub fn differing(subjects: &[Subject]) -> Result<Vec<Differing>> {
    thread::scope(|scope| {
        let all: Vec<_> = subjects.iter().map(|subject| scope.spawn(|| subject.differing())).collect();
        all.into_iter().map(|one| one.join().expect("readers do not panic")).collect()
    })
}

/// What one epoch brought.
#[derive(Debug, Default)]
pub struct Epoch {
    /// Blocks read.
    pub blocks: usize,
    /// How long the end took.
    pub ending: Duration,
    /// How long the reading took.
    pub reading: Duration,
    /// Disks with something in flight.
    pub unsettled: Vec<DiskId>,
}

/// Ends an epoch, and reads what it marked of every device.
pub fn epoch(tracker: &mut Tracker, subjects: &mut [Subject]) -> Result<Epoch> {
    epochs(tracker, subjects, 1)
}

/// Ends so many epochs, and reads what they marked of every device, each on a thread of its own. Under emulation, reading takes much
/// longer than ending, and it is at the ends that something could be missed.
pub fn epochs(tracker: &mut Tracker, subjects: &mut [Subject], count: usize) -> Result<Epoch> {
    let mut marked: BTreeMap<DiskId, Marked> = BTreeMap::new();
    let started = Instant::now();
    let mut unsettled = vec![];
    for _ in 0..count {
        let end = tracker.end_epoch(|disk, word, bits| {
            *marked.entry(disk).or_default().entry(word).or_default() |= bits;
        })?;
        for (disk, fault) in end.faults {
            if let Some(subject) = subjects.iter_mut().find(|s| s.id == disk) {
                subject.faults.push(fault);
            }
        }
        tracker.faults_noted()?;
        unsettled = end.unsettled;
    }
    let ending = started.elapsed();
    let blocks = replicate(tracker, subjects, &marked)?;
    Ok(Epoch { blocks, ending, reading: started.elapsed() - ending, unsettled })
}

/// Reads marked blocks and tells the tracker that they are stored.
fn replicate(
    tracker: &Tracker,
    subjects: &mut [Subject],
    marked: &BTreeMap<DiskId, Marked>,
) -> Result<usize> {
    let counts: Vec<Result<usize>> = thread::scope(|scope| {
        let readers: Vec<_> = subjects
            .iter_mut()
            .filter_map(|subject| marked.get(&subject.id).map(|marked| scope.spawn(|| subject.take(marked))))
            .collect();
        readers.into_iter().map(|reader| reader.join().expect("readers do not panic")).collect()
    });
    for (disk, marked) in marked {
        let mut words = vec![0; marked.last_key_value().map_or(0, |(last, _)| last + 1)];
        for (word, bits) in marked {
            words[*word] = *bits;
        }
        tracker.stored(*disk, &words)?;
    }
    counts.into_iter().sum()
}

/// After a take-over: what the life before left pending.
pub fn take_pending(tracker: &Tracker, subjects: &mut [Subject]) -> Result<usize> {
    let mut marked = BTreeMap::new();
    for subject in subjects.iter() {
        let pending = tracker.pending(subject.id)?;
        let words = pending.into_iter().enumerate().filter(|(_, bits)| *bits != 0).collect();
        marked.insert(subject.id, words);
    }
    replicate(tracker, subjects, &marked)
}

/// Ends epochs until nothing of the given devices is in flight: what is read then is a state of theirs.
pub fn settle(tracker: &mut Tracker, subjects: &mut [Subject], disks: &[DiskId]) -> Result<bool> {
    for _ in 0..SETTLE_TRIES_MAX {
        let end = epoch(tracker, subjects)?;
        if !disks.iter().any(|disk| end.unsettled.contains(disk)) {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(false)
}
