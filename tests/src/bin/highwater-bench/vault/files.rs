//! Directories to measure in, and plain files: written, read past the cache, counted.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// On the disk that `/var/tmp` lies on. Goes when it is dropped.
pub fn on_disk() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("hwbench-").tempdir_in("/var/tmp")?)
}

/// In memory, where syncs cost nothing. Goes when it is dropped.
pub fn in_memory() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("hwbench-").tempdir_in("/dev/shm")?)
}

/// Writes a new file and syncs it; seconds.
pub fn write_and_sync<'a>(path: &Path, parts: impl Iterator<Item = &'a [u8]>) -> Result<f64> {
    let began = Instant::now();
    let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    for part in parts {
        file.write_all(part)?;
    }
    file.into_inner().context("the disk is full")?.sync_all()?;
    Ok(began.elapsed().as_secs_f64())
}

/// Copies a file and syncs the copy, which then goes; seconds.
pub fn copy_and_sync(from: &Path, to: &Path) -> Result<f64> {
    let began = Instant::now();
    fs::copy(from, to)?;
    File::open(to)?.sync_all()?;
    let seconds = began.elapsed().as_secs_f64();
    fs::remove_file(to)?;
    Ok(seconds)
}

/// Lets the kernel forget what it keeps of a file, or of all below a directory: the next read comes from the disk.
pub fn forget(path: &Path) -> Result<()> {
    if path.is_dir() {
        return fs::read_dir(path)?.try_for_each(|entry| forget(&entry?.path()));
    }
    let file = File::open(path)?;
    file.sync_all()?;
    // SAFETY: only advice about an open file; no memory is involved.
    let told = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    ensure!(told == 0, "posix_fadvise: {}", std::io::Error::from_raw_os_error(told));
    Ok(())
}

/// Files below a directory, and their bytes.
pub fn contents(path: &Path) -> Result<(u64, u64)> {
    if !path.exists() {
        return Ok((0, 0));
    }
    let mut sum = (0, 0);
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let (files, bytes) = match entry.file_type()?.is_dir() {
            true => contents(&entry.path())?,
            false => (1, entry.metadata()?.len()),
        };
        sum = (sum.0 + files, sum.1 + bytes);
    }
    Ok(sum)
}
