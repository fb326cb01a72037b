//! Writers whose writes depend on each other, over several disks: for crash consistency, exactly.
//!
//! Each writer submits a write only after its last one has completed, to a random place within regions of its own, now on one
//! disk, now on another, of 512 bytes to 64 KiB. A shared clock notes when each began and ended. So a state of the disks is one
//! that a crash could have left, if for each writer it is exactly the outcome of its first `k` writes, and if no writer's `k`
//! lacks a write that had ended before a write began that is there ([`History::check`]).

use crate::{
    buffer::{Aligned, open_direct},
    random::Random,
    site::Site,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

const SECTOR: usize = 512;
const SECTORS_MAX: u64 = 128;
const MAGIC: u64 = u64::from_le_bytes(*b"HWCHAIN1");

/// When each of a writer's writes began and ended, by the shared clock.
type Times = Vec<(u64, u64)>;

/// How the writers write.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The disks.
    pub disks: Vec<PathBuf>,
    /// How many writers.
    pub writers: u64,
    /// The number of the first one: those before have regions that others wrote.
    pub first_writer: u64,
    /// The region of each writer on each disk; the regions lie one behind the other from the disk's beginning.
    pub region_bytes: u64,
    /// Of what is random.
    pub seed: u64,
    /// Between a writer's writes.
    pub pause: Duration,
    /// Writes are of whole blocks of 4 KiB.
    pub whole_blocks: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            disks: vec![],
            writers: 4,
            first_writer: 0,
            region_bytes: 4 << 20,
            seed: 1,
            pause: Duration::ZERO,
            whole_blocks: false,
        }
    }
}

/// A write: where, and how many sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Write {
    disk: usize,
    sector: u64,
    sectors: u64,
}

impl Plan {
    /// The `index`th write of a writer, from 1.
    fn write(&self, writer: u64, index: u64) -> Write {
        let mut random = Random::new(self.seed ^ (writer << 48) ^ index.wrapping_mul(0x9e37_79b9));
        let region = self.region_bytes / SECTOR as u64;
        let step = if self.whole_blocks { 8 } else { 1 };
        // Small ones mostly, as databases and journals write.
        let most = if random.below(4) == 0 { SECTORS_MAX } else { 24 };
        let sectors = (1 + random.below(most / step)) * step;
        let sector = random.below((region - sectors) / step + 1) * step;
        Write { disk: random.below(self.disks.len() as u64) as usize, sector, sectors }
    }

    fn start_of(&self, writer: u64) -> u64 {
        writer * self.region_bytes
    }

    fn fill(&self, buffer: &mut [u8], writer: u64, index: u64, first: u64) {
        for (at, sector) in buffer.chunks_exact_mut(SECTOR).enumerate() {
            let number = first + at as u64;
            let words = [MAGIC, writer, index, number];
            for (place, word) in sector.chunks_exact_mut(8).zip(words) {
                place.copy_from_slice(&word.to_le_bytes());
            }
            let mut state = index.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ number ^ writer;
            for place in sector[32..].chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                place.copy_from_slice(&state.to_le_bytes());
            }
        }
    }
}

/// Writers at work. Dropped: stopped.
pub struct Chains {
    plan: Plan,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Result<Times>>>,
}

impl Chains {
    /// Starts them. The regions must be zeros.
    pub fn start(plan: Plan) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let clock = Arc::new(AtomicU64::new(1));
        let writers = (plan.first_writer..plan.first_writer + plan.writers)
            .map(|writer| {
                let (plan, stop, clock) = (plan.clone(), stop.clone(), clock.clone());
                let files: Vec<File> =
                    plan.disks.iter().map(|d| Ok(open_direct(d, true)?)).collect::<Result<_>>()?;
                Ok(std::thread::spawn(move || run(&plan, writer, &files, &stop, &clock)))
            })
            .collect::<Result<_>>()?;
        Ok(Self { plan, stop, writers })
    }

    /// Ends them.
    pub fn stop(mut self) -> Result<History> {
        self.stop.store(true, Ordering::Release);
        let writers = self.writers.drain(..).map(|w| w.join().expect("no panic")).collect::<Result<_>>()?;
        Ok(History { plan: self.plan.clone(), writers })
    }
}

impl Drop for Chains {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for writer in self.writers.drain(..) {
            writer.join().ok();
        }
    }
}

fn run(plan: &Plan, writer: u64, files: &[File], stop: &AtomicBool, clock: &AtomicU64) -> Result<Times> {
    let mut buffer = Aligned::zeroed(SECTORS_MAX as usize * SECTOR);
    let mut times = vec![];
    while !stop.load(Ordering::Acquire) {
        let index = times.len() as u64 + 1;
        let write = plan.write(writer, index);
        let bytes = write.sectors as usize * SECTOR;
        plan.fill(&mut buffer[..bytes], writer, index, write.sector);
        let began = clock.fetch_add(1, Ordering::SeqCst);
        let at = plan.start_of(writer) + write.sector * SECTOR as u64;
        files[write.disk].write_all_at(&buffer[..bytes], at).context("a chain's write failed")?;
        times.push((began, clock.fetch_add(1, Ordering::SeqCst)));
        if !plan.pause.is_zero() {
            std::thread::sleep(plan.pause);
        }
    }
    Ok(times)
}

/// What was written, and when.
pub struct History {
    plan: Plan,
    /// Of each writer: when each of its writes began and ended.
    writers: Vec<Times>,
}

impl History {
    /// How many writes there were.
    #[must_use]
    pub fn writes(&self) -> usize {
        self.writers.iter().map(Vec::len).sum()
    }

    /// Holds images of the disks, in their order, to be a state that a crash could have left. Answers how many writes of each
    /// writer it has.
    pub fn check(&self, images: &[&Path]) -> Result<Vec<u64>> {
        let mut present = vec![];
        for writer in 0..self.plan.writers {
            present.push(self.check_writer(images, writer).with_context(|| format!("writer {writer}"))?);
        }
        // Whatever had ended before something began that is there.
        for (t, times) in self.writers.iter().enumerate() {
            let Some(last) = (present[t] as usize).checked_sub(1) else { continue };
            let began = times[last].0;
            for (u, others) in self.writers.iter().enumerate() {
                let ended = others.partition_point(|(_, ended)| *ended < began) as u64;
                ensure!(
                    present[u] >= ended,
                    "write {} of writer {t} is there, but not write {ended} of writer {u}, which had ended before it began: \
                     only {} are",
                    last + 1,
                    present[u]
                );
            }
        }
        Ok(present)
    }

    /// Recovers every point of a site that has all these disks, and holds each to be a state that a crash could have left, later
    /// than the one before. Answers how many there were, and how many writes the last one has.
    pub fn check_points(&self, site: &Site, names: &[&str]) -> Result<(usize, u64)> {
        let (mut checked, mut before) = (0, vec![0; self.writers.len()]);
        for (point, _) in site.points()? {
            let recovered = site.recover(point)?;
            let images: Vec<PathBuf> = names.iter().map(|name| recovered.image(name)).collect();
            if images.iter().any(|image| !image.exists()) {
                // Of before the first copy of all was complete.
                continue;
            }
            let images: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
            let present = self.check(&images).with_context(|| format!("point {point}"))?;
            ensure!(present.iter().zip(&before).all(|(now, then)| now >= then), "point {point} goes back");
            before = present;
            checked += 1;
        }
        Ok((checked, before.iter().sum()))
    }

    fn check_writer(&self, images: &[&Path], index: u64) -> Result<u64> {
        let plan = &self.plan;
        let writer = plan.first_writer + index;
        let mut found = vec![];
        let mut last = 0;
        for image in images {
            let mut region = vec![0; plan.region_bytes as usize];
            File::open(image)?.read_exact_at(&mut region, plan.start_of(writer))?;
            for sector in region.chunks_exact(SECTOR) {
                let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("8 bytes"));
                if word(0) == MAGIC && word(8) == writer {
                    last = last.max(word(16));
                }
            }
            found.push(region);
        }
        ensure!(last as usize <= self.writers[index as usize].len(), "write {last} was never made");
        let mut expected = vec![vec![0; plan.region_bytes as usize]; images.len()];
        for index in 1..=last {
            let write = plan.write(writer, index);
            let at = write.sector as usize * SECTOR;
            let place = &mut expected[write.disk][at..at + write.sectors as usize * SECTOR];
            plan.fill(place, writer, index, write.sector);
        }
        for (disk, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let pairs = found.chunks_exact(SECTOR).zip(expected.chunks_exact(SECTOR)).enumerate();
            let wrong: Vec<usize> = pairs.filter(|(_, (f, e))| f != e).map(|(at, _)| at).collect();
            let tell = |at: &usize| {
                let index =
                    |of: &[u8]| u64::from_le_bytes(of[at * SECTOR + 16..][..8].try_into().expect("8 bytes"));
                format!("{at}: has {}, of {}", index(found), index(expected))
            };
            ensure!(
                wrong.is_empty(),
                "disk {disk}: {} sectors are not those of the first {last} writes: {:?}",
                wrong.len(),
                wrong.iter().take(6).map(tell).collect::<Vec<_>>()
            );
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_write_and_one_out_of_order_are_found() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let disks: Vec<PathBuf> = ["a", "b"].iter().map(|name| dir.path().join(name)).collect();
        for disk in &disks {
            File::create(disk).unwrap().set_len(4 << 20).unwrap();
        }
        let plan = Plan { disks: disks.clone(), writers: 2, region_bytes: 1 << 20, ..Plan::default() };
        let chains = Chains::start(plan.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let history = chains.stop().unwrap();
        let images: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
        let all: Vec<u64> = history.writers.iter().map(|w| w.len() as u64).collect();
        assert_eq!(history.check(&images).unwrap(), all);
        // A writer's last writes are missing, though the other began later ones.
        let copy = dir.path().join("copy");
        std::fs::copy(&disks[0], &copy).unwrap();
        let file = File::options().write(true).open(&copy).unwrap();
        file.write_all_at(&vec![0; 1 << 20], 0).unwrap();
        assert!(history.check(&[&copy, images[1]]).is_err());
        // One sector is older than it should be.
        std::fs::copy(&disks[0], &copy).unwrap();
        let write = (1..all[0]).rev().map(|i| plan.write(0, i)).find(|w| w.disk == 0).unwrap();
        file.write_all_at(&[0; 512], write.sector * 512).unwrap();
        assert!(history.check(&[&copy, images[1]]).is_err());
    }
}
