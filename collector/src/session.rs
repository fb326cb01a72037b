//! One machine's session: a single owner task, `select → Action → apply`.
//!
//! **Order.** Frames are applied in the order they came. `Received` goes out after chunks were handed to the vault's writer,
//! `Stored` after the vault's commit has returned. While a push or a commit takes long, the last `Received` is
//! repeated, so that the agent sees a living peer.
//!
//! **End.** Whatever ends a session (the peer, an error, a newer session, shutdown), the open delta is discarded in the
//! vault, then the writer is dropped, then the seat is given to the next. A push or commit that has begun is never
//! interrupted by any of these. A refusal is sent before the end and the peer's remaining bytes are drained for a
//! moment, since a reset would otherwise overtake it.
//!
//! **Errors.** An error of the vault is fatal for the session, with the vault's own code: the agent comes back and sends anew
//! what was not stored. Earlier points are untouched.

pub mod reader;
pub mod state;

use crate::shared::{Shared, Window};
use crate::{CollectorError, metrics::Kind};
use highwater_delta::{BlockRange, CommitId, CommitKind, DeltaId, DiskId, MachineId, StoredBlock};
use highwater_vault::{BlockMap, DiskRecord, MachineWriter, Vault};
use highwater_wire::message::{AgentMessage, CollectorMessage, DiskInfo, Hello, Welcome};
use highwater_wire::{Frame, FrameReader, FrameWriter, Timeouts, Version, WireError, codec};
use reader::Incoming;
use state::{Action, State};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How often a long push or commit shows that the collector lives.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long and how much of a refused peer's bytes are drained.
const DRAIN_MAX: Duration = Duration::from_secs(2);
const DRAIN_BYTES_MAX: u64 = 64 << 20;
/// How long cleaning up after an open delta may take.
const ABORT_MAX: Duration = Duration::from_secs(10);
/// Disks that one session may claim.
const CLAIMS_MAX: usize = 1024;

/// Runs a session over an authenticated stream until its end. Answers why it ended, if not by a goodbye.
pub async fn run<S>(shared: &Arc<Shared>, machine: MachineId, stream: S) -> Result<(), CollectorError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let config = &shared.config;
    let (input, output) = tokio::io::split(stream);
    let timeouts = Timeouts { idle: config.idle_timeout, ..Timeouts::default() };
    let greeting = Timeouts { idle: config.handshake_timeout, frame: config.handshake_timeout, ..timeouts };
    let mut frames = FrameReader::new(input, greeting);
    let mut out = Out { frames: FrameWriter::new(output, timeouts) };
    let stop = CancellationToken::new();
    let greeted = tokio::select! {
        greeted = hello(&mut frames, machine) => greeted,
        () = shared.shutdown.cancelled() => Err(CollectorError::ShuttingDown),
    };
    let (ended, rest) = match greeted {
        Err(error) => (Err(error), frames.into_inner()),
        Ok((hello, version)) => {
            frames.set_timeouts(timeouts);
            serve(shared, machine, &hello, version, frames, &mut out, stop).await
        }
    };
    match &ended {
        Ok(()) => {
            let _ = out.frames.shutdown().await;
        }
        Err(error) => {
            shared.metrics.refused(error.code());
            turn_away(&mut out, rest, error).await;
        }
    }
    ended
}

/// Turns an authenticated client away.
pub async fn refuse<S: AsyncRead + AsyncWrite>(shared: &Shared, stream: S, error: &CollectorError) {
    let (rest, output) = tokio::io::split(stream);
    shared.metrics.refused(error.code());
    let mut out = Out { frames: FrameWriter::new(output, Timeouts::default()) };
    turn_away(&mut out, rest, error).await;
}

/// Says why, and drains what the peer still sends, or a reset would overtake the word.
async fn turn_away<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    out: &mut Out<W>,
    rest: R,
    error: &CollectorError,
) {
    // A peer that cannot be reached hears nothing.
    let told = async {
        let _ = out.send(&CollectorMessage::Refused(error.refusal())).await;
        let _ = out.frames.shutdown().await;
        let _ = tokio::io::copy(&mut rest.take(DRAIN_BYTES_MAX), &mut tokio::io::sink()).await;
    };
    let _ = timeout(DRAIN_MAX, told).await;
}

async fn hello<R: AsyncRead + Unpin>(
    frames: &mut FrameReader<R>,
    machine: MachineId,
) -> Result<(Hello, Version), CollectorError> {
    let body = match frames.next().await? {
        Some(Frame::Control(body)) => body,
        Some(Frame::Chunk { .. }) => return Err(CollectorError::Unexpected("a chunk before the hello")),
        None => return Err(WireError::Closed.into()),
    };
    match codec::decode(&body)? {
        AgentMessage::Hello(hello) if hello.machine == machine => {
            let version = Version::negotiate(hello.version_min, hello.version_max)?;
            Ok((hello, version))
        }
        AgentMessage::Hello(hello) => {
            Err(CollectorError::OtherMachine { hello: hello.machine, certificate: machine })
        }
        _ => Err(CollectorError::Unexpected("the first message is no hello")),
    }
}

/// Seat, writer, welcome, and the loop. The seat is given back last.
async fn serve<R, W>(
    shared: &Arc<Shared>,
    machine: MachineId,
    hello: &Hello,
    version: Version,
    frames: FrameReader<R>,
    out: &mut Out<W>,
    stop: CancellationToken,
) -> (Result<(), CollectorError>, R)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin,
{
    let opened = async {
        shared.vault.machine(machine).await?;
        let seat = shared.take_seat(machine).await?;
        // Only now has an older session of the machine given its own back.
        let window = shared.take_window()?;
        let writer = open_writer(shared.vault.clone(), machine).await?;
        Ok::<_, CollectorError>((window, seat, writer))
    };
    let (window, seat, writer) = match opened.await {
        Ok(opened) => opened,
        Err(error) => return (Err(error), frames.into_inner()),
    };
    tracing::info!(%machine, host = hello.host_name, agent = hello.agent_version, kernel = hello.kernel, "session begun");
    let _gauge = shared.metrics.session();
    let mut owner = Owner::new(shared, machine, writer, &window, out);
    if let Err(error) = owner.welcome(version).await {
        return (Err(error), frames.into_inner());
    }
    let (sender, queue) = mpsc::channel(reader::QUEUE_FRAMES);
    let reading =
        tokio::spawn(reader::read(frames, owner.window.clone(), window.bytes, sender, stop.clone()));
    let ended = owner.work(queue, &seat.replaced).await;
    owner.close().await;
    // Before the seat, so that the next session of the machine finds its window free.
    drop(window);
    drop(seat);
    stop.cancel();
    match reading.await {
        Ok(rest) => (ended, rest),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Opens a writer on a thread of its own: the vault's future for it cannot move between threads.
async fn open_writer(vault: Vault, machine: MachineId) -> Result<MachineWriter, CollectorError> {
    let handle = tokio::runtime::Handle::current();
    match tokio::task::spawn_blocking(move || handle.block_on(vault.writer(machine))).await {
        Ok(opened) => Ok(opened?),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

struct Out<W> {
    frames: FrameWriter<W>,
}

impl<W: AsyncWrite + Unpin> Out<W> {
    async fn send(&mut self, message: &CollectorMessage) -> Result<(), CollectorError> {
        self.frames.control(&codec::encode(message)?).await?;
        Ok(self.frames.flush().await?)
    }
}

struct Owner<'a, W> {
    shared: &'a Arc<Shared>,
    machine: MachineId,
    writer: MachineWriter,
    state: State,
    out: &'a mut Out<W>,
    window: Arc<Semaphore>,
    window_bytes: u64,
    /// Bytes taken over by the vault's writer whose `Received` is still due.
    unacknowledged: usize,
    /// The last `Received` that went out. Only this one may be repeated: a later one would give the peer bytes that are
    /// not back in the window.
    told: Option<(DeltaId, u64)>,
    claims: usize,
    /// Of the disk last asked for: a comparison asks for all of it, piece by piece. Dropped with the next delta, since
    /// it holds a cache.
    map: Option<(DiskId, CommitId, BlockMap)>,
}

impl<'a, W: AsyncWrite + Unpin> Owner<'a, W> {
    fn new(
        shared: &'a Arc<Shared>,
        machine: MachineId,
        writer: MachineWriter,
        window: &Window,
        out: &'a mut Out<W>,
    ) -> Self {
        let permits = usize::try_from(window.bytes).unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            shared,
            machine,
            writer,
            state: State::default(),
            out,
            window: Arc::new(Semaphore::new(permits)),
            window_bytes: window.bytes,
            unacknowledged: 0,
            told: None,
            claims: 0,
            map: None,
        }
    }

    async fn welcome(&mut self, version: Version) -> Result<(), CollectorError> {
        let hash_key = self.shared.vault.hash_key(self.machine).await?;
        let state = self.writer.state();
        let welcome = Welcome {
            version: version.number(),
            vault: self.shared.vault.id(),
            hash_key,
            window_bytes: self.window_bytes,
            last_commit: state.last_commit,
            disks: state.disks.iter().map(|disk| disk.disk).collect(),
        };
        self.out.send(&CollectorMessage::Welcome(welcome)).await
    }

    async fn work(
        &mut self,
        mut queue: mpsc::Receiver<Incoming>,
        replaced: &CancellationToken,
    ) -> Result<(), CollectorError> {
        let shared = self.shared;
        loop {
            let incoming = tokio::select! {
                biased;
                () = replaced.cancelled() => return Err(CollectorError::Replaced),
                () = shared.shutdown.cancelled() => return Err(CollectorError::ShuttingDown),
                incoming = queue.recv() => incoming.unwrap_or(Incoming::End),
            };
            let action = match incoming {
                Incoming::Message(message) => self.state.message(message)?,
                Incoming::Chunk(delta, chunk) => {
                    shared.metrics.received(chunk.len());
                    self.state.chunk(delta, chunk)?
                }
                Incoming::End => return Ok(()),
                Incoming::Failed(error) => return Err(error),
            };
            if action == Action::End {
                return Ok(());
            }
            let push = matches!(action, Action::Push(_));
            self.apply(action).await?;
            if !push || queue.is_empty() || self.unacknowledged as u64 >= self.window_bytes / 8 {
                self.acknowledge().await?;
            }
        }
    }

    async fn apply(&mut self, action: Action) -> Result<(), CollectorError> {
        let last = self.told;
        match action {
            Action::Disks(disks) => self.disks(disks).await,
            Action::Begin(delta) => {
                self.shared.metrics.delta_opened();
                self.map = None;
                Ok(self.writer.begin(delta).await?)
            }
            Action::Push(chunk) => {
                let bytes = chunk.len();
                alive(self.out, last, self.writer.push(chunk)).await??;
                self.unacknowledged += bytes;
                self.shared.metrics.window(bytes);
                Ok(())
            }
            Action::Commit(delta, kind) => self.commit(delta, kind).await,
            Action::Abort => {
                self.shared.metrics.delta_closed();
                Ok(self.writer.abort().await?)
            }
            Action::Hashes(disk, range) => self.hashes(disk, range).await,
            Action::Pong(number) => self.out.send(&CollectorMessage::Pong(number)).await,
            Action::End => Ok(()),
        }
    }

    /// Gives bytes back to the window, then says so: in this order, or a fast peer would find the window still full.
    async fn acknowledge(&mut self) -> Result<(), CollectorError> {
        let Some((delta, chunks)) = self.state.received().filter(|_| self.unacknowledged > 0) else {
            return Ok(());
        };
        self.window.add_permits(self.unacknowledged);
        self.shared.metrics.window_returned(self.unacknowledged);
        self.unacknowledged = 0;
        self.told = Some((delta, chunks));
        self.out.send(&CollectorMessage::Received { delta, chunks }).await
    }

    async fn disks(&mut self, disks: Vec<DiskInfo>) -> Result<(), CollectorError> {
        let mut records = Vec::with_capacity(disks.len());
        for DiskInfo { disk, name, size_bytes } in disks {
            if !self.writer.disks().iter().any(|known| known.disk == disk) {
                self.claims += 1;
                if self.claims > CLAIMS_MAX {
                    return Err(CollectorError::Disks("too many new disks in one session"));
                }
            }
            self.shared.claim_disk(disk, self.machine).await?;
            records.push(DiskRecord { disk, name, size_bytes });
        }
        Ok(self.writer.set_disks(records)?)
    }

    async fn commit(&mut self, delta: DeltaId, kind: CommitKind) -> Result<(), CollectorError> {
        self.acknowledge().await?;
        let metrics = &self.shared.metrics;
        metrics.delta_closed();
        let begun = Instant::now();
        let (label, taken_at_ms) = match &kind {
            CommitKind::Partial => (Kind::Partial, None),
            CommitKind::Point(point) => (point.consistency.into(), Some(point.taken_at_ms)),
        };
        let stored_before = self.writer.state().segments.last().map_or(CommitId::NONE, |s| s.commit);
        let last = self.told;
        let commit = alive(self.out, last, self.writer.commit(kind)).await??;
        let stored: u64 =
            self.writer.state().segments.iter().filter(|s| s.commit > stored_before).map(|s| s.bytes).sum();
        metrics.committed(self.machine, label, taken_at_ms, begun.elapsed(), stored);
        tracing::debug!(machine = %self.machine, %delta, %commit, bytes = stored, "stored");
        self.out.send(&CollectorMessage::Stored { delta, commit }).await
    }

    async fn hashes(&mut self, disk: DiskId, range: BlockRange) -> Result<(), CollectorError> {
        let state = self.writer.state();
        let new = !state.disks.iter().any(|known| known.disk == disk);
        let blocks = if new && self.writer.disks().iter().any(|known| known.disk == disk) {
            // Named, and nothing of it committed yet.
            vec![StoredBlock::Absent; usize::try_from(range.count).unwrap_or_default()]
        } else {
            let at = state.last_commit;
            let last = self.told;
            let map = match self.map.take() {
                Some((of, when, map)) if (of, when) == (disk, at) => map,
                _ => alive(self.out, last, self.shared.vault.block_map_of(state, disk, at)).await??,
            };
            let blocks = alive(self.out, last, map.hashes(range)).await??;
            self.map = Some((disk, at, map));
            blocks
        };
        self.out.send(&CollectorMessage::Hashes { disk, range, blocks }).await
    }

    /// Discards an open delta and lets the writer go.
    async fn close(mut self) {
        self.shared.metrics.window_returned(self.unacknowledged);
        if self.state.is_open() {
            self.shared.metrics.delta_closed();
        }
        // Also after a failed commit; without an open delta it does nothing. What cannot be cleaned up now is cleaned
        // up by the machine's next writer.
        match timeout(ABORT_MAX, self.writer.abort()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(machine = %self.machine, %error, "leaving an open delta"),
            Err(_) => {
                tracing::warn!(machine = %self.machine, "the vault does not answer; leaving an open delta")
            }
        }
    }
}

/// Waits for the vault, and repeats the last `Received` meanwhile. The vault's work is finished in any case: only then an
/// error of the peer is answered.
async fn alive<T, W: AsyncWrite + Unpin>(
    out: &mut Out<W>,
    last: Option<(DeltaId, u64)>,
    work: impl Future<Output = T>,
) -> Result<T, CollectorError> {
    let mut work = pin!(work);
    let mut peer = Ok(());
    loop {
        match timeout(KEEPALIVE, &mut work).await {
            Ok(done) => return peer.map(|()| done),
            Err(_) if peer.is_ok() => {
                let message = match last {
                    Some((delta, chunks)) => CollectorMessage::Received { delta, chunks },
                    None => CollectorMessage::Pong(0),
                };
                peer = out.send(&message).await;
            }
            Err(_) => {}
        }
    }
}
