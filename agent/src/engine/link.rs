//! The session with the collector: kept up by a task of its own, which connects, backs off, and moves messages.
//!
//! The engine sends through the [`mpsc::Sender`] that comes with [`LinkEvent::Up`]. When the session ends, that sender is closed:
//! whatever was queued is dropped, and [`LinkEvent::Down`] follows. So nothing of one session is ever sent in another.
//! Chunks wait for the window; the queue is bounded, so a slow collector slows the readers down (invariant I7).

use crate::{error::OperatorError, throttle::Throttle};
use highwater_delta::{CHUNK_BYTES_MAX, DeltaId, MachineId};
use highwater_wire::{
    Backoff, Identity, SendWindow, SessionReceiver, SessionSender, WireError,
    client::{PING_INTERVAL, connect},
    message::{AgentMessage, CollectorMessage, Hello, Refusal, Welcome},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};

/// Chunks and messages that may wait for the network.
pub const QUEUE_MAX: usize = 32;
/// A collector that takes nothing over for so long is given up, though it shows that it lives: what waits in the queue
/// holds up the engine.
const STALL_MAX: Duration = Duration::from_secs(180);
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
    /// `None`: not by itself; somebody must act.
    pub retry_in: Option<Duration>,
    /// Failures in a row.
    pub failures: usize,
    /// The collector itself said so, and goes on saying it until something changes there.
    pub refused: bool,
    /// Since when.
    pub at: std::time::Instant,
}

/// Runs until the engine is gone. `wake` ends a back-off early.
pub async fn run(
    endpoint: Endpoint,
    identity: Arc<Identity>,
    unit: Duration,
    throttle: Arc<Throttle>,
    events: mpsc::Sender<LinkEvent>,
    wake: Arc<Notify>,
) {
    let mut backoff = Backoff::new(unit);
    while !events.is_closed() {
        let started = Instant::now();
        let end = session(&endpoint, &identity, &throttle, &events).await;
        // A session that the collector ended with a refusal was no success, however long it lasted.
        let refused = matches!(end, WireError::Refused(_));
        if !refused && started.elapsed() >= STABLE.min(unit * 10) {
            backoff.reset();
        }
        let retry_in = backoff.next(end.retry(), jitter());
        let down = LinkDown {
            code: end.code(),
            cause: end.to_string(),
            action: end.action(),
            retry_in,
            failures: backoff.failures(),
            refused,
            at: std::time::Instant::now(),
        };
        if events.send(LinkEvent::Down(down)).await.is_err() {
            return;
        }
        match retry_in {
            Some(wait) => drop(timeout(wait, wake.notified()).await),
            None => wake.notified().await,
        }
    }
}

/// One session; answers why it ended.
async fn session(
    endpoint: &Endpoint,
    identity: &Identity,
    throttle: &Arc<Throttle>,
    events: &mpsc::Sender<LinkEvent>,
) -> WireError {
    let hello = hello(identity.machine);
    let (welcome, sender, receiver) =
        match connect(&endpoint.address, &endpoint.server_name, identity, hello).await {
            Ok(session) => session,
            Err(error) => return error,
        };
    if welcome.window_bytes < CHUNK_BYTES_MAX as u64 {
        // Not even one chunk could ever be sent.
        return WireError::Unexpected("a welcome with a window smaller than a chunk");
    }
    let window = Arc::new(Window {
        window: Mutex::new(SendWindow::new(welcome.window_bytes)),
        changed: Notify::new(),
    });
    let (queue, outgoing) = mpsc::channel(QUEUE_MAX);
    if events.send(LinkEvent::Up(Box::new(welcome), queue)).await.is_err() {
        return WireError::Closed;
    }
    let write = write(sender, outgoing, window.clone(), throttle.clone());
    let read = read(receiver, events.clone(), window);
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

async fn write(
    mut sender: SessionSender,
    mut outgoing: mpsc::Receiver<Outgoing>,
    window: Arc<Window>,
    throttle: Arc<Throttle>,
) -> WireError {
    let mut ping = 0;
    loop {
        let next = match outgoing.try_recv() {
            Ok(next) => Some(next),
            Err(_) => {
                if let Err(error) = sender.flush().await {
                    return error;
                }
                tokio::select! {
                    next = outgoing.recv() => match next {
                        Some(next) => Some(next),
                        None => {
                            let _ = sender.close().await;
                            return WireError::Closed;
                        }
                    },
                    () = sleep(PING_INTERVAL) => None,
                }
            }
        };
        let sent = match next {
            None => {
                ping += 1;
                sender.send(&AgentMessage::Ping(ping)).await
            }
            Some(Outgoing::Message(message)) => sender.send(&message).await,
            Some(Outgoing::Chunk(delta, chunk)) => {
                if !window.with(|w| w.fits(chunk.len())) {
                    // What waits in the writer's buffer must go out, or its acknowledgement never comes.
                    if let Err(error) = sender.flush().await {
                        return error;
                    }
                    let what = "it was to take over chunks";
                    if timeout(STALL_MAX, window.wait_for(chunk.len())).await.is_err() {
                        return WireError::TimedOut { what, after: STALL_MAX };
                    }
                }
                throttle.acquire(chunk.len() as u64).await;
                window.with(|w| w.sent(delta, chunk.len()));
                sender.send_chunk(delta, &chunk).await
            }
        };
        if let Err(error) = sent {
            return error;
        }
    }
}

async fn read(
    mut receiver: SessionReceiver,
    events: mpsc::Sender<LinkEvent>,
    window: Arc<Window>,
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
        version_min: highwater_wire::Version::MIN.number(),
        version_max: highwater_wire::Version::MAX.number(),
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
            retry_in: None,
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
