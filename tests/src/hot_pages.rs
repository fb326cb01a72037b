//! Pages that are written to while they are being written back, and files that are removed meanwhile: what no one can
//! capture exactly, because the writer changes it under way (see `free_space`).

use anyhow::{Context, Result};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Between two times that everything is written back: more often would be a storm of writes, which is another test's.
const PAUSE: Duration = Duration::from_millis(5);
/// Small files, so that each page is written to often.
const FILES: u64 = 4;
const FILE_BYTES: u64 = 16000;
/// Writes to a file before it is another's turn, and turns between removals.
const WRITES: u64 = 64;
const REMOVED_EVERY: u64 = 8;

/// Goes on in the background until stopped; stopped and waited for when dropped.
pub struct HotPages {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl HotPages {
    /// Starts below `dir`: one thread that writes, and one that has everything written back again and again.
    pub fn start(dir: &Path) -> Result<Self> {
        let dir = dir.join("hot");
        fs::create_dir(&dir)?;
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (flag, count, place) = (stop.clone(), writes.clone(), dir.clone());
        let writer = thread::spawn(move || {
            let mut turn = 0;
            while !flag.load(Ordering::Relaxed) {
                turn += 1;
                write(&place, turn)?;
                count.fetch_add(WRITES, Ordering::Relaxed);
            }
            Ok(())
        });
        let flag = stop.clone();
        let place = File::open(&dir)?;
        let syncer = thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                nix::unistd::syncfs(&place)?;
                thread::sleep(PAUSE);
            }
            Ok(())
        });
        Ok(Self { stop, writes, threads: vec![writer, syncer] })
    }

    /// Stops it and tells how many writes there were.
    pub fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok().context("it panicked")??;
        }
        Ok(self.writes.load(Ordering::Relaxed))
    }
}

fn write(dir: &Path, turn: u64) -> Result<()> {
    let path = dir.join(format!("f{}", turn % FILES));
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    for number in 0..WRITES {
        let at = (turn * 37 + number * 1000) % FILE_BYTES;
        file.write_all_at(&[(turn * WRITES + number) as u8; 100], at)?;
    }
    if (turn / FILES).is_multiple_of(REMOVED_EVERY) {
        fs::remove_file(&path)?;
    }
    Ok(())
}

impl Drop for HotPages {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}
