//! A TCP proxy between agent and collector that can cut, stall, delay, slow down and corrupt, at any moment.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const POLL: Duration = Duration::from_millis(5);
const BUFFER_BYTES: usize = 16 << 10;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From who connected to the target.
    Up,
    /// Back.
    Down,
}

/// A proxy on 127.0.0.1; all its connections end when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    refuse: AtomicBool,
    stalled: AtomicBool,
    delay_us: AtomicU64,
    /// Zero: no limit.
    rate_bytes_per_s: AtomicU64,
    ways: [WayState; 2],
    streams: Mutex<Vec<TcpStream>>,
    connections: AtomicU64,
    /// Where new connections go from now on, if elsewhere.
    redirected: Mutex<Option<SocketAddr>>,
}

#[derive(Default)]
struct WayState {
    passed: AtomicU64,
    /// Position in `passed` of the byte to be flipped, plus one; zero: none.
    flip_at: AtomicU64,
    /// Position at which all connections are cut, plus one; zero: none.
    cut_at: AtomicU64,
}

impl Proxy {
    /// A proxy before a target.
    pub fn to(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let state = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("proxy".to_owned())
            .spawn(move || accept(&listener, target, &state))
            .context("cannot start a thread")?;
        Ok(Proxy { address, shared, acceptor: Some(acceptor) })
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections; new ones are accepted.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// Ends all connections; new ones go to another target.
    pub fn redirect(&self, target: SocketAddr) {
        *self.shared.redirected.lock().unwrap_or_else(PoisonError::into_inner) = Some(target);
        self.shared.cut();
    }

    /// Ends all connections and closes new ones at once, until `heal`.
    pub fn sever(&self) {
        self.shared.refuse.store(true, Ordering::SeqCst);
        self.shared.cut();
    }

    /// Keeps connections open and passes nothing, until `heal`.
    pub fn stall(&self) {
        self.shared.stalled.store(true, Ordering::SeqCst);
    }

    /// Back to passing everything at once.
    pub fn heal(&self) {
        self.shared.refuse.store(false, Ordering::SeqCst);
        self.shared.stalled.store(false, Ordering::SeqCst);
        self.set_delay(Duration::ZERO);
        self.set_rate(0);
    }

    /// Holds every piece back for so long, each way.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.delay_us.store(delay.as_micros() as u64, Ordering::SeqCst);
    }

    /// At most so many bytes per second for each connection and way; zero for no limit.
    pub fn set_rate(&self, bytes_per_s: u64) {
        self.shared.rate_bytes_per_s.store(bytes_per_s, Ordering::SeqCst);
    }

    /// Flips one bit of the byte that comes after `bytes` more, over all connections.
    pub fn flip_bit_after(&self, way: Way, bytes: u64) {
        let state = self.shared.way(way);
        state.flip_at.store(state.passed.load(Ordering::SeqCst) + bytes + 1, Ordering::SeqCst);
    }

    /// Cuts all connections after so many more bytes.
    pub fn cut_after(&self, way: Way, bytes: u64) {
        let state = self.shared.way(way);
        state.cut_at.store(state.passed.load(Ordering::SeqCst) + bytes + 1, Ordering::SeqCst);
    }

    /// How many bytes have passed.
    pub fn passed_bytes(&self, way: Way) -> u64 {
        self.shared.way(way).passed.load(Ordering::SeqCst)
    }

    /// How many connections were made.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.cut();
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().ok();
        }
        self.shared.cut();
    }
}

impl Shared {
    fn way(&self, way: Way) -> &WayState {
        &self.ways[way as usize]
    }

    fn streams(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        for stream in self.streams().drain(..) {
            stream.shutdown(Shutdown::Both).ok();
        }
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>) {
    while !shared.stop.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((client, _)) if !shared.refuse.load(Ordering::SeqCst) => {
                // A target that is down closes the client, as a real one would refuse it.
                let elsewhere = *shared.redirected.lock().unwrap_or_else(PoisonError::into_inner);
                connect(client, elsewhere.unwrap_or(target), shared).ok();
            }
            Ok(_) => {}
            Err(_) => thread::sleep(POLL),
        }
    }
}

fn connect(client: TcpStream, target: SocketAddr, shared: &Arc<Shared>) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let server = TcpStream::connect(target)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        shared.streams().push(stream.try_clone()?);
    }
    shared.connections.fetch_add(1, Ordering::SeqCst);
    for (from, to, way) in [(client.try_clone()?, server.try_clone()?, Way::Up), (server, client, Way::Down)]
    {
        let shared = Arc::clone(shared);
        // Not joined: it ends when its streams are shut down, and holds nothing else.
        thread::spawn(move || {
            pump(&from, &to, way, &shared).ok();
            from.shutdown(Shutdown::Both).ok();
            to.shutdown(Shutdown::Both).ok();
        });
    }
    Ok(())
}

fn pump(mut from: &TcpStream, mut to: &TcpStream, way: Way, shared: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let state = shared.way(way);
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        while shared.stalled.load(Ordering::SeqCst) && !shared.stop.load(Ordering::SeqCst) {
            thread::sleep(POLL);
        }
        let delay = shared.delay_us.load(Ordering::SeqCst);
        if delay > 0 {
            thread::sleep(Duration::from_micros(delay));
        }
        let piece = &mut buffer[..count];
        let start = state.passed.fetch_add(count as u64, Ordering::SeqCst);
        if let Some(at) = take_if_within(&state.flip_at, start, count) {
            piece[at] ^= 0x10;
        }
        let cut = take_if_within(&state.cut_at, start, count);
        let piece = &piece[..cut.unwrap_or(count)];
        write_at_rate(&mut to, piece, shared)?;
        if cut.is_some() {
            to.flush()?;
            shared.cut();
            return Ok(());
        }
    }
}

/// The index within this piece of the position asked for, which is then done with.
fn take_if_within(position: &AtomicU64, start: u64, count: usize) -> Option<usize> {
    let wanted = position.load(Ordering::SeqCst).checked_sub(1)?;
    let at = wanted.saturating_sub(start);
    if at >= count as u64 {
        return None;
    }
    position.store(0, Ordering::SeqCst);
    usize::try_from(at).ok()
}

fn write_at_rate(to: &mut &TcpStream, piece: &[u8], shared: &Shared) -> io::Result<()> {
    let rate = shared.rate_bytes_per_s.load(Ordering::SeqCst);
    if rate == 0 {
        return to.write_all(piece);
    }
    let started = Instant::now();
    let mut sent = 0;
    // Twenty portions a second, so that a changed rate shows soon and a stop is not waited for. Each arrives when a
    // link of that rate would have carried it.
    for part in piece.chunks(usize::try_from(rate / 20).unwrap_or(usize::MAX).max(1)) {
        let due = Duration::from_secs_f64((sent + part.len()) as f64 / rate as f64);
        thread::sleep(due.saturating_sub(started.elapsed()));
        if shared.stop.load(Ordering::SeqCst) || shared.rate_bytes_per_s.load(Ordering::SeqCst) != rate {
            return to.write_all(&piece[sent..]);
        }
        to.write_all(part)?;
        sent += part.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
