//! Tracking and capture in this process, without a collector: what the programs put into the ring is read, assembled, sealed every
//! second or when memory runs short, and dropped. Sealing and epochs go as the agent's do.
//!
//! Where the stream lacks something, capture begins anew at once; the agent would wait. What was lacking is told.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use highwater_agent::capture::assemble::CapturedDisk;
use highwater_agent::capture::pool::BlockPool;
use highwater_agent::capture::{CaptureError, Layout, Loss, Ring, StreamPosition, StreamReader, Tap};
use highwater_agent::config::Capture;
use highwater_agent::device::{self, BlockDevice, Hook};
use highwater_agent::source::BufferPool;
use highwater_agent::tracker::barrier::Barrier;
use highwater_agent::tracker::probe::Kernel;
use highwater_agent::tracker::{Beside, Options, Tracker};
use highwater_delta::DiskId;
use highwater_tests::Arena;

use crate::cpu;

const SEAL_EVERY: Duration = Duration::from_secs(1);
const SEAL_MAX: Duration = Duration::from_secs(5);
const EXPLAIN_MAX: Duration = Duration::from_secs(10);
/// Those of the reader of the stream, by name.
pub const READER: [&str; 2] = ["stream", "stream-blocks"];
/// Ours, and those of the reader.
const THREADS: [&str; 3] = [KEEPER, READER[0], READER[1]];
const KEEPER: &str = "keeper";
/// Who passes over the stream.
const PASSING: &str = "passing";
const PASS_EVERY: Duration = Duration::from_millis(2);
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// For reading the rest of blocks that were written in part.
const FETCH_BYTES: usize = 1 << 20;

/// What is done about the writes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Nothing.
    None,
    /// They are tracked.
    Bitmap,
    /// They are tracked, and captured in order; the stream is passed over. What the programs alone cost.
    Passed,
    /// They are tracked, and captured in order.
    Ordered,
}

impl Way {
    /// All of them; the first is what the others are compared with.
    pub const ALL: [Way; 4] = [Way::None, Way::Bitmap, Way::Passed, Way::Ordered];
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Told {
    /// Times that the stream lacked something.
    pub losses: u64,
    /// Records that were dropped because the ring was full.
    pub dropped: u64,
    /// Times that no position could be sealed.
    pub unsealed: u64,
    /// Batches that were sealed.
    pub sealed: u64,
    /// Processor time of this process's threads that read, assemble and seal, seconds.
    pub cpu_s: f64,
    /// Words of bits that were marked.
    marked: u64,
}

impl Told {
    /// Both together.
    pub fn add(&mut self, other: Told) {
        self.losses += other.losses;
        self.dropped += other.dropped;
        self.unsealed += other.unsealed;
        self.sealed += other.sealed;
        self.cpu_s += other.cpu_s;
        self.marked += other.marked;
    }
}

/// At work; the programs are gone from the kernel when this is dropped.
pub struct Working {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Told>>>,
}

impl Working {
    /// Begins; the programs are at work on return.
    pub fn start(arena: &Arena, device: &Path, way: Way) -> Result<Option<Self>> {
        if way == Way::None {
            return Ok(None);
        }
        let (mut tracker, _) = Tracker::open(Options {
            bpf_dir: arena.bpf_dir().to_path_buf(),
            run_dir: arena.dir().join("run-alone"),
            copies: None,
            net: true,
            bits_max: 1 << 28,
        })?;
        let device = device::inspect(device)?;
        let disk = DiskId::new();
        // From here on its drop detaches it.
        let protected = tracker.protect(disk, &device);
        let mut keeper =
            Keeper { tracker: Some(tracker), stream: None, passing: None, told: Told::default() };
        protected?;
        match way {
            Way::None | Way::Bitmap => {}
            Way::Passed => keeper.passing = Some(Passing::begin(&device)?),
            Way::Ordered => keeper.stream = Some(Stream::begin(disk, device)?),
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name(KEEPER.into()).spawn(move || keeper.keep(&stopped))?;
        Ok(Some(Self { stop, thread: Some(thread) }))
    }

    /// Ends it.
    pub fn stop(mut self) -> Result<Told> {
        self.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return Ok(Told::default()) };
        let told = thread.join().map_err(|_| anyhow!("the thread that seals has panicked"))??;
        ensure!(told.marked > 0, "the disk was written to and nothing was marked");
        Ok(told)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("bench: {error:#}");
        }
    }
}

/// Who ends epochs and seals.
struct Keeper {
    tracker: Option<Tracker>,
    stream: Option<Stream>,
    passing: Option<Passing>,
    told: Told,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        (self.stream, self.passing) = (None, None);
        if let Some(Err(error)) = self.tracker.take().map(Tracker::detach) {
            eprintln!("bench: {error}");
        }
    }
}

impl Keeper {
    fn keep(mut self, stop: &AtomicBool) -> Result<Told> {
        let mut next = Instant::now() + SEAL_EVERY;
        loop {
            let ending = stop.load(Ordering::Acquire);
            let pressed = self.stream.as_ref().is_some_and(|stream| stream.reader.is_pressed());
            if ending || pressed || Instant::now() >= next {
                next = Instant::now() + SEAL_EVERY;
                self.seal_and_end_epoch()?;
            }
            if ending {
                self.told.dropped += self.passing.take().map(Passing::end).transpose()?.unwrap_or(0);
                // All of them are gone a moment later, and none of an earlier one lives.
                self.told.cpu_s = cpu::threads(Path::new("/proc/self"), &THREADS)?;
                return Ok(self.told);
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    fn seal_and_end_epoch(&mut self) -> Result<()> {
        let Self { tracker, stream, told, .. } = self;
        let tracker = tracker.as_mut().ok_or_else(|| anyhow!("tracking has ended"))?;
        let Some(stream) = stream else {
            let end = tracker.end_epoch(|_, _, _| told.marked += 1)?;
            ensure!(end.faults.is_empty(), "{:?}", end.faults);
            return Ok(());
        };
        match stream.reader.seal(stream.covered_to, SEAL_MAX) {
            Some(_) => told.sealed += 1,
            None => told.unsealed += 1,
        }
        // What the agent would read again.
        drop(stream.reader.take_again());
        let mut window = Window { tap: &mut stream.tap, begun: Ok(()), loss: Ok(None) };
        let end = tracker.end_epoch_beside(|_, _, _| told.marked += 1, &mut window)?;
        ensure!(end.faults.is_empty(), "{:?}", end.faults);
        window.begun?;
        let loss = window.loss?;
        if let Some(loss) = loss {
            told.losses += 1;
            if let Loss::Overflow(records) = loss {
                told.dropped += records;
            }
            return stream.again();
        }
        let position = stream.reader.position();
        if stream.reader.explain(position, EXPLAIN_MAX).is_none() {
            told.losses += 1;
            return stream.again();
        }
        stream.covered_to = position;
        Ok(())
    }
}

struct Window<'t> {
    tap: &'t mut Tap,
    begun: Result<(), CaptureError>,
    loss: Result<Option<Loss>, CaptureError>,
}

impl Beside for Window<'_> {
    fn before(&mut self) {
        self.begun = self.tap.before();
    }
    fn after(&mut self) {
        self.loss = self.tap.after();
    }
}

/// Capture of one disk of which nothing is kept.
struct Passing {
    tap: Tap,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Passing {
    fn begin(device: &BlockDevice) -> Result<Self> {
        let (mut tap, mut ring, barrier) = load(device)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name(PASSING.into()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                ring.skip_all();
                thread::sleep(PASS_EVERY);
            }
        })?;
        tap.begin([device.whole_kernel_dev()], &barrier)?;
        Ok(Self { tap, stop, thread: Some(thread) })
    }

    /// Answers how many records were dropped.
    fn end(self) -> Result<u64> {
        Ok(self.tap.counters()?.dropped)
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.tap.end();
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The programs with a ring of the usual size, ready to begin.
fn load(device: &BlockDevice) -> Result<(Tap, Ring, Barrier)> {
    let kernel = Kernel::probe()?;
    let layout = Layout::of(&kernel)?;
    let barrier = Barrier::new(kernel.preemptible_tracepoints)?;
    let (mut tap, mut ring) = Tap::load(layout, None, Capture::default().options().ring_bytes)?;
    tap.prepare(&mut ring, device)?;
    Ok((tap, ring, barrier))
}

/// Capture of one disk.
struct Stream {
    tap: Tap,
    reader: StreamReader,
    barrier: Barrier,
    disk: DiskId,
    device: BlockDevice,
    covered_to: StreamPosition,
}

impl Stream {
    fn begin(disk: DiskId, device: BlockDevice) -> Result<Self> {
        let (tap, ring, barrier) = load(&device)?;
        let pool = BlockPool::new(Capture::default().options().buffer_bytes);
        let reader = StreamReader::start(ring, pool, BufferPool::new(FETCH_BYTES))?;
        let covered_to = reader.position();
        let mut stream = Self { tap, reader, barrier, disk, device, covered_to };
        stream.again()?;
        Ok(stream)
    }

    /// From here on.
    fn again(&mut self) -> Result<()> {
        self.tap.end();
        self.reader.end();
        let captured = CapturedDisk {
            id: self.disk,
            dev: self.device.whole_kernel_dev(),
            start: self.device.start_sector * 512,
            bytes: self.device.size_bytes,
            by_bio: self.device.hook == Hook::Bio,
            skip: vec![],
        };
        self.reader.begin(vec![captured], [(self.disk, self.device.clone())].into());
        self.tap.begin([self.device.whole_kernel_dev()], &self.barrier)?;
        self.covered_to = self.reader.position();
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.tap.end();
        self.reader.end();
    }
}
