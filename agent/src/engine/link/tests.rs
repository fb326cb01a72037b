use super::*;
use highwater_wire::{Frame, FrameReader, FrameWriter, codec};
use std::sync::atomic::AtomicU64;
use tokio::io::DuplexStream;

const CHUNK_BYTES: usize = 1000;
const SILENCE: Duration = Duration::from_millis(600);
const STALL: Duration = Duration::from_millis(1200);
const HOUR: Duration = Duration::from_secs(3600);

/// How a collector behaves once it has said its welcome.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// As it should.
    Good,
    /// Takes everything and says nothing.
    Silent,
    /// Answers pings and takes nothing over.
    Stalled,
    /// Closes the connection once something has come.
    Leaving,
    /// Takes nothing off the wire, as a host that is gone.
    Dead,
}

struct Fake {
    end: tokio::task::JoinHandle<WireError>,
    queue: mpsc::Sender<Outgoing>,
    pings: Arc<AtomicU64>,
    pulse: Arc<Pulse>,
    began: Instant,
    let_go: LetGo,
    _events: mpsc::Receiver<LinkEvent>,
}

async fn collector(stream: DuplexStream, manner: Manner, pings: Arc<AtomicU64>) {
    let (input, output) = tokio::io::split(stream);
    let mut frames = FrameReader::new(input, Timeouts::default());
    let mut out = FrameWriter::new(output, Timeouts::default());
    let mut chunks = 0;
    if manner == Manner::Dead {
        return tokio::time::sleep(HOUR).await;
    }
    while let Ok(Some(frame)) = frames.next().await {
        if manner == Manner::Leaving {
            return;
        }
        let answer = match frame {
            Frame::Control(body) => match codec::decode(&body) {
                Ok(AgentMessage::Ping(number)) => {
                    pings.fetch_add(1, Ordering::Relaxed);
                    CollectorMessage::Pong(number)
                }
                _ => continue,
            },
            Frame::Chunk { .. } if manner == Manner::Stalled => continue,
            Frame::Chunk { delta, .. } => {
                chunks += 1;
                CollectorMessage::Received { delta, chunks }
            }
        };
        if manner != Manner::Silent {
            out.control(&codec::encode(&answer).unwrap()).await.unwrap();
            out.flush().await.unwrap();
        }
    }
}

/// A session whose window holds two chunks.
fn session(manner: Manner, bandwidth: Option<u64>) -> Fake {
    let (near, far) = tokio::io::duplex(4096);
    let pings = Arc::new(AtomicU64::new(0));
    tokio::spawn(collector(far, manner, pings.clone()));
    let (input, output) = tokio::io::split(near);
    let timeouts = Timeouts { idle: SILENCE, ..Timeouts::default() };
    let pulse = Arc::new(Pulse::new(SILENCE, SILENCE));
    let writer = Writer {
        sender: SessionSender::over(output, timeouts),
        window: Window::of(2 * CHUNK_BYTES as u64),
        throttle: Arc::new(Throttle::new(bandwidth)),
        patience: Patience { silence: SILENCE, stall: STALL, retry_unit: HOUR },
        pulse: pulse.clone(),
        pings: 0,
        pinged: Instant::now(),
        renewal: None,
        let_go: LetGo::default(),
    };
    let let_go = writer.let_go.clone();
    let (queue, outgoing) = mpsc::channel(QUEUE_MAX);
    let (sender, events) = mpsc::channel(256);
    let end = tokio::spawn(carry(
        writer,
        outgoing,
        SessionReceiver::over(input, timeouts),
        (sender, mpsc::channel(1).0),
    ));
    Fake { end, queue, pings, pulse, began: Instant::now(), let_go, _events: events }
}

impl Fake {
    async fn send(&self, chunks: usize) {
        let delta = DeltaId::new();
        self.queue.send(Outgoing::Message(AgentMessage::DeltaBegin(delta))).await.unwrap();
        for _ in 0..chunks {
            if self.queue.send(Outgoing::Chunk(delta, vec![7; CHUNK_BYTES])).await.is_err() {
                return;
            }
        }
    }

    /// Why and when the session ended.
    async fn ended(self) -> (WireError, Duration) {
        let error = timeout(Duration::from_secs(20), self.end).await.expect("it goes on for ever").unwrap();
        (error, self.began.elapsed())
    }
}

#[tokio::test]
async fn a_good_collector_is_kept_for_as_long_as_it_answers() {
    let fake = session(Manner::Good, None);
    fake.send(50).await;
    tokio::time::sleep(SILENCE * 5).await;
    assert!(!fake.end.is_finished(), "{:?}", fake.end.await);
    let pings = fake.pings.load(Ordering::Relaxed);
    assert!((8..=16).contains(&pings), "{pings} pings in five times the silence");
    drop(fake.queue);
    let end = fake.end.await.unwrap();
    assert!(matches!(end, WireError::Closed));
    assert_eq!(fake.let_go.why(&end).0, 1489, "blamed on the collector");
}

/// Who closes the connection says nothing about who ended the session.
#[tokio::test]
async fn an_end_is_blamed_on_who_caused_it() {
    for (goodbye, code) in [(true, 1489), (false, 1104)] {
        let fake = session(Manner::Leaving, None);
        // Anything makes it close the connection.
        let message = if goodbye { AgentMessage::Goodbye } else { AgentMessage::DeltaAbort(DeltaId::new()) };
        fake.queue.send(Outgoing::Message(message)).await.unwrap();
        let let_go = fake.let_go.clone();
        let (end, _) = fake.ended().await;
        assert_eq!(let_go.why(&end).0, code, "{end}");
    }
}

#[tokio::test]
async fn a_silent_collector_is_found_whether_there_is_something_to_send_or_not() {
    for (manner, chunks) in
        [(Manner::Silent, 0), (Manner::Silent, 2), (Manner::Silent, 9), (Manner::Dead, 0), (Manner::Dead, 9)]
    {
        let fake = session(manner, None);
        fake.send(chunks).await;
        let (error, after) = fake.ended().await;
        assert_eq!(error.code(), 1102, "{error}");
        assert!(after >= SILENCE && after < SILENCE * 2, "{after:?} with {chunks} chunks");
    }
}

/// It shows that it lives, and takes nothing over: the engine is trusted meanwhile, and let go in time.
#[tokio::test]
async fn a_stalled_collector_is_given_up() {
    let fake = session(Manner::Stalled, None);
    fake.send(9).await;
    tokio::time::sleep(SILENCE + SILENCE / 3).await;
    assert!(!fake.end.is_finished(), "a collector that lives was taken to be gone");
    assert_eq!(fake.pulse.overdue(), None, "waiting for a collector looks like a hang");
    let (error, after) = fake.ended().await;
    let WireError::TimedOut { what, .. } = &error else { panic!("{error}") };
    assert!(what.contains("take over") && error.code() == 1102);
    assert!(after >= STALL && after < STALL * 2, "{after:?}");
}

/// A chunk that waits longer for its turn than a silence may last.
#[tokio::test]
async fn a_low_bandwidth_is_no_silence_and_no_hang() {
    // The first 64 KiB are a burst.
    let fake = session(Manner::Good, Some(300));
    fake.send(70).await;
    tokio::time::sleep(SILENCE * 4).await;
    assert!(!fake.end.is_finished(), "{:?}", fake.end.await);
    assert_eq!(fake.pulse.overdue(), None);
    fake.end.abort();
}

#[tokio::test]
async fn an_idle_session_vouches_for_nobody() {
    let fake = session(Manner::Good, None);
    tokio::time::sleep(SILENCE * 2).await;
    assert!(fake.pulse.overdue().is_some(), "the session answers for an engine that has nothing to send");
}

/// An operator who asks during an outage is answered at once, and does not make the waiting longer.
#[tokio::test]
async fn a_wake_is_tried_at_once_and_begins_the_waits_anew() {
    use highwater_wire::identity::{Authority, Csr};
    let (ca, dir) = (Authority::create("test").unwrap(), tempfile::tempdir().unwrap());
    let csr = Csr::create().unwrap();
    let cert = ca.sign_csr(&csr.csr_pem, MachineId::new()).unwrap();
    let identity = highwater_wire::Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap();
    identity.save(dir.path()).unwrap();
    let renewal = Arc::new(Renewal::new(dir.path().to_owned(), identity).unwrap());
    // Nobody listens there any more.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint =
        Endpoint { address: listener.local_addr().unwrap().to_string(), server_name: "127.0.0.1".into() };
    drop(listener);
    let patience = Patience { silence: SILENCE, stall: STALL, retry_unit: HOUR };
    let (sender, mut events) = mpsc::channel(16);
    let (wake, pulse) = (Arc::new(Notify::new()), Arc::new(Pulse::new(SILENCE, SILENCE)));
    let throttle = Arc::new(Throttle::new(None));
    let reachable = highwater_wire::message::Reachable { host: None, port: 20004 };
    let groups = Groups { told: mpsc::channel(1).0, reachable };
    let link =
        tokio::spawn(run(endpoint, renewal, patience, (throttle, pulse), groups, sender, wake.clone()));
    for attempt in 0..20 {
        let event = timeout(Duration::from_secs(5), events.recv()).await.expect("it waits").unwrap();
        let LinkEvent::Down(down) = event else { panic!("{event:?}") };
        assert!(down.attempt && !down.critical && down.code == 1101, "{down:?}");
        assert_eq!(down.failures, 1, "attempt {attempt}");
        assert!(down.retry_in <= HOUR / 60, "{down:?}");
        wake.notify_one();
    }
    link.abort();
}
