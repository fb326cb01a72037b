//! File operations at random: what a file system's metadata sees in a day, in a second.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use crate::command;
use crate::random::Random;

/// The most files at one time; more would only make directories long.
const FILES_MAX: u64 = 200;
const FILE_BYTES_MAX: u64 = 256 << 10;

/// How often each operation was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Files made.
    pub creates: u64,
    /// Writes into files.
    pub writes: u64,
    /// Files renamed, also over others.
    pub renames: u64,
    /// Files cut or lengthened.
    pub truncates: u64,
    /// Files removed.
    pub unlinks: u64,
    /// Holes punched.
    pub punches: u64,
    /// Files synced.
    pub syncs: u64,
    /// Whole file system trimmed.
    pub trims: u64,
    /// Operations that found the file system full.
    pub full: u64,
}

impl Counts {
    /// All operations.
    pub fn total(&self) -> u64 {
        self.creates
            + self.writes
            + self.renames
            + self.truncates
            + self.unlinks
            + self.punches
            + self.syncs
            + self.trims
    }
}

/// Operations going on in the background until stopped; stopped and waited for when dropped.
pub struct Churn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Counts>>>,
}

impl Churn {
    /// Starts in a directory of its own below `dir`.
    pub fn start(dir: &Path, seed: u64) -> Result<Self> {
        let dir = dir.join(format!("churn-{seed}"));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut work = Work { dir, random: Random::new(seed), counts: Counts::default() };
            while !flag.load(Ordering::Relaxed) {
                work.step()?;
            }
            Ok(work.counts)
        });
        Ok(Churn { stop, thread: Some(thread) })
    }

    /// Stops it and tells what was done.
    pub fn stop(mut self) -> Result<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it is running")?;
        thread.join().map_err(|_| anyhow::anyhow!("the churn panicked"))?
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Does a number of operations and returns.
pub fn churn(dir: &Path, seed: u64, operations: u64) -> Result<Counts> {
    let dir = dir.join(format!("churn-{seed}"));
    fs::create_dir(&dir)?;
    let mut work = Work { dir, random: Random::new(seed), counts: Counts::default() };
    for _ in 0..operations {
        work.step()?;
    }
    Ok(work.counts)
}

struct Work {
    dir: PathBuf,
    random: Random,
    counts: Counts,
}

impl Work {
    fn step(&mut self) -> Result<()> {
        match self.operation() {
            Err(error) if is_full(&error) => {
                self.counts.full += 1;
                let file = self.file();
                fs::remove_file(file).ok();
                Ok(())
            }
            Err(error) if is_absent(&error) => Ok(()),
            done => done,
        }
    }

    fn operation(&mut self) -> Result<()> {
        let path = self.file();
        let offset = self.random.below(FILE_BYTES_MAX);
        match self.random.below(1000) {
            0..250 => {
                let mut data = vec![0; 1 + self.random.below(32 << 10) as usize];
                self.random.fill(&mut data);
                File::create(path)?.write_all(&data)?;
                self.counts.creates += 1;
            }
            250..550 => {
                let mut data = vec![0; 1 + self.random.below(16 << 10) as usize];
                self.random.fill(&mut data);
                File::options().write(true).open(path)?.write_all_at(&data, offset)?;
                self.counts.writes += 1;
            }
            550..650 => {
                fs::rename(path, self.file())?;
                self.counts.renames += 1;
            }
            650..750 => {
                File::options().write(true).open(path)?.set_len(offset)?;
                self.counts.truncates += 1;
            }
            750..870 => {
                fs::remove_file(path)?;
                self.counts.unlinks += 1;
            }
            870..950 => {
                let length = 4096 * (1 + self.random.below(16));
                punch(&File::options().write(true).open(path)?, offset, length)?;
                self.counts.punches += 1;
            }
            950..995 => {
                File::open(path)?.sync_all()?;
                self.counts.syncs += 1;
            }
            _ => {
                trim(&self.dir)?;
                self.counts.trims += 1;
            }
        }
        Ok(())
    }

    fn file(&mut self) -> PathBuf {
        self.dir.join(format!("f{}", self.random.below(FILES_MAX)))
    }
}

/// Frees a range of a file and keeps its length.
pub fn punch(file: &File, offset: u64, length: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; the other arguments are plain numbers.
    let result =
        unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as libc::off_t, length as libc::off_t) };
    nix::errno::Errno::result(result).map(drop).context("cannot punch a hole")
}

/// Discards what is free on the file system of a directory. A device that cannot discard is no error.
pub fn trim(dir: &Path) -> Result<()> {
    /// linux/fs.h: `struct fstrim_range`: start, length, least length.
    const EVERYTHING: [u64; 3] = [0, u64::MAX, 0];
    // _IOWR('X', 121, struct fstrim_range)
    const FITRIM: u32 = 0xC018_5879;
    let (root, mut range) = (File::open(dir)?, EVERYTHING);
    // SAFETY: the descriptor is open; the kernel reads and writes three words.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), FITRIM as libc::Ioctl, range.as_mut_ptr()) };
    match nix::errno::Errno::result(result) {
        Ok(_) | Err(nix::Error::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(error).context("cannot trim"),
    }
}

/// Discards a range of a device.
pub fn discard(device: &Path, offset: u64, length: u64) -> Result<()> {
    let (offset, length) = (offset.to_string(), length.to_string());
    let device = device.to_string_lossy();
    command::run("blkdiscard", &["--force", "--offset", &offset, "--length", &length, &*device]).map(drop)
}

/// fstrim wants the mount point itself.
fn errno(error: &anyhow::Error) -> Option<i32> {
    let io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    io.or_else(|| error.downcast_ref::<nix::Error>().map(|errno| *errno as i32))
}

fn is_full(error: &anyhow::Error) -> bool {
    errno(error) == Some(libc::ENOSPC)
}

fn is_absent(error: &anyhow::Error) -> bool {
    errno(error) == Some(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_operations() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        // Trimming depends on the machine's file system; this many operations of this seed hold every other kind.
        let counts = churn(a.path(), 5, 400).unwrap();
        assert_eq!(counts, churn(b.path(), 5, 400).unwrap());
        assert!(counts.creates > 0 && counts.writes > 0 && counts.renames > 0 && counts.unlinks > 0);
        assert!(counts.truncates > 0 && counts.punches > 0 && counts.syncs > 0, "{counts:?}");
    }
}
