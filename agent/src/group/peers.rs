//! Connections to the other members.
//!
//! Whoever has something to say calls; what is called answers over the same connection. There may be two between two members, one from each
//! side; what is said goes over the newest. A connection over which nothing goes for [`IDLE_MAX`] is closed.
//!
//! Nothing here waits for a peer: what does not fit into its queue is dropped, and so is what is said while no connection can be made.

use highwater_delta::MachineId;
use highwater_serve::Place;
use highwater_wire::{
    Credential, Frame, FrameReader, FrameWriter, Identity, PeerMessage, Timeouts, WireError, codec,
    peer::{Stream, call, meet},
};
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

/// A connection over which nothing goes for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// A frame, from its first byte to its last.
const FRAME_MAX: Duration = Duration::from_secs(10);
/// Between two attempts to reach a member.
const PAUSE: Duration = Duration::from_millis(300);
/// Messages that wait for a peer.
const QUEUE_MAX: usize = 64;
/// Frames that a peer may send a second, and at once: with more it is cut off.
const RATE: (f64, f64) = (200.0, 1000.0);
/// Connections that have not shown yet who they are; those that have are bounded by the owner, which keeps a few a machine.
const PLACES: usize = 64;

/// What connections tell the owner.
pub enum Event {
    /// A member is connected.
    Up(Connection),
    /// It said something, over the connection of this number.
    Said(MachineId, u64, PeerMessage),
    /// A connection is over.
    Down(MachineId, u64),
    /// A member cannot be reached.
    Unreachable(MachineId, String),
}

/// A connection as the owner has it. Dropped: it ends.
pub struct Connection {
    pub credential: Credential,
    pub number: u64,
    queue: mpsc::Sender<PeerMessage>,
    over: CancellationToken,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

impl Connection {
    /// False: it does not fit, or nobody is there.
    pub fn say(&self, message: PeerMessage) -> bool {
        self.queue.try_send(message).is_ok()
    }
}

/// What all connections share.
pub struct Shared {
    identity: Box<dyn Fn() -> Arc<Identity> + Send + Sync>,
    events: mpsc::Sender<Event>,
    numbers: AtomicU64,
}

impl Shared {
    pub fn new(
        identity: impl Fn() -> Arc<Identity> + Send + Sync + 'static,
        events: mpsc::Sender<Event>,
    ) -> Arc<Self> {
        let identity = Box::new(identity);
        Arc::new(Self { identity, events, numbers: AtomicU64::new(1) })
    }

    pub fn identity(&self) -> Arc<Identity> {
        (self.identity)()
    }
}

/// Listens until told to stop.
pub async fn listen(shared: Arc<Shared>, listener: TcpListener, stop: CancellationToken) {
    let over = stop.clone();
    highwater_serve::accept(listener, PLACES, stop, Duration::from_millis(100), move |stream, _, place| {
        let (shared, over) = (shared.clone(), over.child_token());
        async move { called(shared, stream, place, over).await }
    })
    .await;
}

async fn called(shared: Arc<Shared>, stream: TcpStream, place: Arc<Place>, over: CancellationToken) {
    let identity = shared.identity();
    let met = tokio::select! {
        met = meet(&identity, stream) => met,
        // A newcomer has its place.
        () = place.evicted.cancelled() => return,
        () = over.cancelled() => return,
    };
    match met {
        Ok((credential, stream)) => {
            // Whoever has shown a certificate needs none of the places of those who have not.
            drop(place);
            carry(&shared, credential, stream, over).await;
        }
        Err(error) => {
            tracing::debug!(%error, "a caller at the group's port has not shown that it is a machine")
        }
    }
}

/// Calls a member; answers when the connection is over, or could not be made.
async fn reach(shared: Arc<Shared>, machine: MachineId, address: String) {
    match call(&shared.identity(), machine, &address).await {
        Ok((credential, stream)) => carry(&shared, credential, stream, CancellationToken::new()).await,
        Err(error) => {
            tokio::time::sleep(PAUSE).await;
            let _ = shared.events.send(Event::Unreachable(machine, error.to_string())).await;
        }
    }
}

/// Moves messages both ways until one way fails.
async fn carry(shared: &Shared, credential: Credential, stream: Box<dyn Stream>, over: CancellationToken) {
    let (machine, number) = (credential.machine, shared.numbers.fetch_add(1, Ordering::Relaxed));
    let timeouts = Timeouts { idle: IDLE_MAX, frame: FRAME_MAX, write: FRAME_MAX };
    let (input, output) = tokio::io::split(stream);
    let (queue, waiting) = mpsc::channel(QUEUE_MAX);
    let up = Event::Up(Connection { credential, number, queue, over: over.clone() });
    if shared.events.send(up).await.is_err() {
        return;
    }
    let ended = tokio::select! {
        ended = read(shared, (machine, number), FrameReader::new(input, timeouts)) => ended,
        ended = write(waiting, FrameWriter::new(output, timeouts)) => ended,
        () = over.cancelled() => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%machine, %error, "a connection to a member has ended");
    }
    let _ = shared.events.send(Event::Down(machine, number)).await;
}

async fn read<R: AsyncRead + Unpin>(
    shared: &Shared,
    (machine, number): (MachineId, u64),
    mut frames: FrameReader<R>,
) -> Result<(), WireError> {
    let mut allowance = Allowance::new(Instant::now());
    while let Some(frame) = frames.next().await? {
        let Frame::Control(body) = frame else { return Err(WireError::Unexpected("a chunk")) };
        if !allowance.take(Instant::now()) {
            return Err(WireError::Unexpected("more messages than the protocol has use for"));
        }
        let message = codec::decode::<PeerMessage>(&body)?;
        if shared.events.send(Event::Said(machine, number, message)).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn write<W: AsyncWrite + Unpin>(
    mut waiting: mpsc::Receiver<PeerMessage>,
    mut frames: FrameWriter<W>,
) -> Result<(), WireError> {
    while let Some(message) = waiting.recv().await {
        frames.control(&codec::encode(&message)?).await?;
        frames.flush().await?;
    }
    Ok(())
}

/// So much at once, and so much a second.
struct Allowance {
    left: f64,
    at: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: RATE.1, at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        (self.left, self.at) = ((self.left + passed * RATE.0).min(RATE.1) - 1.0, now);
        self.left >= 0.0
    }
}

/// Who is connected, and who is being called.
#[derive(Default)]
pub struct Table {
    connected: HashMap<MachineId, Vec<Connection>>,
    calling: HashMap<MachineId, Vec<PeerMessage>>,
}

impl Table {
    /// Says something to a member: calls it, if it is not connected. `address`: where it is.
    pub fn say(
        &mut self,
        shared: &Arc<Shared>,
        machine: MachineId,
        address: Option<&str>,
        message: PeerMessage,
    ) {
        let connections = self.connected.get(&machine).map_or(&[][..], Vec::as_slice);
        // The newest first: an older one may be dead and not know it.
        if connections.iter().rev().any(|connection| connection.say(message.clone())) {
            return;
        }
        if let Some(waiting) = self.calling.get_mut(&machine) {
            if waiting.len() >= QUEUE_MAX / 2 {
                waiting.remove(0);
            }
            waiting.push(message);
            return;
        }
        let Some(address) = address else { return };
        self.calling.insert(machine, vec![message]);
        tokio::spawn(reach(shared.clone(), machine, address.to_owned()));
    }

    pub fn up(&mut self, connection: Connection) {
        let machine = connection.credential.machine;
        for message in self.calling.remove(&machine).unwrap_or_default() {
            connection.say(message);
        }
        let connections = self.connected.entry(machine).or_default();
        connections.push(connection);
        if connections.len() > 2 {
            connections.remove(0);
        }
    }

    /// A connection has ended. Answers whether it was the last one to its machine.
    pub fn down(&mut self, machine: MachineId, number: u64) -> bool {
        // Perhaps it was the one that was called, and showed a certificate that counts no longer.
        self.calling.remove(&machine);
        if let Some(connections) = self.connected.get_mut(&machine) {
            connections.retain(|connection| connection.number != number);
            if connections.is_empty() {
                self.connected.remove(&machine);
                return true;
            }
        }
        false
    }

    pub fn unreachable(&mut self, machine: MachineId) {
        self.calling.remove(&machine);
    }

    /// Ends the connections of all for whom this is false.
    pub fn keep(&mut self, belongs: impl Fn(&Credential) -> bool) {
        for connections in self.connected.values_mut() {
            connections.retain(|connection| belongs(&connection.credential));
        }
        self.connected.retain(|_, connections| !connections.is_empty());
    }

    /// Says something to all who are connected.
    pub fn tell_all(&self, message: &PeerMessage) {
        for connection in self.connected.values().filter_map(|connections| connections.last()) {
            connection.say(message.clone());
        }
    }

    pub fn len(&self) -> usize {
        self.connected.len()
    }

    /// Whether this is a connection of a member: with a certificate that counts.
    pub fn has(&self, machine: MachineId, number: u64) -> bool {
        let connections = self.connected.get(&machine);
        connections
            .is_some_and(|connections| connections.iter().any(|connection| connection.number == number))
    }
}

/// Where to listen.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}
