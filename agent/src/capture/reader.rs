//! The thread that takes records out of the ring, and the one that reads what the stream tells in part only.
//!
//! **Nobody wakes the reader**, since a wake-up for each record would cost as much as the record: it looks every 100 µs while there
//! is much, and ever more rarely, down to a hundred times a second, while there is little or nothing. Without a stream to
//! assemble it sleeps.
//!
//! **Sealing.** A position that can be sealed comes by itself, unless blocks are written in part all the time: then the rest of some
//! block is being read at any moment. Whoever waits for a position makes the reader stop at the next one that waits for
//! reads only; what came while they lasted is still in the ring, and if none of it changes what was read, the position is clean.
//!
//! **Memory.** Records are taken as long as the pool has room ([`BlockPool`]). Then they stay in the ring, and when that is
//! full the programs drop what comes, and count it: the stretch is not believed, nothing is lost. [`StreamReader::is_pressed`]
//! says in time that something should be sealed.
//!
//! The threads end when this is dropped.

use super::{
    assemble::{Again, Assembler, Broken, Captured, CapturedDisk, Figures, Ranges, Sealed, Tick, Wanted},
    moments::Moments,
    pool::BlockPool,
    record,
    ring::{Producer, Ring, StreamPosition},
};
use crate::{
    device::{self, BlockDevice, DevNumber},
    source::{BufferPool, SourceError, SourceReader},
};
use highwater_delta::{BLOCK_BYTES, BlockRange, DiskId};
use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Between looks while there is something.
const POLL: Duration = Duration::from_micros(100);
/// Between looks when there has been nothing for a while.
const POLL_IDLE: Duration = Duration::from_millis(10);
/// A ring is not to be left alone for longer than writes of 4 GB a second need to fill it.
const FILL_BYTES_PER_NS: u64 = 4;
/// Bytes taken out of the ring before others may look at what came of it.
const BURST_BYTES: usize = 1 << 20;
/// Reads of single blocks under way at once.
const READERS: usize = 4;
/// Blocks apart so far are read at once: one long read costs less than several short ones.
const GAP_BLOCKS: u64 = 31;
/// The longest record.
const RECORD_BYTES_MAX: usize = 65536;
/// A write that was not seen to complete for so long is taken to be over, and read again.
const COMPLETION_MS_MAX: Tick = 3000;
/// When nothing has come for so long, it is looked whether anything is in flight at all.
const REST_MS: Tick = 3;
/// How often that is looked for.
const AGE_EVERY_MS: Tick = 500;
/// Part of the pool that may be in use before something should be sealed.
const PRESSED_PERCENT: u64 = 50;

/// A moment by two clocks: one that may be set, and one that may stand still.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    at: Instant,
    wall: SystemTime,
}

impl Moment {
    fn now() -> Self {
        Self { at: Instant::now(), wall: SystemTime::now() }
    }
    /// Milliseconds since 1970: the earlier of what it said then, and of what follows from now.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        let then = SystemTime::now().checked_sub(self.at.elapsed()).unwrap_or(UNIX_EPOCH).min(self.wall);
        then.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
    }
}

struct State {
    /// What is assembled, while there is a stream.
    assembler: Option<Assembler>,
    /// Which assembler: answers to questions of an earlier one are not its.
    generation: u64,
    /// A stream is to begin with these disks.
    begin: Option<Vec<CapturedDisk>>,
    /// The whole devices that are captured.
    devices: Vec<DevNumber>,
    /// Somebody waits for a position that can be sealed, at least so far.
    wanted: Option<StreamPosition>,
    /// When the stream was where.
    moments: Moments<Moment>,
    /// The rest of a block could not be read.
    broken: Option<(DiskId, SourceError)>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    pool: Arc<BlockPool>,
    producer: Producer,
    began: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn now(&self) -> Tick {
        self.began.elapsed().as_millis() as Tick
    }
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// See the module.
pub struct StreamReader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    devices: Sender<Order>,
}

/// For the thread that reads blocks.
enum Order {
    /// Where disks are from now on.
    Devices(BTreeMap<DiskId, BlockDevice>),
    /// The rest of these blocks is wanted.
    Read(u64, Vec<Wanted>),
}

impl StreamReader {
    /// Starts the threads; nothing is assembled yet.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(ring: Ring, pool: Arc<BlockPool>, buffers: Arc<BufferPool>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                assembler: None,
                generation: 0,
                begin: None,
                devices: vec![],
                wanted: None,
                moments: Moments::default(),
                broken: None,
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            pool,
            producer: ring.producer(),
            began: Instant::now(),
        });
        let (orders, fetch) = channel();
        let (of_reader, of_fetcher, wanted) = (shared.clone(), shared.clone(), orders.clone());
        let reader = std::thread::Builder::new()
            .name("stream".into())
            .spawn(move || read(&of_reader, ring, &wanted))?;
        let fetcher = std::thread::Builder::new()
            .name("stream-blocks".into())
            .spawn(move || serve(&of_fetcher, &fetch, &buffers));
        let mut reader = Self { shared, threads: vec![reader], devices: orders };
        reader.threads.push(fetcher?);
        Ok(reader)
    }

    /// Passes over what is in the ring, and assembles what comes from now on. Before capture begins.
    pub fn begin(&self, disks: Vec<CapturedDisk>, devices: BTreeMap<DiskId, BlockDevice>) {
        let whole = devices.values().map(|device| device.whole).collect();
        let _ = self.devices.send(Order::Devices(devices));
        let mut state = self.shared.lock();
        state.devices = whole;
        state.begin = Some(disks);
        state.broken = None;
        self.shared.changed.notify_all();
        while state.begin.is_some() && !self.shared.stopped() && !self.has_ended() {
            state = self.wait(state, Duration::from_millis(100));
        }
    }

    /// Assembles nothing any more; all memory of it is given back.
    pub fn end(&self) {
        let mut state = self.shared.lock();
        state.assembler = None;
        state.begin = None;
        state.generation += 1;
        drop(state);
        self.shared.pool.trim();
    }

    /// Whether one of the threads has ended, which only a bug or a want of memory brings about: the reader is of no use any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    fn wait<'g>(&self, state: MutexGuard<'g, State>, most: Duration) -> MutexGuard<'g, State> {
        self.shared.changed.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// The end of the stream now.
    #[must_use]
    pub fn position(&self) -> StreamPosition {
        self.shared.producer.position()
    }
    /// The ring.
    #[must_use]
    pub fn producer(&self) -> &Producer {
        &self.shared.producer
    }
    /// Memory of what is assembled.
    #[must_use]
    pub fn pool(&self) -> &BlockPool {
        &self.shared.pool
    }

    /// Whether much of the memory is in use: something should be sealed and sent.
    #[must_use]
    pub fn is_pressed(&self) -> bool {
        self.shared.pool.used_bytes() * 100 >= self.shared.pool.limit_bytes() * PRESSED_PERCENT
    }

    /// Whether a disk could not be read when the rest of a block was wanted.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared.lock().broken.is_some()
    }
    /// A disk that could not be read when the rest of a block was wanted.
    pub fn take_broken(&self) -> Option<(DiskId, SourceError)> {
        self.shared.lock().broken.take()
    }

    /// What leads to a position that is `at_least` so far, and a moment by which all that was submitted lies before it; waits until
    /// there is one. `None`: there was none in that time, or nothing is assembled.
    #[must_use]
    pub fn seal(&self, at_least: StreamPosition, most: Duration) -> Option<(Sealed, Moment)> {
        self.shared.lock().wanted = Some(at_least);
        let sealed = self.until(most, |assembler| assembler.seal(at_least));
        let mut state = self.shared.lock();
        state.wanted = None;
        let sealed = sealed.and_then(|sealed| {
            let moment = state.moments.of(sealed.position)?;
            state.moments.forget_before(sealed.position);
            Some((sealed, moment))
        });
        if let (None, Some(assembler)) = (&sealed, &state.assembler) {
            let (unfinished, reading, unasked) = assembler.waits_for();
            let applied = assembler.applied();
            tracing::debug!(?at_least, clean = ?assembler.clean(), ?applied, until = ?assembler.all_read(), end = ?self.position(),
                unfinished, reading, unasked, room = self.shared.pool.room(), "no position could be sealed");
        }
        drop(state);
        sealed
    }

    /// How long ago everything was submitted that the last position has which could be sealed now.
    #[must_use]
    pub fn clean_age(&self) -> Option<Duration> {
        let state = self.shared.lock();
        let clean = state.assembler.as_ref()?.clean();
        state.moments.of(clean).map(|moment| moment.at.elapsed())
    }

    /// Which blocks explain the bits of an epoch that ended when the stream was at this position.
    #[must_use]
    pub fn explain(&self, at_least: StreamPosition, most: Duration) -> Option<Vec<(DiskId, Captured)>> {
        self.until(most, |assembler| (assembler.applied() >= at_least).then(|| assembler.explain()))
    }

    fn until<T>(&self, most: Duration, mut done: impl FnMut(&mut Assembler) -> Option<T>) -> Option<T> {
        let until = Instant::now() + most;
        let mut state = self.shared.lock();
        loop {
            if state.broken.is_some() {
                return None;
            }
            if let Some(answer) = done(state.assembler.as_mut()?) {
                return Some(answer);
            }
            let left = until.checked_duration_since(Instant::now())?;
            state = self.wait(state, left.min(POLL_IDLE));
        }
    }

    /// See [`Assembler::take_again`].
    #[must_use]
    pub fn take_again(&self) -> Vec<(DiskId, Again)> {
        self.shared.lock().assembler.as_mut().map(Assembler::take_again).unwrap_or_default()
    }
    /// See [`Assembler::take_again_frozen`].
    #[must_use]
    pub fn take_again_frozen(&self) -> Vec<(DiskId, Again)> {
        self.shared.lock().assembler.as_mut().map(Assembler::take_again_frozen).unwrap_or_default()
    }
    /// See [`Assembler::broken`].
    #[must_use]
    pub fn gave_up(&self) -> Option<Broken> {
        self.shared.lock().assembler.as_ref().and_then(Assembler::broken)
    }
    /// See [`Assembler::is_lacking`].
    #[must_use]
    pub fn is_lacking(&self, before: StreamPosition) -> bool {
        self.shared.lock().assembler.as_ref().is_some_and(|assembler| assembler.is_lacking(before))
    }
    /// See [`Assembler::doubtful`].
    #[must_use]
    pub fn doubtful(&self) -> usize {
        self.shared.lock().assembler.as_ref().map_or(0, Assembler::doubtful)
    }
    /// See [`Assembler::will_read`].
    pub fn will_read(&self, disk: DiskId, ranges: &[BlockRange]) {
        if let Some(assembler) = &mut self.shared.lock().assembler {
            assembler.will_read(disk, ranges);
        }
    }
    /// See [`Assembler::forget`].
    pub fn forget(&self, disk: DiskId, ranges: &[BlockRange]) {
        if let Some(assembler) = &mut self.shared.lock().assembler {
            assembler.forget(disk, ranges);
        }
    }
    /// See [`Assembler::set_skip`].
    pub fn set_skip(&self, disk: DiskId, skip: Vec<BlockRange>) {
        if let Some(assembler) = &mut self.shared.lock().assembler {
            assembler.set_skip(disk, skip);
        }
    }
    /// What has happened since the stream began.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.shared.lock().assembler.as_ref().map(Assembler::figures).unwrap_or_default()
    }
    /// The content of the last page that was read back, waiting for it.
    #[must_use]
    pub fn probed(&self, most: Duration) -> Option<Vec<u8>> {
        self.until(most, Assembler::take_probed)
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.changed.notify_all();
        // Ends the fetcher: the reader's own end of the channel goes with its thread.
        self.devices = channel().0;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The stream's thread.
fn read(shared: &Shared, mut ring: Ring, fetch: &Sender<Order>) {
    let mut pause = POLL;
    let longest =
        Duration::from_nanos(shared.producer.size_bytes() / FILL_BYTES_PER_NS).clamp(POLL, POLL_IDLE);
    let (mut aged, mut drained, mut quiet_since) = (0, 0, 0);
    let mut gone_on_to = StreamPosition::default();
    while !shared.stopped() {
        let mut state = shared.lock();
        if let Some(disks) = state.begin.take() {
            ring.skip_all();
            state.generation += 1;
            state.assembler = Some(Assembler::new(shared.pool.clone(), disks, ring.position()));
            state.moments = Moments::default();
            state.moments.note(Moment::now(), ring.position());
            shared.changed.notify_all();
        }
        let (generation, sealing) = (state.generation, state.wanted);
        let parts = &mut *state;
        let Some(assembler) = parts.assembler.as_mut() else {
            ring.skip_all();
            let _unused = shared.changed.wait_timeout(state, Duration::from_secs(1));
            continue;
        };
        let (moment, now) = (Moment::now(), shared.now());
        parts.moments.note(moment, shared.producer.position());
        // Where it did not help to stop, it is gone on to where the reads had been over.
        let stop_at =
            sealing.map(|wanted| wanted.max(gone_on_to)).filter(|_| assembler.clean() < assembler.applied());
        let taken = burst(assembler, &mut ring, now, stop_at);
        if taken > 0 {
            quiet_since = now;
        }
        if stop_at.is_some()
            && now >= quiet_since + REST_MS
            && assembler.applied() == shared.producer.position()
        {
            // Where nothing is in flight, nothing has to be waited for whose completion was not shown.
            // Where the kernel does not count, it always seems so.
            let rests = |dev: &DevNumber| {
                device::iostats_on(*dev).unwrap_or(false)
                    && device::inflight(*dev).is_ok_and(|(_, writes)| writes == 0)
            };
            if parts.devices.iter().all(rests) {
                assembler.rest(now);
            }
        }
        let stopped = stop_at.is_some_and(|at| assembler.applied() >= at) && assembler.waits_for_reads_only();
        if stopped && let Some(until) = assembler.all_read() {
            match is_untouched(assembler, &mut ring, until) {
                Some(true) => assembler.settle_here(),
                Some(false) => gone_on_to = until,
                None => {}
            }
        }
        if assembler.applied() == shared.producer.position() {
            drained = now;
        }
        if now >= aged + AGE_EVERY_MS {
            // What completed since the ring was empty last may still lie in it.
            assembler.age(now, (now - drained) + COMPLETION_MS_MAX);
            aged = now;
        }
        let wanted = assembler.take_wanted();
        if !wanted.is_empty() {
            let _ = fetch.send(Order::Read(generation, wanted));
        }
        shared.changed.notify_all();
        if stopped && assembler.all_read().is_none() {
            // Until what was asked for has been read; what was taken before lies in the assembler.
            ring.release();
            let _unused = shared.changed.wait_timeout(state, POLL_IDLE);
            continue;
        }
        drop(state);
        ring.release();
        if taken >= BURST_BYTES {
            pause = POLL;
            continue;
        }
        std::thread::sleep(pause);
        // The less there was, the rarer it is looked; somebody who waits is not to wait for that.
        pause = if sealing.is_some() || taken > BURST_BYTES / 4 { POLL } else { (pause * 2).min(longest) };
    }
}

/// Takes records out of the ring while there are some and there is room; answers their bytes. Stops at a position behind
/// `stop_at` that waits for nothing but reads of blocks.
fn burst(assembler: &mut Assembler, ring: &mut Ring, now: Tick, stop_at: Option<StreamPosition>) -> usize {
    let mut bytes = 0;
    let stops = |assembler: &Assembler| {
        stop_at.is_some_and(|at| assembler.applied() >= at) && assembler.waits_for_reads_only()
    };
    while bytes < BURST_BYTES && assembler.has_room_for(RECORD_BYTES_MAX) && !stops(assembler) {
        let Some((content, end)) = ring.take() else { break };
        bytes += content.len();
        if let Some((header, payload)) = record::split(content) {
            assembler.apply(&header, payload, end, now);
        }
    }
    assembler.advance(ring.position());
    bytes
}

/// Whether no record up to `until`, none of which is applied yet, changes a block whose rest was read. `None`: not all of them are
/// written yet.
fn is_untouched(assembler: &Assembler, ring: &mut Ring, until: StreamPosition) -> Option<bool> {
    ring.look_ahead(until, |content| {
        record::split(content).is_none_or(|(header, _)| !assembler.touches_what_was_read(&header))
    })
}

/// The thread that reads blocks.
fn serve(shared: &Shared, orders: &Receiver<Order>, buffers: &Arc<BufferPool>) {
    let mut devices = BTreeMap::new();
    while let Ok(order) = orders.recv() {
        if shared.stopped() {
            return;
        }
        match order {
            Order::Devices(new) => devices = new,
            Order::Read(generation, wanted) => fetch(shared, &devices, generation, wanted, buffers),
        }
    }
}

fn fetch(
    shared: &Shared,
    devices: &BTreeMap<DiskId, BlockDevice>,
    generation: u64,
    wanted: Vec<Wanted>,
    buffers: &Arc<BufferPool>,
) {
    let mut by_disk: BTreeMap<DiskId, Vec<Wanted>> = BTreeMap::new();
    wanted.into_iter().for_each(|w| by_disk.entry(w.disk).or_default().push(w));
    for (disk, wanted) in by_disk {
        let Some(device) = devices.get(&disk) else { continue };
        let read = read_blocks(device, &wanted, buffers);
        // After the reads: whatever they saw is in the stream before this.
        let until = shared.producer.position();
        let mut state = shared.lock();
        if state.generation != generation {
            return;
        }
        match read {
            Ok(contents) => {
                if let Some(assembler) = state.assembler.as_mut() {
                    for wanted in &wanted {
                        if let Some(content) = contents.get(&wanted.block) {
                            assembler.base(*wanted, content, until);
                        }
                        for block in wanted.block + 1..=wanted.block + wanted.ahead {
                            if let Some(content) = contents.get(&block) {
                                assembler.ahead(*wanted, block, content, until);
                            }
                        }
                    }
                }
            }
            Err(error) => state.broken = Some((disk, error)),
        }
        shared.changed.notify_all();
    }
}

/// The content of blocks that are wanted, and of those ahead of them.
fn read_blocks(
    device: &BlockDevice,
    wanted: &[Wanted],
    buffers: &Arc<BufferPool>,
) -> Result<BTreeMap<u64, Box<[u8; BLOCK_BYTES]>>, SourceError> {
    let mut asked = Ranges::default();
    wanted.iter().for_each(|w| asked.insert(w.block, w.block + 1 + w.ahead));
    let ranges = asked.joined(GAP_BLOCKS);
    let readers = if wanted.len() > 1 { READERS } else { 1 };
    let reader = SourceReader::open_with_pool(device, readers, buffers.clone())?;
    let mut job = reader.read_ranges(ranges.iter().collect::<Vec<_>>());
    let mut contents = BTreeMap::new();
    while let Some(run) = job.next_blocking() {
        let run = run?;
        for (number, content) in (run.range.start.0..).zip(run.buffer.as_chunks::<BLOCK_BYTES>().0) {
            if asked.contains(number) {
                contents.insert(number, Box::new(*content));
            }
        }
    }
    Ok(contents)
}
