//! Reads blocks of a device with `O_DIRECT`, several at a time.
//!
//! Direct, because the block device's own page cache is not coherent with the filesystem's. Runs come out in no particular
//! order; a block is read once. **Limits:** a run is at most 1 MiB; the buffers of one reader never exceed its memory, so
//! a consumer that keeps buffers stops the reading, and one that has to keep much must be given a reader with as much memory
//! (small runs use small buffers). **Cancellation:** dropping the [`ReadJob`] stops it at the next run; a read that hangs in
//! the kernel keeps its own thread and buffer and nothing else.
//!
//! **Open only to read.** A reader holds the device open for as long as it or one of its jobs lives, and whoever wants to detach
//! a device finds it busy meanwhile: open one for a piece of work, and drop it. Opened read-only, so that udev sees no
//! change. What is opened is checked to be the disk that was meant, since numbers and paths are given to other devices.

mod buffer;

pub use buffer::{BUFFER_BYTES_MAX, Buffer, BufferPool};

use crate::{
    device::{BlockDevice, sysfs},
    error::Coded,
};
use highwater_delta::{BLOCK_BYTES, Block, BlockRange};
use nix::fcntl::OFlag;
use std::{
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use tokio::sync::mpsc;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Bad blocks after which a job ends: each may cost the disk's own long retries, and more would tell nothing new.
const BAD_BLOCKS_MAX: u64 = 16;
/// Blocks of a run.
const RUN_BLOCKS_MAX: u64 = BUFFER_BYTES_MAX as u64 / BLOCK;

/// Why blocks could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The device cannot be opened for direct reading.
    #[error("cannot open {path} for direct reading")]
    Open {
        /// The device.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The medium is bad here. Other blocks are still delivered, until there are too many of these.
    #[error("{path}: {} blocks from block {} on cannot be read", range.count, range.start)]
    BadBlocks {
        /// The device.
        path: PathBuf,
        /// The blocks, found one by one.
        range: BlockRange,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device has become smaller than what was asked for. Ends the job.
    #[error("{path} has shrunk to {size_bytes} bytes")]
    Shrunk {
        /// The device.
        path: PathBuf,
        /// Its size now.
        size_bytes: u64,
    },
    /// The machine has no memory, or no task left, for a thread that reads. Ends the job.
    #[error("{path} cannot be read: no thread could be started")]
    Busy {
        /// The device.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device is gone, or another one has its number. Ends the job.
    #[error("{path} is gone")]
    Gone {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl SourceError {
    /// Whether the job ended with it.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Self::BadBlocks { .. })
    }
}

impl Coded for SourceError {
    fn code(&self) -> u16 {
        match self {
            Self::Open { .. } => 1435,
            Self::BadBlocks { .. } => 1436,
            Self::Shrunk { .. } => 1437,
            Self::Gone { .. } => 1438,
            Self::Busy { .. } => 1439,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::Open { .. } => "Check that the device is there and that the agent runs as root.".into(),
            Self::BadBlocks { .. } => "The disk is failing: check `dmesg` and SMART, and replace it.".into(),
            Self::Shrunk { .. } => "Nothing: the new size is taken over with the next point.".into(),
            Self::Gone { .. } => "Attach the disk again: it is found by its identity.".into(),
            Self::Busy { .. } => {
                "It is tried again by itself. Free memory, or raise the limit of tasks (TasksMax of the unit).".into()
            }
        }
    }
}

/// How much a reader may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// Reads under way at once, each on its own thread.
    pub readers: usize,
    /// Memory of all its buffers.
    pub memory_bytes: usize,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { readers: 4, memory_bytes: 16 << 20 }
    }
}

/// Contiguous blocks and their content.
#[derive(Debug)]
pub struct ReadRun {
    /// Which blocks.
    pub range: BlockRange,
    /// Their content, `range.bytes()` long; behind the device's end zeros.
    pub buffer: Buffer,
}

/// Reads one device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SourceReader {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    direct: File,
    path: PathBuf,
    /// At opening; only its last, partial block depends on it.
    size_bytes: u64,
    pool: Arc<BufferPool>,
    readers: usize,
}

/// Reading under way. Dropping it cancels.
#[derive(Debug)]
pub struct ReadJob {
    results: mpsc::Receiver<Result<ReadRun, SourceError>>,
    cancelled: Arc<AtomicBool>,
}

impl ReadJob {
    /// The next run, in no particular order; `None` when all is read. A fatal error ends the job; a few runs that other threads
    /// had read already can still follow it, and count for nothing.
    pub async fn next(&mut self) -> Option<Result<ReadRun, SourceError>> {
        self.results.recv().await
    }
    /// The same for threads outside the runtime.
    pub fn next_blocking(&mut self) -> Option<Result<ReadRun, SourceError>> {
        self.results.blocking_recv()
    }
}

impl Drop for ReadJob {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

impl SourceReader {
    /// Opens a device for direct reading, with a memory of its own.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(device: &BlockDevice, options: SourceOptions) -> Result<Self, SourceError> {
        Self::open_with_pool(device, options.readers, BufferPool::new(options.memory_bytes))
    }

    /// The same with a memory shared among readers.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open_with_pool(
        device: &BlockDevice,
        readers: usize,
        pool: Arc<BufferPool>,
    ) -> Result<Self, SourceError> {
        let path = device.path.clone();
        let fail = |source| SourceError::Open { path: path.clone(), source };
        let gone =
            || SourceError::Gone { path: path.clone(), source: io::Error::from_raw_os_error(libc::ENXIO) };
        // Opening the node of some drivers makes the device anew.
        if !sysfs::is_there(device.dev) {
            return Err(gone());
        }
        let flags = (OFlag::O_DIRECT | OFlag::O_CLOEXEC).bits();
        let direct = match File::options().read(true).custom_flags(flags).open(&path) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV | libc::ENOENT)) => {
                return Err(gone());
            }
            opened => opened.map_err(fail)?,
        };
        if !is_same(&direct, device).map_err(fail)? {
            return Err(gone());
        }
        let size_bytes = size_of(&direct).map_err(fail)?;
        let shared = Shared { direct, path, size_bytes, pool, readers: readers.clamp(1, 256) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Its size at opening.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes
    }

    /// The device's size now.
    ///
    /// # Errors
    /// The device is gone.
    pub fn size_now(&self) -> Result<u64, SourceError> {
        size_of(&self.shared.direct)
            .map_err(|source| SourceError::Gone { path: self.shared.path.clone(), source })
    }

    /// Reads these ranges. Neighbouring ranges are read together.
    #[must_use]
    pub fn read_ranges<I>(&self, ranges: I) -> ReadJob
    where
        I: IntoIterator<Item = BlockRange>,
        I::IntoIter: Send + 'static,
    {
        let cancelled = Arc::new(AtomicBool::new(false));
        let bad_blocks = Arc::new(AtomicU64::new(0));
        let (sender, results) = mpsc::channel(self.shared.readers * 2);
        let runs = Arc::new(Mutex::new(Runs { ranges: ranges.into_iter(), rest: None }));
        let (mut started, mut tries) = (0, 0);
        while started < self.shared.readers {
            let shared = Arc::clone(&self.shared);
            let (runs, to) = (Arc::clone(&runs), sender.clone());
            let (cancelled, bad_blocks) = (Arc::clone(&cancelled), Arc::clone(&bad_blocks));
            let work = move || shared.work(&runs, &to, &cancelled, &bad_blocks);
            match std::thread::Builder::new().name("source".into()).spawn(work) {
                Ok(_) => started += 1,
                // Fewer do, where memory or a limit of tasks allows no more.
                Err(_) if started > 0 => break,
                Err(_) if tries < THREAD_TRIES => {
                    tries += 1;
                    std::thread::sleep(THREAD_RETRY);
                }
                Err(source) => {
                    let error = SourceError::Busy { path: self.shared.path.clone(), source };
                    // There is room for one.
                    let _ = sender.try_send(Err(error));
                    break;
                }
            }
        }
        ReadJob { results, cancelled }
    }
}

/// How often it is tried to start a thread that reads, and how long after.
const THREAD_TRIES: u32 = 50;
const THREAD_RETRY: std::time::Duration = std::time::Duration::from_millis(20);

/// Cuts and joins ranges into runs.
struct Runs<I> {
    ranges: I,
    rest: Option<BlockRange>,
}

impl<I: Iterator<Item = BlockRange>> Iterator for Runs<I> {
    type Item = BlockRange;
    fn next(&mut self) -> Option<BlockRange> {
        let mut run = self.rest.take().or_else(|| self.ranges.find(|range| range.count > 0))?;
        while run.count < RUN_BLOCKS_MAX {
            match self.ranges.find(|range| range.count > 0) {
                Some(next) if next.start.0 == run.end() => run.count += next.count,
                other => {
                    self.rest = other;
                    break;
                }
            }
        }
        if run.count > RUN_BLOCKS_MAX {
            // Nothing else was set aside: the loop above ended by the run's length.
            self.rest = Some(BlockRange::new(run.start.0 + RUN_BLOCKS_MAX, run.count - RUN_BLOCKS_MAX));
            run.count = RUN_BLOCKS_MAX;
        }
        Some(run)
    }
}

type Results = mpsc::Sender<Result<ReadRun, SourceError>>;

impl Shared {
    fn work<I: Iterator<Item = BlockRange>>(
        &self,
        runs: &Mutex<Runs<I>>,
        results: &Results,
        cancelled: &AtomicBool,
        bad_blocks: &AtomicU64,
    ) {
        let stop = || cancelled.load(Ordering::Relaxed) || results.is_closed();
        while !stop() {
            let Some(range) = runs.lock().unwrap_or_else(PoisonError::into_inner).next() else { return };
            if self.run(range, results, &stop, bad_blocks).is_none() {
                // A fatal error or a cancellation ends the other threads too.
                cancelled.store(true, Ordering::Relaxed);
                return;
            }
        }
    }

    /// `None` ends the job.
    fn run(
        &self,
        range: BlockRange,
        results: &Results,
        stop: &impl Fn() -> bool,
        bad_blocks: &AtomicU64,
    ) -> Option<()> {
        let bytes = usize::try_from(range.bytes()).ok()?;
        let mut buffer = self.pool.take(bytes, stop)?;
        match self.fill(range, &mut buffer) {
            Ok(()) => results.blocking_send(Ok(ReadRun { range, buffer })).ok(),
            Err(Failure::Medium(_)) if range.count > 1 => {
                drop(buffer);
                self.isolate(range, results, stop, bad_blocks)
            }
            Err(Failure::Medium(source)) => {
                let error = SourceError::BadBlocks { path: self.path.clone(), range, source };
                results.blocking_send(Err(error)).ok()?;
                (bad_blocks.fetch_add(1, Ordering::Relaxed) + 1 < BAD_BLOCKS_MAX).then_some(())
            }
            Err(Failure::Fatal(error)) => {
                // If nobody listens any more, the job ends all the same.
                let _ = results.blocking_send(Err(error));
                None
            }
        }
    }

    /// Block by block: one bad sector must not cost its neighbours.
    fn isolate(
        &self,
        range: BlockRange,
        results: &Results,
        stop: &impl Fn() -> bool,
        bad_blocks: &AtomicU64,
    ) -> Option<()> {
        (range.start.0..range.end()).try_for_each(|block| {
            let block = BlockRange { start: Block(block), count: 1 };
            if stop() { None } else { self.run(block, results, stop, bad_blocks) }
        })
    }

    fn fill(&self, range: BlockRange, buffer: &mut [u8]) -> Result<(), Failure> {
        let start = range.start.byte_offset();
        let mut size_bytes = self.size_bytes;
        if start + range.bytes() > size_bytes {
            // Perhaps it has grown since it was opened.
            size_bytes = size_of(&self.direct).map_or(size_bytes, |now| now.max(size_bytes));
        }
        let on_device = size_bytes.saturating_sub(start).min(range.bytes());
        if on_device == 0 || range.bytes() - on_device >= BLOCK {
            return Err(self.beyond_end());
        }
        let on_device = usize::try_from(on_device).unwrap_or(buffer.len());
        buffer[on_device..].fill(0);
        let mut done = 0;
        while done < on_device {
            let at = start + done as u64;
            match self.direct.read_at(&mut buffer[done..on_device], at) {
                Ok(0) => return Err(self.beyond_end()),
                Ok(read) => {
                    done += read;
                    // Direct reads continue at a multiple of 512 only; a device's end is one.
                    if done < on_device && !done.is_multiple_of(512) {
                        return Err(Failure::Medium(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.judge(error)),
            }
        }
        Ok(())
    }

    fn judge(&self, error: io::Error) -> Failure {
        match error.raw_os_error() {
            Some(libc::ENXIO | libc::ENODEV) => self.beyond_end(),
            _ if size_of(&self.direct).is_ok_and(|size| size < self.size_bytes) => self.beyond_end(),
            _ => Failure::Medium(error),
        }
    }

    fn beyond_end(&self) -> Failure {
        Failure::Fatal(match size_of(&self.direct) {
            // A detached loop device or an ejected medium has size 0.
            Ok(0) => SourceError::Gone {
                path: self.path.clone(),
                source: io::Error::from_raw_os_error(libc::ENXIO),
            },
            Ok(size_bytes) => SourceError::Shrunk { path: self.path.clone(), size_bytes },
            Err(source) => SourceError::Gone { path: self.path.clone(), source },
        })
    }
}

enum Failure {
    Medium(io::Error),
    Fatal(SourceError),
}

/// Whether this is the disk that was found under the device's name.
fn is_same(opened: &File, device: &BlockDevice) -> io::Result<bool> {
    let meta = opened.metadata()?;
    if !meta.file_type().is_block_device() || sysfs::split(meta.rdev()) != device.dev {
        return Ok(false);
    }
    Ok(match (device.diskseq, diskseq_of(opened)) {
        (Some(then), Some(now)) => then == now,
        // From before 5.15: nothing tells.
        _ => true,
    } && is_where_it_was(device))
}

/// A partition that was made anew elsewhere under the same number is another disk, and its table does not count as
/// another sequence of its device.
fn is_where_it_was(device: &BlockDevice) -> bool {
    let Ok(dir) = sysfs::dir(device.dev) else { return false };
    device.dev == device.whole || sysfs::read_u64(&dir, "start").is_ok_and(|s| s == device.start_sector)
}

/// `BLKGETDISKSEQ`; of a partition its disk's.
fn diskseq_of(file: &File) -> Option<u64> {
    const BLKGETDISKSEQ: libc::Ioctl = 0x8008_1280_u32 as libc::Ioctl;
    let mut seq = 0_u64;
    // SAFETY: the ioctl writes one u64, which we own.
    let answered = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETDISKSEQ, &raw mut seq) } == 0;
    answered.then_some(seq)
}

/// `BLKGETSIZE64`
fn size_of(file: &File) -> io::Result<u64> {
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
    let mut bytes = 0_u64;
    // SAFETY: the ioctl writes one u64, which we own.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } == 0 {
        return Ok(bytes);
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The runs are the ranges, cut at 1 MiB and joined where they touch.
        #[test]
        fn runs_cover_the_ranges(parts in prop::collection::vec((0_u64..5, 0_u64..700), 0..50)) {
            let mut at = 0;
            let mut ranges = Vec::new();
            for (gap, count) in parts {
                ranges.push(BlockRange::new(at + gap, count));
                at += gap + count;
            }
            let runs: Vec<BlockRange> = Runs { ranges: ranges.clone().into_iter(), rest: None }.collect();
            let blocks = |all: &[BlockRange]| all.iter().flat_map(|r| r.start.0..r.end()).collect::<Vec<_>>();
            prop_assert_eq!(blocks(&ranges), blocks(&runs));
            for run in &runs {
                prop_assert!(run.count >= 1 && run.count <= RUN_BLOCKS_MAX);
            }
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end() < pair[1].start.0 || pair[0].count == RUN_BLOCKS_MAX);
            }
        }
    }
}
