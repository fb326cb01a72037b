use super::*;
use crate::cache::medium::{Backing, Medium};
use crate::metrics::{CacheMetrics, Metrics};
use highwater_wire::message::CollectorMessage;
use highwater_wire::{Frame, FrameReader, Timeouts, codec};
use std::io;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use tokio::time::timeout;

const GUARD: Duration = Duration::from_secs(20);

/// A disk that does not answer until it is let go.
struct Hangs {
    asked: blocking::SyncSender<()>,
    let_go: Mutex<blocking::Receiver<()>>,
}

impl Medium for Hangs {
    fn create(&self) -> io::Result<Box<dyn Backing>> {
        self.asked.send(()).unwrap();
        let _ = locked(&self.let_go).recv();
        Err(io::ErrorKind::TimedOut.into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_keeps_no_session_from_its_end() {
    let (asked, is_asked) = blocking::sync_channel(1);
    let (let_it_go, let_go) = blocking::sync_channel(1);
    let medium = Hangs { asked, let_go: Mutex::new(let_go) };
    let cache = Cache::over(Arc::new(medium), 64 << 20, &CacheMetrics::default());
    let intake = Intake::new(MachineId::new(), Some(cache));
    let (near, _far) = tokio::io::duplex(1 << 16);
    let out = Out::new(near, Timeouts::default());
    let (sender, receiver) = mpsc::channel(QUEUE_FRAMES);
    let (window, metrics, stop) = (Semaphore::new(0), Metrics::default(), CancellationToken::new());
    sender.send(Incoming::Chunk(DeltaId::new(), Bytes::from_static(b"waits"))).await.unwrap();
    let stopping = async {
        tokio::task::spawn_blocking(move || is_asked.recv_timeout(GUARD)).await.unwrap().unwrap();
        stop.cancel();
    };
    let running = intake.run(receiver, (&out, &window, &metrics), &stop);
    let ended = timeout(GUARD, async { tokio::join!(running, stopping) }).await;
    let_it_go.send(()).unwrap();
    assert!(ended.is_ok(), "the session does not end");
    assert_eq!(window.available_permits(), 0, "nothing was taken over");
}

/// The owner holds one chunk in its hand; those behind it wait too long.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_acknowledged_is_given_back_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), 64 << 20, &CacheMetrics::default()).unwrap();
    let intake = Intake::new(MachineId::new(), Some(cache));
    let (near, far) = tokio::io::duplex(1 << 16);
    let out = Out::new(near, Timeouts::default());
    let mut peer = FrameReader::new(far, Timeouts::default());
    let (sender, receiver) = mpsc::channel(QUEUE_FRAMES);
    let (window, metrics, stop) = (Semaphore::new(0), Metrics::default(), CancellationToken::new());
    let delta = DeltaId::new();
    let chunk = |n: u8| Bytes::from(vec![n; 1000]);
    for n in 1..=5 {
        sender.send(Incoming::Chunk(delta, chunk(n))).await.unwrap();
    }
    let owner = async {
        let mut front = Front::default();
        let Incoming::Chunk(_, first) = intake.next(&mut front).await else { panic!() };
        assert_eq!(first, chunk(1));
        // It is at it for long. All are acknowledged meanwhile, its own included.
        let body = match peer.next().await.unwrap().unwrap() {
            Frame::Control(body) => body,
            other => panic!("{other:?}"),
        };
        let told: CollectorMessage = codec::decode(&body).unwrap();
        assert_eq!(told, CollectorMessage::Received { delta, chunks: 5 });
        assert_eq!(window.available_permits(), 5000);
        intake.done(&out, &metrics);
        for n in 2..=5 {
            let Incoming::Chunk(of, next) = intake.next(&mut front).await else { panic!() };
            assert_eq!((of, next), (delta, chunk(n)));
            intake.done(&out, &metrics);
        }
        assert_eq!(out.due(), 0, "given back a second time");
        // As before: from memory, and acknowledged when the owner is done.
        sender.send(Incoming::Chunk(delta, chunk(6))).await.unwrap();
        let Incoming::Chunk(_, last) = intake.next(&mut front).await else { panic!() };
        assert_eq!((last, out.due()), (chunk(6), 0));
        intake.done(&out, &metrics);
        assert_eq!(out.due(), 1000);
        stop.cancel();
    };
    let running = intake.run(receiver, (&out, &window, &metrics), &stop);
    timeout(GUARD, async { tokio::join!(running, owner) }).await.unwrap();
}
