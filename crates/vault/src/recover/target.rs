//! Files and block devices to recover to.

use super::place::directory_place;
use crate::{Result, VaultError, hint};
use highwater_delta::BLOCK_BYTES;
use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom},
    ops::Range,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Behind the name of a file that is being written.
const PARTIAL: &str = ".partial";
/// Behind the name of a file that is not all there.
const DAMAGED: &str = ".damaged";

/// Windows that may be on their way to the disk.
const BEHIND_MAX: usize = 8;

/// Where to recover to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A raw file that does not exist yet.
    File(PathBuf),
    /// A block device that is not in use.
    Device(PathBuf),
}

impl Target {
    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Device(path) => path,
        }
    }

    /// Whether it can be written now, without changing anything: for the plan shown to the operator.
    pub fn check(&self, size_bytes: u64) -> Result<()> {
        match self {
            Self::File(path) => {
                for path in [path.clone(), with_end(path, DAMAGED)] {
                    if path.symlink_metadata().is_ok() {
                        return Err(VaultError::target(&path, "it exists already"));
                    }
                }
                let dir = parent(path);
                directory_place(dir)?;
                if !dir.is_dir() { Err(VaultError::target(dir, "it is no directory")) } else { Ok(()) }
            }
            Self::Device(path) => open_device(path, size_bytes).map(drop),
        }
    }
}

/// An open target.
pub(super) struct OpenTarget {
    file: File,
    path: PathBuf,
    /// The name that a finished file gets.
    final_path: Option<PathBuf>,
    finished: AtomicBool,
    /// On their way to the disk, oldest first.
    behind: Mutex<VecDeque<Range<u64>>>,
}

impl Drop for OpenTarget {
    /// An unfinished file goes, also when the recovery is interrupted. A device stays as it is.
    fn drop(&mut self) {
        if self.final_path.is_some() && !self.finished.load(Ordering::Relaxed) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl OpenTarget {
    pub(super) fn open(target: &Target, size_bytes: u64) -> Result<Self> {
        target.check(size_bytes)?;
        match target {
            Target::File(final_path) => {
                let path = with_end(final_path, PARTIAL);
                // What an interrupted recovery left under this name is worth nothing.
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .custom_flags(libc::O_NOFOLLOW)
                    .open(&path)
                    .and_then(|file| file.set_len(size_bytes).map(|()| file))
                    .map_err(|e| VaultError::io(&path, e))?;
                Ok(Self {
                    file,
                    path,
                    final_path: Some(final_path.clone()),
                    finished: AtomicBool::new(false),
                    behind: Mutex::default(),
                })
            }
            Target::Device(path) => Ok(Self {
                file: open_device(path, size_bytes)?,
                path: path.clone(),
                final_path: None,
                finished: AtomicBool::new(false),
                behind: Mutex::default(),
            }),
        }
    }

    /// Makes the target hold `content` at `offset`; how many bytes had to be written.
    pub(super) fn put(&self, offset: u64, content: &[u8], write_all: bool) -> Result<u64> {
        let failed = |e| VaultError::io(&self.path, e);
        let mut written = 0;
        if self.final_path.is_some() {
            // A new file: holes are zeros already.
            for (at, run) in runs(content, |_, block| block.iter().any(|b| *b != 0)) {
                self.file.write_all_at(run, offset + at as u64).map_err(failed)?;
                written += run.len() as u64;
            }
        } else if write_all {
            self.file.write_all_at(content, offset).map_err(failed)?;
            written = content.len() as u64;
        } else {
            let mut present = vec![0; content.len()];
            self.file.read_exact_at(&mut present, offset).map_err(failed)?;
            for (at, run) in runs(content, |at, block| present[at..at + block.len()] != *block) {
                self.file.write_all_at(run, offset + at as u64).map_err(failed)?;
                written += run.len() as u64;
            }
        }
        if written > 0 {
            // A failure that is seen here, the sync at the end does not tell again.
            self.write_out(offset..offset + content.len() as u64).map_err(failed)?;
        }
        Ok(written)
    }

    /// Has the disk begin with what was written just now, and gives the memory back of what was long before.
    fn write_out(&self, part: Range<u64>) -> std::io::Result<()> {
        hint::begin(&self.file, &part)?;
        let before = {
            let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
            behind.push_back(part);
            if behind.len() > BEHIND_MAX { behind.pop_front() } else { None }
        };
        before.map_or(Ok(()), |before| hint::give_back(&self.file, &before))
    }

    /// Syncs; a file gets its name, or one that says that it is not whole. Answers that.
    pub(super) fn finish(&self, whole: bool) -> Result<PathBuf> {
        self.file.sync_all().map_err(|e| VaultError::io(&self.path, e))?;
        let Some(final_path) = &self.final_path else { return Ok(self.path.clone()) };
        let final_path = &if whole { final_path.clone() } else { with_end(final_path, DAMAGED) };
        let failed = |e| VaultError::io(final_path, e);
        // A link refuses a name that came to exist meanwhile; where there are no links, a rename must do.
        match fs::hard_link(&self.path, final_path) {
            Ok(()) => fs::remove_file(&self.path).map_err(failed)?,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(VaultError::target(final_path, "it exists already"));
            }
            Err(_) => fs::rename(&self.path, final_path).map_err(failed)?,
        }
        self.finished.store(true, Ordering::Relaxed);
        File::open(parent(final_path)).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok(final_path.clone())
    }
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    PathBuf::from(name)
}

fn open_device(path: &Path, size_bytes: u64) -> Result<File> {
    let meta = path.metadata().map_err(|e| VaultError::io(path, e))?;
    if !meta.file_type().is_block_device() {
        return Err(VaultError::target(path, "it is no block device"));
    }
    // O_EXCL on a block device: the kernel refuses one that is mounted, held by another (LVM, md, dm), or used as
    // swap, also through its partitions; no one can take it while it is open.
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
    let mut file = match opened {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Err(VaultError::target(path, format!("it is in use{}", users(meta.rdev()))));
        }
        other => other.map_err(|e| VaultError::io(path, e))?,
    };
    let has = file.seek(SeekFrom::End(0)).map_err(|e| VaultError::io(path, e))?;
    if has < size_bytes {
        return Err(VaultError::target(path, format!("it has {has} bytes; {size_bytes} are needed")));
    }
    Ok(file)
}

/// Who uses a device, as far as it can be told, for people.
fn users(device: u64) -> String {
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<String> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            (fields.next()? == number).then(|| fields.nth(1).map(|at| format!("mounted at {at}")))?
        })
        .collect();
    if let Ok(holders) = fs::read_dir(format!("/sys/dev/block/{number}/holders")) {
        found.extend(holders.flatten().map(|h| format!("held by {}", h.file_name().to_string_lossy())));
    }
    if found.is_empty() { String::new() } else { format!(" ({})", found.join(", ")) }
}

/// Runs of blocks for which `wanted` says yes, with their offsets.
fn runs(content: &[u8], wanted: impl Fn(usize, &[u8]) -> bool) -> Vec<(usize, &[u8])> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (index, block) in content.chunks(BLOCK_BYTES).enumerate() {
        let at = index * BLOCK_BYTES;
        if wanted(at, block) {
            match found.last_mut() {
                Some((_, end)) if *end == at => *end = at + block.len(),
                _ => found.push((at, at + block.len())),
            }
        }
    }
    found.into_iter().map(|(from, to)| (from, &content[from..to])).collect()
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
