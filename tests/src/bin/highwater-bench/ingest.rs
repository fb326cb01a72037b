//! What the collector takes in, against the least that could be done with the same bytes: receive them over TLS 1.3, write them
//! to the same disk, and sync.
//!
//! The chunks are made before the clock runs, and sent by the same code over the same kind of connection to both.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use highwater_delta::{
    Block, CHUNK_BLOCKS_MAX, CommitKind, DeltaId, DiskId, Extent, Fill, HashKey, encode_chunk,
};
use highwater_tests::{Arena, Random};
use highwater_vault::{KeySource, Vault, local_store};
use highwater_wire::message::{AgentMessage, CollectorMessage, DeltaCommit, DiskInfo, Hello};
use highwater_wire::{Identity, SendWindow, SessionSender, Timeouts, client, tls};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::Choice;
use crate::agent::{self, dismiss, fresh};
use crate::results::{Results, Series};

/// Content of the delta; half noise, half text, so that about half of it travels.
const DELTA_BYTES: u64 = 512 << 20;
const BLOCK_BYTES: usize = 4096;
const ROUNDS: u32 = 5;

/// Part of `bench replicate`.
pub fn ingest(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let mut site = fresh(arena)?;
    // Its certificate is used by us from here on.
    site.stop_agent()?;
    let identity = Identity::load(&arena.dir().join("state"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let server = Arc::new(runtime.block_on(server_config(site.vault(), site.key()))?);
    let disk = DiskId::new();
    let chunks = chunks(disk, &runtime.block_on(hash_key(&identity, site.ingest()))?)?;
    let bytes: usize = chunks.iter().map(Vec::len).sum();
    let stored = arena.dir().join("received");
    let [mut plain, mut ours, mut cpu] = <[Series; 3]>::default();
    for round in 0..choice.rounds.unwrap_or(ROUNDS) {
        eprintln!("round {}", round + 1);
        let seconds = receive_and_write(&runtime, &identity, &server, &chunks, &stored)?;
        plain.push(bytes as f64 / 1e6 / seconds);
        let before = agent::cpu_seconds(site.collector.as_ref())?;
        let seconds = runtime.block_on(send(&identity, site.ingest(), disk, &chunks))?;
        ours.push(bytes as f64 / 1e6 / seconds);
        let used = agent::cpu_seconds(site.collector.as_ref())? - before;
        cpu.push(used * f64::from(1_u32 << 30) / bytes as f64);
    }
    results.row("TLS receive, write and sync", &plain, "MB/s of chunks", "");
    results.row("collector: received, checked, encrypted, stored", &ours, "MB/s of chunks", "");
    results.row("  of TLS receive, write and sync", &ours.ratio(&plain), "", ">= 0.7");
    results.row("processor time of the collector, a GiB of chunks", &cpu, "s", "");
    dismiss(site)
}

/// As the vault's collectors are certified.
async fn server_config(vault: &Path, key: &Path) -> Result<ServerConfig> {
    let vault = Vault::unlock(local_store(vault)?, &KeySource::File(key.to_owned())).await?;
    let authority = highwater_collector::authority::load(&vault).await?;
    let cert = highwater_collector::authority::OwnCert::issue(&authority, &["127.0.0.1".to_owned()])?;
    Ok(tls::ingest_server(authority.cert(), Arc::new(cert))?)
}

fn hello(identity: &Identity) -> Hello {
    Hello {
        machine: identity.machine,
        version_min: 1,
        version_max: 2,
        agent_version: "bench".into(),
        host_name: "bench".into(),
        kernel: String::new(),
    }
}

async fn hash_key(identity: &Identity, to: SocketAddr) -> Result<HashKey> {
    let (welcome, sender, _) =
        client::connect(&to.to_string(), "127.0.0.1", identity, hello(identity)).await?;
    sender.close().await?;
    Ok(welcome.hash_key)
}

fn chunks(disk: DiskId, key: &HashKey) -> Result<Vec<Vec<u8>>> {
    let mut random = Random::new(1);
    let mut content = vec![b'='; CHUNK_BLOCKS_MAX * BLOCK_BYTES];
    let count = DELTA_BYTES / content.len() as u64;
    (0..count)
        .map(|number| {
            for block in content.chunks_mut(BLOCK_BYTES) {
                random.fill(&mut block[..BLOCK_BYTES / 2]);
            }
            let start = Block(number * CHUNK_BLOCKS_MAX as u64);
            let extent = Extent { start, count: CHUNK_BLOCKS_MAX as u32, fill: Fill::Data };
            let mut chunk = Vec::new();
            encode_chunk(disk, &[extent], &content, key, 1, &mut chunk)?;
            Ok(chunk)
        })
        .collect()
}

/// One delta, from its begin to its being stored; seconds.
async fn send(identity: &Identity, to: SocketAddr, disk: DiskId, chunks: &[Vec<u8>]) -> Result<f64> {
    let (welcome, mut sender, mut receiver) =
        client::connect(&to.to_string(), "127.0.0.1", identity, hello(identity)).await?;
    let info = DiskInfo { disk, name: "bench".into(), size_bytes: DELTA_BYTES };
    sender.send(&AgentMessage::Disks(vec![info])).await?;
    let mut window = SendWindow::new(welcome.window_bytes);
    let delta = DeltaId::new();
    let began = Instant::now();
    sender.send(&AgentMessage::DeltaBegin(delta)).await?;
    let mut left = chunks.iter();
    let mut next = left.next();
    loop {
        while let Some(chunk) = next.filter(|chunk| window.fits(chunk.len())) {
            sender.send_chunk(delta, chunk).await?;
            window.sent(delta, chunk.len());
            next = left.next();
            if next.is_none() {
                let commit = DeltaCommit { delta, chunks: chunks.len() as u64, kind: CommitKind::Partial };
                sender.send(&AgentMessage::DeltaCommit(commit)).await?;
            }
        }
        sender.flush().await?;
        match receiver.recv().await? {
            CollectorMessage::Received { delta, chunks } => window.received(delta, chunks)?,
            CollectorMessage::Stored { .. } => break,
            CollectorMessage::Refused(refusal) => bail!("refused: {}", refusal.cause),
            _ => {}
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    sender.send(&AgentMessage::Goodbye).await?;
    sender.close().await?;
    Ok(seconds)
}

/// The same frames over the same kind of connection into a file.
fn receive_and_write(
    runtime: &tokio::runtime::Runtime,
    identity: &Identity,
    server: &Arc<ServerConfig>,
    chunks: &[Vec<u8>],
    to: &Path,
) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let (config, path) = (server.clone(), to.to_owned());
    let receiver = thread::spawn(move || -> Result<u64> {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut stream = StreamOwned::new(ServerConnection::new(config)?, stream);
        let mut file = File::create(&path)?;
        let (mut buffer, mut received) = (vec![0; 1 << 20], 0);
        loop {
            let mut filled = 0;
            // A record of TLS holds 16 KiB: written one by one they would cost this side more than it need.
            let ended = loop {
                match stream.read(&mut buffer[filled..])? {
                    0 => break true,
                    bytes => filled += bytes,
                }
                if filled == buffer.len() {
                    break false;
                }
            };
            file.write_all(&buffer[..filled])?;
            received += filled as u64;
            if ended {
                break;
            }
        }
        file.sync_all()?;
        Ok(received)
    });
    let seconds = runtime.block_on(async {
        let config = tls::agent_client(&identity.ca, identity.cert_chain.clone(), identity.key.clone_key())?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("127.0.0.1")?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        let (_input, output) = tokio::io::split(stream);
        let mut sender = SessionSender::over(output, Timeouts::default());
        let delta = DeltaId::new();
        let began = Instant::now();
        for chunk in chunks {
            sender.send_chunk(delta, chunk).await?;
        }
        sender.close().await?;
        let received = tokio::task::spawn_blocking(move || receiver.join())
            .await?
            .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        ensure!(received > chunks.iter().map(|c| c.len() as u64).sum(), "{received} bytes were received");
        anyhow::Ok(began.elapsed().as_secs_f64())
    })?;
    fs::remove_file(to).context("remove what was received")?;
    Ok(seconds)
}
