//! What everybody else gets.

use crate::support::{Agent, Site, point};
use highwater_collector::visits::VISITS_MAX;
use highwater_delta::{CommitId, CommitKind, DeltaId, DiskId, MachineId};
use highwater_wire::frame::{FrameHeader, FrameKind};
use highwater_wire::message::{AgentMessage, CollectorMessage, Hello};
use highwater_wire::{Frame, FrameReader, Identity, Timeouts, WireError, codec, tls};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, client::TlsStream};

fn refused(result: Result<Agent, WireError>) -> u16 {
    match result {
        Err(WireError::Refused(refusal)) => refusal.code,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("welcomed"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machines_name_and_disks_are_out_of_reach() {
    let site = Site::new().await;
    let (one, two, disk) = (site.machine().await, site.machine().await, DiskId::new());
    assert_eq!(refused(site.connect_as(&one, two.machine).await), 1301);
    site.agent(&one, disk).await.deliver(disk, 0, &[1]).await;

    let mut thief = site.connect(&two).await.unwrap();
    thief.disks(&[DiskId::new(), disk]).await;
    let refusal = thief.refusal().await;
    assert_eq!((refusal.code, refusal.retry), (1302, false));

    // Without having named it, a disk cannot be written or asked for either.
    let own = DiskId::new();
    let mut thief = site.agent(&two, own).await;
    let delta = DeltaId::new();
    thief.send(AgentMessage::DeltaBegin(delta)).await;
    let chunk = thief.chunk(disk, 0, &[9]);
    thief.push(delta, &chunk).await;
    thief.sender.flush().await.unwrap();
    assert_eq!(thief.refusal().await.code, 1210);
    let state = site.vault().await.machine(one.machine).await.unwrap();
    assert_eq!(state.last_commit, CommitId(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_machine_is_refused_though_its_certificate_is_good() {
    let site = Site::new().await;
    let csr = highwater_wire::identity::Csr::create().unwrap();
    let authority = &site.running.shared.authority;
    let cert = authority.sign_csr(&csr.csr_pem, MachineId::new()).unwrap();
    let identity = Identity::from_pems(&csr.key_pem, &cert, authority.cert_pem()).unwrap();
    assert_eq!(refused(site.connect(&identity).await), 1209);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_out_of_order_end_the_session_with_the_reason() {
    let site = Site::new().await;
    let identity = site.machine().await;
    let disk = DiskId::new();
    let delta = DeltaId::new();

    let mut agent = site.agent(&identity, disk).await;
    let chunk = agent.chunk(disk, 0, &[1]);
    agent.sender.send_chunk(delta, &chunk).await.unwrap();
    agent.sender.flush().await.unwrap();
    assert_eq!(agent.refusal().await.code, 1304);

    let mut agent = site.agent(&identity, disk).await;
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    agent.push(delta, &chunk).await;
    agent.commit(delta, 2, point(disk)).await;
    let refusal = agent.refusal().await;
    assert_eq!((refusal.code, refusal.retry), (1306, true));

    let mut agent = site.agent(&identity, disk).await;
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    agent.push(delta, &chunk).await;
    let mut damaged = chunk.to_vec();
    damaged[20] ^= 1;
    agent.push(delta, &damaged).await;
    agent.sender.flush().await.unwrap();
    let refusal = agent.refusal().await;
    assert_eq!((refusal.code, refusal.retry), (1212, false));

    let state = site.vault().await.machine(identity.machine).await.unwrap();
    assert_eq!(state.last_commit, CommitId::NONE);
}

/// A client that has shaken hands and says what it wants.
struct Raw {
    stream: TlsStream<TcpStream>,
    sent: u64,
}

impl Raw {
    async fn new(site: &Site, identity: &Identity) -> Self {
        let config =
            tls::agent_client(&identity.ca, identity.cert_chain.clone(), identity.key.clone_key()).unwrap();
        let stream = TcpStream::connect(site.running.ingest).await.unwrap();
        let name = "127.0.0.1".try_into().unwrap();
        Self { stream: TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap(), sent: 0 }
    }

    async fn hello(&mut self, machine: MachineId) {
        let text = String::new;
        let hello = Hello {
            machine,
            version_min: 1,
            version_max: 1,
            agent_version: text(),
            host_name: text(),
            kernel: text(),
        };
        self.control(&codec::encode(&AgentMessage::Hello(hello)).unwrap()).await;
    }

    async fn control(&mut self, body: &[u8]) {
        let header = FrameHeader::new(FrameKind::Control, self.sent, body, body.len()).unwrap();
        self.stream.write_all(&header.encode()).await.unwrap();
        self.stream.write_all(body).await.unwrap();
        self.stream.flush().await.unwrap();
        self.sent += 1;
    }

    /// The code of the refusal that must be the last word.
    async fn refusal(self) -> u16 {
        let mut frames = FrameReader::new(self.stream, Timeouts::default());
        let mut code = 0;
        while let Some(Frame::Control(body)) = frames.next().await.unwrap() {
            if let CollectorMessage::Refused(refusal) = codec::decode(&body).unwrap() {
                code = refusal.code;
            }
        }
        code
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_frames_are_told_by_their_kind() {
    let site = Site::new().await;
    let identity = site.machine().await;
    let ping = codec::encode(&AgentMessage::Ping(1)).unwrap();

    let mut replayed = Raw::new(&site, &identity).await;
    replayed.hello(identity.machine).await;
    replayed.control(&ping).await;
    replayed.sent -= 1;
    replayed.control(&ping).await;
    assert_eq!(replayed.refusal().await, 1107);

    let mut dropped = Raw::new(&site, &identity).await;
    dropped.hello(identity.machine).await;
    dropped.sent += 1;
    dropped.control(&ping).await;
    assert_eq!(dropped.refusal().await, 1107);

    let mut oversized = Raw::new(&site, &identity).await;
    oversized.hello(identity.machine).await;
    let header = FrameHeader { kind: FrameKind::Chunk, sequence: 1, body_bytes: 1 << 30, body_crc: 0 };
    oversized.stream.write_all(&header.encode()).await.unwrap();
    oversized.stream.flush().await.unwrap();
    assert_eq!(oversized.refusal().await, 1106);

    let mut garbage = Raw::new(&site, &identity).await;
    garbage.stream.write_all(&[0xa5; 5000]).await.unwrap();
    garbage.stream.flush().await.unwrap();
    assert_eq!(garbage.refusal().await, 1105);

    let mut nonsense = Raw::new(&site, &identity).await;
    nonsense.hello(identity.machine).await;
    nonsense.control(&[0xff; 100]).await;
    assert_eq!(nonsense.refusal().await, 1108);

    let mut impatient = Raw::new(&site, &identity).await;
    impatient.control(&ping).await;
    assert_eq!(impatient.refusal().await, 1311);

    let mut future = Raw::new(&site, &identity).await;
    let hello = Hello {
        machine: identity.machine,
        version_min: 7,
        version_max: 9,
        agent_version: String::new(),
        host_name: String::new(),
        kernel: String::new(),
    };
    future.control(&codec::encode(&AgentMessage::Hello(hello)).unwrap()).await;
    assert_eq!(future.refusal().await, 1110);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_ones_are_not_waited_for() {
    let site = Site::with(|config| {
        config.handshake_timeout = Duration::from_millis(300);
        config.idle_timeout = Duration::from_secs(1);
        config.handshakes_max = 2;
    })
    .await;
    let identity = site.machine().await;
    let begun = Instant::now();
    // More than may shake hands at once, none of which says anything.
    let mut silent = Vec::new();
    for _ in 0..6 {
        silent.push(TcpStream::connect(site.running.ingest).await.unwrap());
    }
    for mut stream in silent {
        let closed = stream.read(&mut [0; 100]).await;
        assert!(matches!(closed, Ok(0) | Err(_)));
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    // No hello after the handshake; then, silence within a session.
    assert_eq!(Raw::new(&site, &identity).await.refusal().await, 1102);
    let mut agent = site.connect(&identity).await.unwrap();
    assert_eq!(agent.refusal().await.code, 1102);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_only_connects_keeps_nobody_out() {
    let site = Site::with(|config| config.sessions_max = 2).await;
    let (silent, other) = (site.machine().await, site.machine().await);
    let mut held = Vec::new();
    for _ in 0..12 {
        held.push(Raw::new(&site, &silent).await);
    }
    // Those beyond what one machine may have are closed, and the others have no session.
    let mut closed = 0;
    for raw in &mut held {
        let read = timeout(Duration::from_millis(500), raw.stream.read(&mut [0; 100])).await;
        closed += usize::from(matches!(read, Ok(Ok(0) | Err(_))));
    }
    assert_eq!(closed, held.len() - usize::from(VISITS_MAX));
    let mut agent = site.connect(&other).await.unwrap();
    // Nor do they keep it from coming back.
    let again = site.connect(&other).await.unwrap();
    assert_eq!(agent.refusal().await.code, 1307);
    drop((held, again));
    let mut tries = 0;
    while site.connect(&silent).await.is_err() {
        tries += 1;
        assert!(tries < 50);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_sessions_and_memory_are_said() {
    let site = Site::with(|config| {
        config.sessions_max = 2;
        config.window = 1 << 20;
        config.memory = 3 << 20;
    })
    .await;
    let (one, two, three) = (site.machine().await, site.machine().await, site.machine().await);
    let first = site.connect(&one).await.unwrap();
    let second = site.connect(&two).await.unwrap();
    assert_eq!((first.welcome.window_bytes, second.welcome.window_bytes), (1 << 20, 512 << 10));
    assert_eq!(refused(site.connect(&three).await), 1309);
    second.sender.close().await.unwrap();
    drop(second.receiver);
    // The place is free once the collector has noticed.
    let mut tries = 0;
    while site.connect(&three).await.is_err() {
        tries += 1;
        assert!(tries < 50);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_vault_is_said_and_earlier_points_stay() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    agent.deliver(disk, 0, &[1]).await;
    // No object can be put into what is no directory.
    let segments = site.vault_dir().join(format!("machines/{}/segments", identity.machine));
    let aside = segments.with_file_name("aside");
    std::fs::rename(&segments, &aside).unwrap();
    std::fs::write(&segments, "").unwrap();
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let chunk = agent.chunk(disk, 0, &[2]);
    agent.push(delta, &chunk).await;
    agent.commit(delta, 1, CommitKind::Partial).await;
    let refusal = agent.refusal().await;
    assert_eq!(refusal.code / 100, 12, "{refusal:?}");
    assert!(refusal.retry, "{refusal:?}");
    std::fs::remove_file(&segments).unwrap();
    std::fs::rename(&aside, &segments).unwrap();
    let mut agent = site.agent(&identity, disk).await;
    assert_eq!(agent.welcome.last_commit, CommitId(1));
    assert_eq!(agent.deliver(disk, 0, &[3]).await, CommitId(2));
    assert!(site.metrics().await.contains("highwater_collector_vault_errors_total 1\n"));
}
