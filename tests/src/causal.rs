//! A distributed writer whose writes cause each other: each is made on another machine than the one before, and only when that one is done.
//!
//! Write `k` (from 1) of a chain lies on machine `k % machines`. So a state of all machines at one instant holds writes 1 to some `K` of each
//! chain, and none behind it. Whatever lacks one and has a later one was not taken at one instant.

use crate::{FileSystem, Mounted};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

pub(crate) const ENTRY_BYTES: u64 = 8;
/// Entries of one chain on one machine.
const ENTRIES: u64 = 256 << 10;
/// A chain's file.
pub const CHAIN_BYTES: u64 = ENTRIES * ENTRY_BYTES;

/// The chains of one run. Dropped: they end.
pub struct Causal {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<u64>>>,
    slowest_us: Arc<AtomicU64>,
}

/// One machine's part of one chain.
pub trait Entries: Send {
    /// Writes an entry; it is durable then, or the kernel has it.
    fn write(&mut self, entry: u64, value: u64, durable: bool) -> Result<()>;
}

impl Entries for File {
    fn write(&mut self, entry: u64, value: u64, durable: bool) -> Result<()> {
        self.write_all_at(&value.to_le_bytes(), entry * ENTRY_BYTES)?;
        if durable {
            self.sync_data()?;
        }
        Ok(())
    }
}

impl Causal {
    /// Starts chains over these file systems. Every second one waits until each write is durable, the others only until the kernel has it;
    /// between two writes there are so many microseconds.
    pub fn start(machines: &[&Path], chains: usize, pause_us: u64) -> Result<Self> {
        let part = |chain, machine: &&Path| -> Result<Box<dyn Entries>> {
            let path = machine.join(name(chain));
            fs::write(&path, vec![0; CHAIN_BYTES as usize])?;
            let file = OpenOptions::new().write(true).open(path)?;
            file.sync_all()?;
            Ok(Box::new(file))
        };
        let parts = |chain| machines.iter().map(|machine| part(chain, machine)).collect::<Result<Vec<_>>>();
        Self::start_on((0..chains).map(parts).collect::<Result<_>>()?, pause_us)
    }

    /// The same on parts that are there: of each chain, those of all machines, in files of [`name`] and [`CHAIN_BYTES`] of zeros.
    pub fn start_on(chains: Vec<Vec<Box<dyn Entries>>>, pause_us: u64) -> Result<Self> {
        let (stop, slowest_us) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut threads = vec![];
        for (chain, mut parts) in chains.into_iter().enumerate() {
            let (stop, slowest_us) = (stop.clone(), slowest_us.clone());
            threads.push(
                thread::Builder::new()
                    .name(format!("chain-{chain}"))
                    .spawn(move || write(&mut parts, chain % 2 == 0, pause_us, &stop, &slowest_us))?,
            );
        }
        Ok(Self { stop, threads, slowest_us })
    }

    /// Ends it; answers how many writes were made, and how long the slowest took.
    pub fn stop(mut self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::SeqCst);
        let mut writes = 0;
        for thread in self.threads.drain(..) {
            writes += thread.join().ok().context("a chain panicked")??;
        }
        Ok((writes, Duration::from_micros(self.slowest_us.load(Ordering::SeqCst))))
    }
}

impl Drop for Causal {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

/// The file of a chain.
#[must_use]
pub fn name(chain: usize) -> String {
    format!("chain-{chain}")
}

fn write(
    parts: &mut [Box<dyn Entries>],
    durable: bool,
    pause_us: u64,
    stop: &AtomicBool,
    slowest_us: &AtomicU64,
) -> Result<u64> {
    let machines = parts.len() as u64;
    let mut at = 0;
    while !stop.load(Ordering::SeqCst) && (at + 1) / machines < ENTRIES {
        at += 1;
        let begun = Instant::now();
        parts[(at % machines) as usize].write(at / machines, at, durable)?;
        slowest_us.fetch_max(begun.elapsed().as_micros() as u64, Ordering::SeqCst);
        if pause_us > 0 {
            thread::sleep(Duration::from_micros(pause_us));
        }
    }
    Ok(at)
}

/// Looks at the images of all machines of one point, in their order: each chain must hold its writes up to one, and none behind it. Answers how
/// many of each chain it holds.
pub fn check(images: &[PathBuf], chains: usize) -> Result<Vec<u64>> {
    let machines = images.len() as u64;
    // Nothing is replayed: a frozen file system is whole as it is.
    let mounted: Vec<Mounted> =
        images.iter().map(|image| Mounted::existing(FileSystem::Ext4, image, "ro")).collect::<Result<_>>()?;
    let mut all = vec![];
    for chain in 0..chains {
        let mut newest = vec![];
        for (machine, mounted) in mounted.iter().enumerate() {
            let bytes = fs::read(mounted.path().join(name(chain)))?;
            let entries = bytes.chunks_exact(ENTRY_BYTES as usize).map(|entry| {
                let mut number = [0; 8];
                number.copy_from_slice(entry);
                u64::from_le_bytes(number)
            });
            let mut last = 0;
            for (at, entry) in entries.enumerate() {
                let expected = at as u64 * machines + machine as u64;
                if expected == 0 {
                    continue;
                }
                ensure!(
                    entry == 0 || entry == expected,
                    "chain {chain}: entry {at} of machine {machine} is {entry}"
                );
                if entry != 0 {
                    let before = expected.saturating_sub(machines);
                    ensure!(
                        last == before || before == 0,
                        "chain {chain}: machine {machine} has {entry} and not {before}"
                    );
                    last = entry;
                }
            }
            newest.push(last);
        }
        let greatest = newest.iter().copied().max().unwrap_or_default();
        for (machine, last) in newest.iter().enumerate() {
            // The last one of this machine that lies before the greatest of all.
            let (greatest, machine, count) = (greatest as i64, machine as i64, machines as i64);
            let due = (greatest - (greatest - machine).rem_euclid(count)).max(0) as u64;
            ensure!(
                *last == due,
                "chain {chain}: write {greatest} is there, and of machine {machine} write {last} is the last, not {due}: {newest:?}"
            );
        }
        all.push(greatest);
    }
    Ok(all)
}
