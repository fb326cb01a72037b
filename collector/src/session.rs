//! One machine's session: a single owner task, `select → Action → apply`.
//!
//! **Order.** Frames are applied in the order they came. `Received` goes out after chunks were handed to the vault's writer, or put
//! into the cache while that lags (module `intake`); `Stored` after the vault's commit has returned. While a push or a commit takes
//! long, the last `Received` is repeated, so that the agent sees a living peer.
//!
//! **End.** Whatever ends a session (the peer, an error, a newer session, shutdown), the open delta is discarded in the
//! vault, then the writer is dropped, then the seat is given to the next. A push or commit that has begun is never
//! interrupted by any of these. A refusal is sent before the end and the peer's remaining bytes are drained for a
//! moment, since a reset would otherwise overtake it; unless the machine has too many connections without a seat
//! ([`crate::visits`]), as whoever has lost its seat is one of those again.
//!
//! **Errors.** An error of the vault is fatal for the session, with the vault's own code: the agent comes back and sends anew
//! what was not stored. Earlier points are untouched.

mod groups;
mod intake;
mod out;
pub mod reader;
pub mod state;

use crate::groups::Line;
use crate::memory::claim::{Asked, Claim};
use crate::memory::{Kept, OpenDelta, Share, WAIT_MAX, WELCOME_WAIT_MAX};
use crate::shared::{Ended, Shared};
use crate::visits::Visit;
use crate::{CollectorError, certificates, metrics::Kind};
use highwater_delta::{BlockRange, Code, CommitId, CommitKind, DeltaId, DiskId, MachineId, StoredBlock};
use highwater_vault::{BlockMap, DiskRecord, MachineWriter, Vault};
use highwater_wire::message::{AgentMessage, CollectorMessage, DiskInfo, Hello, Refusal, Welcome};
use highwater_wire::{Credential, Frame, FrameReader, Timeouts, Version, WireError, codec};
use intake::{Front, Intake};
use out::Out;
use reader::Incoming;
use state::{Action, State};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Level;

/// How long chunks taken over may wait for their acknowledgement when no others follow.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(20);
/// How long cleaning up after an open delta may take.
const ABORT_MAX: Duration = Duration::from_secs(10);
/// Disks that one session may claim.
const CLAIMS_MAX: usize = 512;
/// How many times the longest silence a delta may be open without progress: its memory is that of others too.
const DELTA_IDLE: u32 = 4;
/// See [`crate::memory::claim`].
const BEYOND_ITS_PART: CollectorError = CollectorError::Full("others need the memory that it holds");

/// Runs a session over an authenticated stream until its end. Answers why it ended, if not by a goodbye.
pub async fn run<S>(
    shared: &Arc<Shared>,
    credential: &Credential,
    visit: Visit,
    from: IpAddr,
    stream: S,
) -> Result<(), CollectorError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let config = &shared.config;
    let (input, output) = tokio::io::split(stream);
    let timeouts = Timeouts { idle: config.idle_timeout, ..Timeouts::default() };
    let greeting = Timeouts { idle: config.handshake_timeout, frame: config.handshake_timeout, ..timeouts };
    let mut frames = FrameReader::new(input, greeting);
    let out = Out::new(output, timeouts);
    let mut visit = Some(visit);
    let greeted = tokio::select! {
        greeted = hello(&mut frames, credential.machine) => greeted,
        () = shared.shutdown.cancelled() => Err(CollectorError::ShuttingDown),
    };
    let (ended, rest) = match greeted {
        Err(error) => (Err(error), frames.into_inner()),
        Ok((hello, version)) => {
            frames.set_timeouts(timeouts);
            let peer = Peer { credential, from, version };
            serve(shared, peer, &hello, frames, &out, &mut visit).await
        }
    };
    if let Err(error) = &ended {
        shared.metrics.refused(error.code());
    }
    let Some(_visit) = visit.or_else(|| shared.visits.begin(credential.machine)) else { return ended };
    match &ended {
        Ok(()) => out.shutdown().await,
        Err(error) => out.turn_away(rest, error).await,
    }
    ended
}

/// Turns an authenticated client away.
pub async fn refuse<S: AsyncRead + AsyncWrite>(shared: &Shared, stream: S, error: &CollectorError) {
    let (rest, output) = tokio::io::split(stream);
    shared.metrics.refused(error.code());
    Out::new(output, Timeouts::default()).turn_away(rest, error).await;
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

/// Whose session it is.
#[derive(Clone, Copy)]
struct Peer<'a> {
    credential: &'a Credential,
    from: IpAddr,
    version: Version,
}

/// Seat, writer, welcome, and the loop. The seat is given back last. With the seat, the visit is over.
async fn serve<R, W>(
    shared: &Arc<Shared>,
    peer: Peer<'_>,
    hello: &Hello,
    frames: FrameReader<R>,
    out: &Out<W>,
    visit: &mut Option<Visit>,
) -> (Result<(), CollectorError>, R)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin,
{
    let Peer { credential, from, version } = peer;
    let machine = credential.machine;
    let opened = async {
        // Whoever is not in the vault gets no entry in any table.
        shared.vault.host_name(machine).await?;
        let seat = shared.take_seat(credential).await?;
        // Only now has an older session of the machine given its own back.
        let session = shared.take_session()?;
        *visit = None;
        let window = shared.take_window()?;
        let state_max = shared.memory.machine_bytes_max();
        // Before anything is loaded.
        let bytes = shared.vault.load_bytes(machine, state_max).await?;
        let claim = shared.memory.claims.begin();
        let mut state = shared.memory.keep(&claim, bytes, WELCOME_WAIT_MAX).await?;
        let writer = open_writer(shared.vault.clone(), machine, state_max).await?;
        state.shrink(writer.state().memory_bytes());
        Ok::<_, CollectorError>((seat, session, window, (writer, claim, state)))
    };
    let (seat, session, window, held) = match opened.await {
        Ok(opened) => opened,
        Err(error) => return (Err(error), frames.into_inner()),
    };
    if let Some(left_out) = shared.say_of_machine(machine, Level::INFO) {
        tracing::info!(%machine, host = hello.host_name, agent = hello.agent_version, kernel = hello.kernel, left_out,
            "session begun");
    }
    let _gauge = shared.metrics.session();
    let mut owner = Owner::new(shared, credential, version, &seat.ended, held, &window, out);
    if let Err(error) = owner.welcome().await {
        return (Err(error), frames.into_inner());
    }
    if version >= Version::V3 {
        owner.line = Some(shared.desk.open(machine, from));
    }
    let stop = CancellationToken::new();
    let (sender, queue) = mpsc::channel(reader::QUEUE_FRAMES);
    let reading =
        tokio::spawn(reader::read(frames, owner.window.clone(), window.bytes(), sender, stop.clone()));
    let rest_to_do = CancellationToken::new();
    let (intake, window_left) = (owner.intake.clone(), owner.window.clone());
    let (ended, ()) = tokio::join!(
        async {
            let ended = owner.work().await;
            rest_to_do.cancel();
            ended
        },
        intake.run(queue, (out, &window_left, &shared.metrics), &rest_to_do)
    );
    owner.close().await;
    // Before the seat, so that the next session of the machine finds its window free, and a session for it.
    drop(window);
    drop(session);
    drop(seat);
    stop.cancel();
    match reading.await {
        Ok(rest) => (ended, rest),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Opens a writer on a thread of its own: the vault's future for it cannot move between threads.
async fn open_writer(
    vault: Vault,
    machine: MachineId,
    state_max: u64,
) -> Result<MachineWriter, CollectorError> {
    let handle = tokio::runtime::Handle::current();
    match tokio::task::spawn_blocking(move || handle.block_on(vault.writer_within(machine, state_max))).await
    {
        Ok(opened) => Ok(opened?),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

struct Owner<'a, W> {
    shared: &'a Arc<Shared>,
    machine: MachineId,
    credential: &'a Credential,
    version: Version,
    writer: MachineWriter,
    state: State,
    out: &'a Out<W>,
    intake: Arc<Intake>,
    window: Arc<Semaphore>,
    window_bytes: u64,
    claims: usize,
    /// Of the disk last asked for: a comparison asks for all of it, piece by piece. Dropped with the next delta, since
    /// it holds a cache.
    map: Option<(DiskId, CommitId, BlockMap, Kept)>,
    /// When the map was asked for last.
    map_used: Instant,
    claim: Arc<Claim>,
    /// Memory of what is stored of the machine, grown with each commit.
    kept: Vec<Kept>,
    /// Memory of the open delta.
    delta: Option<OpenDelta>,
    /// When the open delta was begun, or added to last.
    progress: Instant,
    ended: &'a Ended,
    /// What the machine is to hear of groups; none: it knows of none.
    line: Option<Line>,
}

impl<'a, W: AsyncWrite + Unpin> Owner<'a, W> {
    fn new(
        shared: &'a Arc<Shared>,
        credential: &'a Credential,
        version: Version,
        ended: &'a Ended,
        (writer, claim, kept): (MachineWriter, Arc<Claim>, Kept),
        window: &Share,
        out: &'a Out<W>,
    ) -> Self {
        let permits = usize::try_from(window.bytes()).unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            shared,
            machine: credential.machine,
            credential,
            version,
            writer,
            state: State::new(version),
            out,
            intake: Arc::new(Intake::new(credential.machine, shared.cache.clone())),
            window: Arc::new(Semaphore::new(permits)),
            window_bytes: window.bytes(),
            claims: 0,
            map: None,
            map_used: Instant::now(),
            claim,
            kept: vec![kept],
            delta: None,
            progress: Instant::now(),
            ended,
            line: None,
        }
    }

    async fn welcome(&mut self) -> Result<(), CollectorError> {
        let hash_key = self.shared.vault.hash_key(self.machine).await?;
        let state = self.writer.state();
        let welcome = Welcome {
            version: self.version.number(),
            vault: self.shared.vault.id(),
            hash_key,
            window_bytes: self.window_bytes,
            last_commit: state.last_commit,
            disks: state.disks.iter().map(|disk| disk.disk).collect(),
        };
        self.out.send(&CollectorMessage::Welcome(welcome)).await
    }

    async fn work(&mut self) -> Result<(), CollectorError> {
        let (shared, ended) = (self.shared, self.ended);
        let (intake, mut front) = (self.intake.clone(), Front::default());
        let idle = shared.config.idle_timeout;
        loop {
            let incoming = tokio::select! {
                biased;
                why = ended.wait() => return Err(why),
                () = shared.shutdown.cancelled() => return Err(CollectorError::ShuttingDown),
                asked = shared.memory.claims.asked(&self.claim) => {
                    give(asked, self.state.open(), &mut self.map)?;
                    continue;
                }
                () = sleep_until(self.progress + idle * DELTA_IDLE), if self.state.open().is_some() => {
                    return Err(self.state.open().map_or(CollectorError::Busy, CollectorError::DeltaIdle));
                }
                () = sleep_until(self.map_used + idle), if self.map.is_some() => {
                    self.map = None;
                    continue;
                }
                order = groups::next(&mut self.line) => {
                    self.order(order).await?;
                    continue;
                }
                incoming = intake.next(&mut front) => incoming,
                () = sleep(ACKNOWLEDGE_AFTER), if self.out.due() > 0 => {
                    self.acknowledge().await?;
                    continue;
                }
            };
            // What a message weighs is given back once it was worked off.
            let (action, _counted) = match incoming {
                Incoming::Message(message, counted) => (self.state.message(message)?, Some(counted)),
                Incoming::Chunk(delta, chunk) => {
                    shared.metrics.received(chunk.len());
                    (self.state.chunk(delta, chunk)?, None)
                }
                Incoming::End => return Ok(()),
                Incoming::Failed(error) => return Err(error),
            };
            if action == Action::End {
                return Ok(());
            }
            let push = matches!(action, Action::Push(_));
            self.apply(action).await?;
            // Not for each chunk: that would cost both sides a message and a wake-up. A peer that waits for its window has more
            // than this part of it under way.
            if !push || self.out.due() as u64 >= self.window_bytes / 8 {
                self.acknowledge().await?;
            }
        }
    }

    async fn apply(&mut self, action: Action) -> Result<(), CollectorError> {
        match action {
            Action::Disks(disks) => self.disks(disks).await,
            Action::Begin(delta) => {
                self.shared.metrics.delta_opened();
                self.map = None;
                let (shared, claim) = (self.shared, self.claim.clone());
                self.delta = Some(self.turn(shared.memory.open_delta(&claim, WAIT_MAX)).await??);
                self.progress = Instant::now();
                Ok(self.writer.begin(delta).await?)
            }
            Action::Push(chunk) => {
                let bytes = chunk.len();
                self.out.alive(self.writer.push(chunk)).await??;
                self.progress = Instant::now();
                self.shared.memory.claims.grown(&self.claim, bytes);
                self.intake.done(self.out, &self.shared.metrics);
                Ok(())
            }
            Action::Commit(delta, kind) => self.commit(delta, kind).await,
            Action::Abort => {
                self.shared.metrics.delta_closed();
                self.writer.abort().await?;
                self.delta = None;
                Ok(())
            }
            Action::Hashes(disk, range) => self.hashes(disk, range).await,
            Action::Pong(number) => self.out.send(&CollectorMessage::Pong(number)).await,
            Action::Renew(csr_pem) => self.renew(&csr_pem).await,
            Action::Group(word) => self.word(word).await,
            Action::End => Ok(()),
        }
    }

    /// Waits for something that may take long, and shows that it lives meanwhile; unless the session is to end.
    async fn turn<T>(&mut self, turn: impl Future<Output = T>) -> Result<T, CollectorError> {
        let (shared, ended, claim) = (self.shared, self.ended, self.claim.clone());
        let (open, map) = (self.state.open(), &mut self.map);
        let turn = async {
            let mut turn = pin!(turn);
            loop {
                tokio::select! {
                    biased;
                    why = ended.wait() => return Err(why),
                    // Whoever waits for more memory holds what it has meanwhile.
                    asked = shared.memory.claims.asked(&claim) => give(asked, open, map)?,
                    () = shared.shutdown.cancelled() => return Err(CollectorError::ShuttingDown),
                    done = &mut turn => return Ok(done),
                }
            }
        };
        self.out.alive(turn).await?
    }

    /// What is stored of a machine grows with each commit, and so does the memory that it takes.
    async fn grow(&mut self) -> Result<(), CollectorError> {
        let have: u64 = self.kept.iter().map(Kept::bytes).sum();
        let need = self.writer.state().memory_bytes();
        self.shared.note_state(self.machine, need);
        if need > have {
            // Some more than that, or there would be a share for each commit.
            let (shared, claim) = (self.shared, self.claim.clone());
            let more = shared.memory.keep(&claim, need - have + need / 16, WAIT_MAX);
            let more = self.turn(more).await??;
            self.kept.push(more);
        }
        Ok(())
    }

    async fn acknowledge(&mut self) -> Result<(), CollectorError> {
        self.out.acknowledge(&self.window, &self.shared.metrics).await
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
        self.shared.memory.claims.complete(&self.claim);
        self.acknowledge().await?;
        let metrics = &self.shared.metrics;
        metrics.delta_closed();
        while let Err(wait) = self.shared.allow_commit(self.machine) {
            self.turn(tokio::time::sleep(wait)).await?;
        }
        let begun = Instant::now();
        let (label, taken_at_ms) = match &kind {
            CommitKind::Partial => (Kind::Partial, None),
            CommitKind::Point(point) => (point.consistency.into(), Some(point.taken_at_ms)),
        };
        let stored_before = self.writer.state().segments().last().map_or(CommitId::NONE, |s| s.commit);
        let commit = self.out.alive(self.writer.commit(kind)).await??;
        self.delta = None;
        let stored: u64 =
            self.writer.state().segments().filter(|s| s.commit > stored_before).map(|s| s.bytes).sum();
        metrics.committed(self.machine, label, taken_at_ms, begun.elapsed(), stored);
        tracing::debug!(machine = %self.machine, %delta, %commit, bytes = stored, "stored");
        self.out.send(&CollectorMessage::Stored { delta, commit }).await?;
        self.grow().await
    }

    async fn hashes(&mut self, disk: DiskId, range: BlockRange) -> Result<(), CollectorError> {
        let state = self.writer.state();
        let new = !state.disks.iter().any(|known| known.disk == disk);
        let blocks = if new && self.writer.disks().iter().any(|known| known.disk == disk) {
            // Named, and nothing of it committed yet.
            vec![StoredBlock::Absent; usize::try_from(range.count).unwrap_or_default()]
        } else {
            let at = state.last_commit;
            let (map, share) = match self.map.take() {
                Some((of, when, map, share)) if (of, when) == (disk, at) => (map, share),
                before => {
                    drop(before);
                    let bytes = self.shared.vault.block_map_bytes(state, disk, at);
                    let bytes_max = self.shared.memory.machine_bytes_max();
                    if bytes > bytes_max {
                        return Err(CollectorError::MapTooLarge { bytes, bytes_max });
                    }
                    let (shared, claim) = (self.shared, self.claim.clone());
                    let share = self.turn(shared.memory.keep(&claim, bytes, WAIT_MAX)).await??;
                    let state = self.writer.state();
                    (self.out.alive(self.shared.vault.block_map_of(state, disk, at)).await??, share)
                }
            };
            let blocks = self.out.alive(map.hashes(range)).await??;
            self.map = Some((disk, at, map, share));
            self.map_used = Instant::now();
            blocks
        };
        self.out.send(&CollectorMessage::Hashes { disk, range, blocks }).await
    }

    /// A refusal does not end the session: the present certificate is still valid. One who asks too often is sent away.
    async fn renew(&mut self, csr_pem: &str) -> Result<(), CollectorError> {
        let renewed = certificates::renew(self.shared, self.credential, csr_pem);
        let answer = match self.out.alive(renewed).await? {
            Ok(cert_pem) => {
                tracing::info!(machine = %self.machine, "certificate renewed");
                self.shared.metrics.renewed();
                CollectorMessage::Renewed { cert_pem }
            }
            Err(error @ (CollectorError::Wire(WireError::Revoked(_)) | CollectorError::Quota(_))) => {
                return Err(error);
            }
            Err(error) => {
                tracing::warn!(machine = %self.machine, code = %Code(error.code()), %error, "a certificate is not renewed");
                self.shared.metrics.refused(error.code());
                CollectorMessage::NotRenewed(Refusal { fatal: false, ..error.refusal() })
            }
        };
        self.out.send(&answer).await
    }

    /// Discards an open delta and lets the writer go.
    async fn close(mut self) {
        self.shared.metrics.window_returned(self.out.due());
        if self.state.open().is_some() {
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

/// Others need what a session holds: it gives its map, or ends.
fn give<M>(asked: Asked, open: Option<DeltaId>, map: &mut Option<M>) -> Result<(), CollectorError> {
    match (asked, open) {
        (Asked::Delta, Some(delta)) => Err(CollectorError::DeltaSlow(delta)),
        (Asked::Delta, None) => Ok(()),
        (Asked::Kept, _) if map.take().is_some() => Ok(()),
        (Asked::Kept, _) => Err(BEYOND_ITS_PART),
    }
}
