//! The session with the collector: kept up by a task of its own, which connects, backs off, and moves messages.
//!
//! The engine sends through the [`mpsc::Sender`] that comes with [`LinkEvent::Up`]. When the session ends, that sender is closed:
//! whatever was queued is dropped, and [`LinkEvent::Down`] follows. So nothing of one session is ever sent in another.
//! Chunks wait for the window; the queue is bounded, so a slow collector slows the readers down (invariant I7).
//!
//! **A silent collector.** The agent pings three times within [`Patience::silence`], whatever else it does or waits for, and
//! ends a session in which nothing came for that long; so a peer that vanished is found in that time. A collector says
//! something every 5 s at least while it works for this machine.

use super::renewal::{Renewal, now_ms};
use crate::{error::OperatorError, group::Told, pulse::Pulse, throttle::Throttle};
use highwater_delta::{CHUNK_BYTES_MAX, DeltaId, MachineId};
use highwater_group::Kind;
use highwater_wire::{
    Backoff, Failure, SendWindow, SessionReceiver, SessionSender, Timeouts, Version, WireError,
    client::connect,
    message::{AgentMessage, CollectorMessage, Hello, Reachable, Refusal, Welcome},
};
use std::{
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until, timeout},
};

/// Chunks and messages that may wait for the network.
pub const QUEUE_MAX: usize = 32;
/// A session that lasted so long counts as a success for the back-off.
const STABLE: Duration = Duration::from_secs(10);

/// Where to connect.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `host:port`.
    pub address: String,
    /// The name in the collector's certificate.
    pub server_name: String,
}

/// How long a collector may take, and how long it is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// One that says nothing for so long is gone.
    pub silence: Duration,
    /// One that takes nothing over for so long is given up, though it shows that it lives: what waits in the queue holds up
    /// the engine.
    pub stall: Duration,
    /// The unit of the back-off after a failure.
    pub retry_unit: Duration,
}

impl Patience {
    /// How often it is asked for a sign of life: so that two answers may be late.
    fn ping(&self) -> Duration {
        self.silence / 3
    }
}

/// What the session has to do with the machine's group.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Takes what the collector tells of it.
    pub told: mpsc::Sender<Told>,
    /// Where the other members call.
    pub reachable: Reachable,
}

/// What the engine gives to the session.
#[derive(Debug)]
pub enum Outgoing {
    /// A message.
    Message(AgentMessage),
    /// An encoded chunk of the open delta.
    Chunk(DeltaId, Vec<u8>),
}

/// What the session tells the engine.
#[derive(Debug)]
pub enum LinkEvent {
    /// Connected and welcomed.
    Up(Box<Welcome>, mpsc::Sender<Outgoing>),
    /// From the collector.
    Message(Box<CollectorMessage>),
    /// Not connected any more, or the attempt failed.
    Down(LinkDown),
}

/// Why there is no session, and when it is tried again.
#[derive(Clone, Debug)]
pub struct LinkDown {
    /// Stable number.
    pub code: u16,
    /// The cause.
    pub cause: String,
    /// What to do.
    pub action: String,
    /// When it is tried again.
    pub retry_in: Duration,
    /// Trying again, unchanged, cannot succeed: somebody must act first.
    pub critical: bool,
    /// It was tried, and there was no session; otherwise one has ended.
    pub attempt: bool,
    /// Failures in a row.
    pub failures: usize,
    /// The collector itself said so, and goes on saying it until something changes there.
    pub refused: bool,
    /// Since when.
    pub at: std::time::Instant,
}

/// Runs until the engine is gone. `wake` ends a back-off, and what counts towards the next one: an operator who asks must not
/// make the waiting longer.
pub async fn run(
    endpoint: Endpoint,
    renewal: Arc<Renewal>,
    patience: Patience,
    (throttle, pulse): (Arc<Throttle>, Arc<Pulse>),
    groups: Groups,
    events: mpsc::Sender<LinkEvent>,
    wake: Arc<Notify>,
) {
    let mut backoff = Backoff::new(patience.retry_unit);
    while !events.is_closed() {
        let started = Instant::now();
        let mut welcomed = false;
        let let_go = LetGo::default();
        let end = session(
            &endpoint,
            &renewal,
            patience,
            (&throttle, &pulse),
            &groups,
            &events,
            (&mut welcomed, &let_go),
        )
        .await;
        // A session that the collector ended with a refusal was no success, however long it lasted.
        let refused = matches!(end, WireError::Refused(_));
        if !refused && started.elapsed() >= STABLE.min(patience.retry_unit * 10) {
            backoff.reset();
        }
        let critical = !end.retry();
        let failure = if critical { Failure::Refused } else { Failure::Network };
        let retry_in = backoff.next(failure, jitter());
        let (code, cause) = let_go.why(&end);
        let down = LinkDown {
            code,
            cause,
            action: end.action(),
            retry_in,
            critical,
            attempt: !welcomed,
            failures: backoff.failures(),
            refused,
            at: std::time::Instant::now(),
        };
        if events.send(LinkEvent::Down(down)).await.is_err() {
            return;
        }
        if timeout(retry_in, wake.notified()).await.is_ok() {
            backoff.reset();
        }
    }
}

/// One session; answers why it ended.
async fn session(
    endpoint: &Endpoint,
    renewal: &Arc<Renewal>,
    patience: Patience,
    (throttle, pulse): (&Arc<Throttle>, &Arc<Pulse>),
    groups: &Groups,
    events: &mpsc::Sender<LinkEvent>,
    (welcomed, let_go): (&mut bool, &LetGo),
) -> WireError {
    let identity = renewal.connecting();
    let hello = hello(identity.machine);
    let (welcome, mut sender, mut receiver) =
        match connect(&endpoint.address, &endpoint.server_name, &identity, hello).await {
            Ok(session) => session,
            Err(error) => return error,
        };
    if welcome.window_bytes < CHUNK_BYTES_MAX as u64 {
        // Not even one chunk could ever be sent.
        return WireError::Unexpected("a welcome with a window smaller than a chunk");
    }
    let renewal = (welcome.version >= Version::V2.number()).then(|| renewal.clone());
    let knows_groups = welcome.version >= Version::V3.number();
    // Only now: the welcome may have to wait for an older session of this machine.
    receiver.set_timeouts(Timeouts { idle: patience.silence, ..Timeouts::default() });
    *welcomed = true;
    let window = Window::of(welcome.window_bytes);
    let (queue, outgoing) = mpsc::channel(QUEUE_MAX);
    if knows_groups {
        let reachable = AgentMessage::Reachable(groups.reachable.clone());
        if let Err(error) = sender.send(&reachable).await {
            return error;
        }
    }
    if events.send(LinkEvent::Up(Box::new(welcome), queue)).await.is_err() {
        return WireError::Closed;
    }
    if knows_groups {
        let _ = groups.told.try_send(Told::Session);
    }
    let writer = Writer {
        sender,
        window,
        throttle: throttle.clone(),
        patience,
        pulse: pulse.clone(),
        pings: 0,
        pinged: Instant::now(),
        renewal,
        let_go: let_go.clone(),
    };
    carry(writer, outgoing, receiver, (events.clone(), groups.told.clone())).await
}

/// Moves messages both ways until one of them fails.
async fn carry(
    writer: Writer,
    outgoing: mpsc::Receiver<Outgoing>,
    receiver: SessionReceiver,
    told: (mpsc::Sender<LinkEvent>, mpsc::Sender<Told>),
) -> WireError {
    let read = read(receiver, told, writer.window.clone(), writer.renewal.clone());
    let write = writer.run(outgoing);
    // Whichever direction ends first ends the session; dropping the other closes the queue and the connection.
    tokio::select! {
        error = write => error,
        error = read => error,
    }
}

struct Window {
    window: Mutex<SendWindow>,
    changed: Notify,
}

impl Window {
    fn of(bytes: u64) -> Arc<Self> {
        Arc::new(Self { window: Mutex::new(SendWindow::new(bytes)), changed: Notify::new() })
    }
    fn with<T>(&self, use_it: impl FnOnce(&mut SendWindow) -> T) -> T {
        use_it(&mut self.window.lock().unwrap_or_else(PoisonError::into_inner))
    }
    async fn wait_for(&self, bytes: usize) {
        loop {
            let changed = self.changed.notified();
            if self.with(|w| w.fits(bytes)) {
                return;
            }
            changed.await;
        }
    }
}

/// The sending half of a session.
struct Writer {
    sender: SessionSender,
    window: Arc<Window>,
    throttle: Arc<Throttle>,
    patience: Patience,
    pulse: Arc<Pulse>,
    pings: u64,
    pinged: Instant,
    renewal: Option<Arc<Renewal>>,
    let_go: LetGo,
}

/// Whether the engine ended the session. What follows then, a closed connection mostly, is not the collector's doing.
#[derive(Clone, Default)]
struct LetGo(Arc<AtomicBool>);

impl LetGo {
    fn note(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Code and cause of a session's end.
    fn why(&self, end: &WireError) -> (u16, String) {
        match end {
            WireError::Closed if self.0.load(Ordering::SeqCst) => {
                (1489, "the agent ended the session by itself; it was said before why".to_owned())
            }
            WireError::Closed => (end.code(), "the collector closed the connection".to_owned()),
            other => (other.code(), other.to_string()),
        }
    }
}

impl Writer {
    /// Sends what comes until the session fails or the engine lets go of it.
    async fn run(mut self, mut outgoing: mpsc::Receiver<Outgoing>) -> WireError {
        loop {
            match self.next(&mut outgoing).await {
                Ok(true) => {}
                Ok(false) => {
                    self.let_go.note();
                    let _ = self.sender.close().await;
                    return WireError::Closed;
                }
                Err(error) => return error,
            }
        }
    }

    /// Sends the next thing; false if there will be none.
    async fn next(&mut self, outgoing: &mut mpsc::Receiver<Outgoing>) -> Result<bool, WireError> {
        // Also between chunks without a pause: their acknowledgements may be far apart.
        self.upkeep().await?;
        let next = match outgoing.try_recv() {
            Ok(next) => Some(next),
            Err(_) => {
                self.sender.flush().await?;
                self.meanwhile(Wait::Idle, outgoing.recv()).await?
            }
        };
        match next {
            None => return Ok(false),
            Some(Outgoing::Message(message)) => {
                if message == AgentMessage::Goodbye {
                    self.let_go.note();
                }
                self.sender.send(&message).await?;
            }
            Some(Outgoing::Chunk(delta, chunk)) => self.chunk(delta, &chunk).await?,
        }
        Ok(true)
    }

    async fn chunk(&mut self, delta: DeltaId, chunk: &[u8]) -> Result<(), WireError> {
        let window = self.window.clone();
        if !window.with(|w| w.fits(chunk.len())) {
            // What waits in the writer's buffer must go out, or its acknowledgement never comes.
            self.sender.flush().await?;
            let (what, after) = ("it was to take over chunks", self.patience.stall);
            let room = timeout(after, window.wait_for(chunk.len()));
            self.meanwhile(Wait::Engine, room).await?.map_err(|_| WireError::TimedOut { what, after })?;
        }
        let throttle = self.throttle.clone();
        self.meanwhile(Wait::Engine, throttle.acquire(chunk.len() as u64)).await?;
        window.with(|w| w.sent(delta, chunk.len()));
        self.sender.send_chunk(delta, chunk).await
    }

    /// Waits for something, and keeps the session up meanwhile.
    async fn meanwhile<T>(&mut self, wait: Wait, what: impl Future<Output = T>) -> Result<T, WireError> {
        let mut what = pin!(what);
        loop {
            tokio::select! {
                biased;
                done = &mut what => return Ok(done),
                () = sleep_until(self.upkeep_due()) => self.upkeep().await?,
            }
            if wait == Wait::Engine {
                // The engine may stand at the full queue; this wait has limits of its own.
                self.pulse.work();
            }
        }
    }

    /// Pings, and asks for a new certificate, where they are due.
    async fn upkeep(&mut self) -> Result<(), WireError> {
        if let Some(ask) = self.renewal.as_ref().and_then(|renewal| renewal.ask(now_ms())) {
            self.sender.send(&ask).await?;
            self.sender.flush().await?;
        }
        if self.pinged.elapsed() >= self.patience.ping() {
            self.pinged = Instant::now();
            self.pings += 1;
            self.sender.send(&AgentMessage::Ping(self.pings)).await?;
            self.sender.flush().await?;
        }
        Ok(())
    }

    fn upkeep_due(&self) -> Instant {
        let ping = self.pinged + self.patience.ping();
        let renewal = self.renewal.as_ref().map_or(Duration::MAX, |renewal| renewal.due_in(now_ms()));
        ping.min(Instant::now() + renewal.min(self.patience.ping()))
    }
}

/// Who waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Nobody: there is nothing to send.
    Idle,
    /// The engine, perhaps: there is something to send, and it cannot be sent yet.
    Engine,
}

async fn read(
    mut receiver: SessionReceiver,
    (events, groups): (mpsc::Sender<LinkEvent>, mpsc::Sender<Told>),
    window: Arc<Window>,
    renewal: Option<Arc<Renewal>>,
) -> WireError {
    loop {
        match receiver.recv().await {
            Err(error) => return error,
            Ok(CollectorMessage::Received { delta, chunks }) => {
                if let Err(error) = window.with(|w| w.received(delta, chunks)) {
                    return error;
                }
                window.changed.notify_waiters();
            }
            Ok(CollectorMessage::Pong(_)) => {}
            Ok(CollectorMessage::Renewed { cert_pem }) => {
                if let Some(renewal) = &renewal {
                    renewal.renewed(cert_pem);
                }
            }
            Ok(CollectorMessage::NotRenewed(refusal)) => {
                if let Some(renewal) = &renewal {
                    renewal.refused(&refusal);
                }
            }
            // What it does with them does not wait for the engine. Where it cannot take them, they come again, or somebody asks again.
            Ok(CollectorMessage::Group(roster)) => {
                let _ = groups.try_send(Told::Group(roster));
            }
            Ok(CollectorMessage::PointWanted { request, group: Some(group), application }) => {
                let kind = if application { Kind::Application } else { Kind::Crash };
                let _ = groups.try_send(Told::Wanted { request, group, kind });
            }
            Ok(CollectorMessage::Refused(refusal)) if refusal.fatal => return WireError::Refused(refusal),
            Ok(message) => {
                if events.send(LinkEvent::Message(Box::new(message))).await.is_err() {
                    return WireError::Closed;
                }
            }
        }
    }
}

fn hello(machine: MachineId) -> Hello {
    let text = |path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Hello {
        machine,
        version_min: Version::MIN.number(),
        version_max: Version::MAX.number(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        host_name: text("/proc/sys/kernel/hostname"),
        kernel: text("/proc/sys/kernel/osrelease"),
    }
}

/// Any number will do; it only spreads the retries of a fleet.
fn jitter() -> u32 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.subsec_nanos().wrapping_mul(2_654_435_761))
}

impl LinkDown {
    /// From a refusal that did not end the session.
    #[must_use]
    pub fn refusal(refusal: &Refusal) -> Self {
        Self {
            code: refusal.code,
            cause: refusal.cause.clone(),
            action: refusal.action.clone(),
            retry_in: Duration::ZERO,
            critical: true,
            attempt: false,
            failures: 0,
            refused: true,
            at: std::time::Instant::now(),
        }
    }

    /// For operators.
    #[must_use]
    pub fn operator(&self) -> OperatorError {
        OperatorError { code: self.code, cause: self.cause.clone(), action: self.action.clone() }
    }
}

#[cfg(test)]
mod tests;
