//! A collector of its own for each test, and an agent that says what it is told to.

use bytes::Bytes;
use highwater_collector::certificates::{self, Origin};
use highwater_collector::clock::now_ms;
use highwater_collector::config::Config;
use highwater_collector::{Collector, Running, init, tokens};
use highwater_delta::{
    BLOCK_BYTES, Block, CommitId, CommitKind, Consistency, DeltaId, DiskId, Extent, Fill, HashKey, MachineId,
    PointDisk, PointInfo, encode_chunk,
};
use highwater_faults::Faulty;
use highwater_vault::{KeySource, Location, Store, Vault, local_store};
use highwater_wire::certificate::fingerprint;
use highwater_wire::client::connect_with;
use highwater_wire::enroll::{Token, enroll};
use highwater_wire::identity::{Csr, Grant};
use highwater_wire::message::{
    AgentMessage, CollectorMessage, DeltaCommit, DiskInfo, Hello, Refusal, Welcome,
};
use highwater_wire::{Identity, SendWindow, SessionReceiver, SessionSender, Timeouts, Version, WireError};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

pub const DISK_BLOCKS: u64 = 4096;

pub struct Site {
    pub running: Running,
    pub dir: TempDir,
}

impl Site {
    pub async fn new() -> Self {
        Self::with(|_| ()).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let (dir, mut config) = Self::made().await;
        change(&mut config);
        Self { running: Collector::start(config).await.unwrap(), dir }
    }

    /// The same whose store can be told to misbehave.
    pub async fn faulty(change: impl FnOnce(&mut Config)) -> (Self, Arc<Faulty>) {
        let (dir, mut config) = Self::made().await;
        change(&mut config);
        let mut layer = None;
        let store = Store::open(&config.vault).unwrap();
        let store = store.layered(|objects| layer.insert(Faulty::new(objects)).clone());
        let key = KeySource::File(config.key_file.clone().unwrap());
        let vault = Vault::unlock(store, &key).await.unwrap();
        let running = Collector::start_with(config, vault).await.unwrap();
        (Self { running, dir }, layer.unwrap())
    }

    async fn made() -> (TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        let vault = Location::Directory(dir.path().join("vault"));
        Self::made_at(dir, vault).await
    }

    /// One whose vault lies elsewhere.
    pub async fn at(vault: Location) -> Self {
        let (dir, config) = Self::made_at(tempfile::tempdir().unwrap(), vault).await;
        Self { running: Collector::start(config).await.unwrap(), dir }
    }

    async fn made_at(dir: TempDir, vault: Location) -> (TempDir, Config) {
        let names = vec!["127.0.0.1".to_owned()];
        let made = init::init(dir.path(), &vault, names, init::Key::NewFile).await.unwrap();
        let mut config = Config::load(&made.config).unwrap();
        for address in [&mut config.listen, &mut config.management_listen, &mut config.metrics_listen] {
            *address = "127.0.0.1:0".parse().unwrap();
        }
        config.enrolments_per_second = 1000;
        (dir, config)
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.running.management.port())
    }

    pub fn vault_dir(&self) -> PathBuf {
        self.dir.path().join("vault")
    }

    /// The vault as somebody else opens it.
    pub async fn vault(&self) -> Vault {
        let key = KeySource::File(self.dir.path().join("vault.key"));
        Vault::unlock(local_store(&self.vault_dir()).unwrap(), &key).await.unwrap()
    }

    pub async fn token(&self, ttl: Duration) -> Token {
        let shared = &self.running.shared;
        tokens::create(&shared.vault, fingerprint(shared.authority.cert()), now_ms(), ttl, None, None)
            .await
            .unwrap()
    }

    /// A machine enrolled the long way, over HTTPS.
    pub async fn enrolled(&self) -> Identity {
        let token = self.token(Duration::from_secs(60)).await;
        enroll(&self.url(), &token, "host").await.unwrap().identity
    }

    /// A machine enrolled the short way.
    pub async fn machine(&self) -> Identity {
        let machine = MachineId::new();
        let shared = &self.running.shared;
        shared.vault.register_machine(machine, "host").await.unwrap();
        let csr = Csr::create().unwrap();
        let cert = shared.authority.sign_csr(&csr.csr_pem, machine).unwrap();
        Identity::from_pems(&csr.key_pem, &cert, shared.authority.cert_pem()).unwrap()
    }

    /// The same, valid for some time, of some generation.
    pub async fn machine_for(&self, machine: MachineId, generation: u32, validity: Duration) -> Identity {
        let shared = &self.running.shared;
        shared.vault.register_machine(machine, "host").await.unwrap();
        let csr = Csr::create().unwrap();
        let grant = Grant { machine, generation, validity };
        let cert = certificates::issue(shared, &csr.csr_pem, grant, Origin::Enrolment).await.unwrap();
        Identity::from_pems(&csr.key_pem, &cert, shared.authority.cert_pem()).unwrap()
    }

    pub async fn connect(&self, identity: &Identity) -> Result<Agent, WireError> {
        self.connect_as(identity, identity.machine).await
    }

    pub async fn connect_as(&self, identity: &Identity, machine: MachineId) -> Result<Agent, WireError> {
        Agent::connect(&self.running.ingest.to_string(), identity, machine).await
    }

    /// Connects a machine that knows of groups, and names one disk.
    pub async fn member(&self, identity: &Identity, disk: DiskId) -> Agent {
        let address = self.running.ingest.to_string();
        let mut agent = Agent::connect_in(&address, identity, identity.machine, Version::V3).await.unwrap();
        agent.disks(&[disk]).await;
        agent
    }

    /// Connects a machine and names one disk.
    pub async fn agent(&self, identity: &Identity, disk: DiskId) -> Agent {
        let mut agent = self.connect(identity).await.unwrap();
        agent.disks(&[disk]).await;
        agent
    }

    pub async fn metrics(&self) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(self.running.metrics).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

pub struct Agent {
    pub welcome: Welcome,
    pub sender: SessionSender,
    pub receiver: SessionReceiver,
    pub window: SendWindow,
}

impl Agent {
    /// One that knows nothing of groups, and so is told nothing that it did not ask for.
    pub async fn connect(address: &str, identity: &Identity, machine: MachineId) -> Result<Self, WireError> {
        Self::connect_in(address, identity, machine, Version::V2).await
    }

    pub async fn connect_in(
        address: &str,
        identity: &Identity,
        machine: MachineId,
        newest: Version,
    ) -> Result<Self, WireError> {
        let hello = Hello {
            machine,
            version_min: 1,
            version_max: newest.number(),
            agent_version: "test".to_owned(),
            host_name: "host".to_owned(),
            kernel: "6".to_owned(),
        };
        let timeouts = Timeouts { idle: Duration::from_secs(20), ..Timeouts::default() };
        let (welcome, sender, receiver) =
            connect_with(address, "127.0.0.1", identity, hello, timeouts).await?;
        Ok(Self { window: SendWindow::new(welcome.window_bytes), welcome, sender, receiver })
    }

    pub async fn send(&mut self, message: AgentMessage) {
        self.sender.send(&message).await.unwrap();
        self.sender.flush().await.unwrap();
    }

    pub async fn disks(&mut self, disks: &[DiskId]) {
        self.send(AgentMessage::Disks(disks.iter().map(|disk| info(*disk)).collect())).await;
    }

    pub fn chunk(&self, disk: DiskId, start: u64, fill: &[u8]) -> Bytes {
        chunk(&self.welcome.hash_key, disk, start, fill)
    }

    /// Sends a chunk as soon as the window allows.
    pub async fn push(&mut self, delta: DeltaId, chunk: &[u8]) {
        while !self.window.fits(chunk.len()) {
            self.sender.flush().await.unwrap();
            match self.receiver.recv().await.unwrap() {
                CollectorMessage::Received { delta, chunks } => self.window.received(delta, chunks).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        self.window.sent(delta, chunk.len());
        self.sender.send_chunk(delta, chunk).await.unwrap();
    }

    pub async fn commit(&mut self, delta: DeltaId, chunks: u64, kind: CommitKind) {
        self.send(AgentMessage::DeltaCommit(DeltaCommit { delta, chunks, kind })).await;
    }

    pub async fn stored(&mut self) -> (DeltaId, CommitId) {
        loop {
            match self.receiver.recv().await.unwrap() {
                CollectorMessage::Stored { delta, commit } => return (delta, commit),
                CollectorMessage::Group(_) => {}
                CollectorMessage::Received { delta, chunks } => self.window.received(delta, chunks).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    /// A whole delta of one chunk, as a point.
    pub async fn deliver(&mut self, disk: DiskId, start: u64, fill: &[u8]) -> CommitId {
        let delta = DeltaId::new();
        self.send(AgentMessage::DeltaBegin(delta)).await;
        let chunk = self.chunk(disk, start, fill);
        self.push(delta, &chunk).await;
        self.commit(delta, 1, point(disk)).await;
        let (stored, commit) = self.stored().await;
        assert_eq!(stored, delta);
        commit
    }

    /// The refusal that ends the session; what is acknowledged before is skipped.
    pub async fn refusal(&mut self) -> Refusal {
        loop {
            match self.receiver.recv().await.unwrap() {
                CollectorMessage::Refused(refusal) => {
                    assert!(refusal.fatal);
                    assert!(matches!(self.receiver.recv().await, Err(WireError::Closed)));
                    return refusal;
                }
                CollectorMessage::Received { .. } | CollectorMessage::Group(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

pub fn info(disk: DiskId) -> DiskInfo {
    DiskInfo { disk, name: "vda".to_owned(), size_bytes: DISK_BLOCKS * BLOCK_BYTES as u64 }
}

/// When all points of the tests were taken.
pub static TAKEN_MS: std::sync::LazyLock<u64> = std::sync::LazyLock::new(now_ms);

pub fn point(disk: DiskId) -> CommitKind {
    CommitKind::Point(PointInfo {
        consistency: Consistency::Filesystem,
        taken_at_ms: *TAKEN_MS,
        freeze_us: 3,
        disks: vec![PointDisk { disk, size_bytes: DISK_BLOCKS * BLOCK_BYTES as u64 }],
    })
}

/// A block that does not compress, and differs by its seed.
pub fn block(seed: u8) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed) << 32 | 1;
    let next = |state: &mut u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state as u8
    };
    (0..BLOCK_BYTES).map(|_| next(&mut state)).collect()
}

/// A chunk of one block for each seed.
pub fn chunk(key: &HashKey, disk: DiskId, start: u64, seeds: &[u8]) -> Bytes {
    let payload: Vec<u8> = seeds.iter().flat_map(|seed| block(*seed)).collect();
    let extent = Extent { start: Block(start), count: seeds.len() as u32, fill: Fill::Data };
    let mut out = Vec::new();
    encode_chunk(disk, &[extent], &payload, key, 1, &mut out).unwrap();
    out.into()
}
