//! A collector that does as it likes, against the real agent.

use crate::common::{GROWTH_MAX, MIB, resident, runtime, write};
use anyhow::{Result, bail, ensure};
use highwater_delta::{BlockRange, CommitId, DeltaId, DiskId, StoredBlock};
use highwater_tests::{Arena, Backing, FileSystem, LoopDisk, Mounted, Site, SiteOptions};
use highwater_vault::{KeySource, Vault, local_store};
use highwater_wire::message::{AgentMessage, CollectorMessage, Refusal, Welcome};
use highwater_wire::{Frame, FrameReader, FrameWriter, Timeouts, codec, tls};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A collector with the vault's own authority that does as it likes, once for each connection; then the real one.
async fn hostile_collector(
    listener: TcpListener,
    vault: PathBuf,
    key: PathBuf,
    to: SocketAddr,
    met: Arc<AtomicUsize>,
) -> Result<()> {
    let vault = Vault::unlock(local_store(&vault)?, &KeySource::File(key)).await?;
    let authority = highwater_collector::authority::load(&vault).await?;
    let names = ["127.0.0.1".to_owned()];
    let cert = Arc::new(highwater_collector::authority::OwnCert::issue(&authority, &names)?);
    let acceptor = TlsAcceptor::from(Arc::new(tls::ingest_server(authority.cert(), cert)?));
    loop {
        let (mut stream, _) = listener.accept().await?;
        let number = met.fetch_add(1, Ordering::SeqCst);
        if number >= SCENARIOS {
            tokio::spawn(async move {
                if let Ok(mut real) = tokio::net::TcpStream::connect(to).await {
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut real).await;
                }
            });
            continue;
        }
        let (acceptor, vault) = (acceptor.clone(), vault.clone());
        tokio::spawn(async move {
            if let Ok(stream) = acceptor.accept(stream).await {
                let _ = tokio::time::timeout(Duration::from_secs(4), misbehave(stream, number, &vault)).await;
            }
        });
    }
}

const SCENARIOS: usize = 8;

async fn misbehave<S>(stream: S, number: usize, vault: &Vault) -> Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (input, output) = tokio::io::split(stream);
    let mut frames = FrameReader::new(input, Timeouts::default());
    let mut out = FrameWriter::new(output, Timeouts::default());
    let Some(Frame::Control(body)) = frames.next().await? else { bail!("no hello") };
    let AgentMessage::Hello(hello) = codec::decode(&body)? else { bail!("no hello") };
    let window_bytes = [0, u64::MAX, 4096, 4 << 20, 4 << 20, 4 << 20, 4 << 20, 4 << 20][number];
    let welcome = Welcome {
        version: 1,
        vault: vault.id(),
        hash_key: vault.hash_key(hello.machine).await?,
        window_bytes,
        last_commit: vault.machine(hello.machine).await?.last_commit,
        disks: vec![],
    };
    let mut say = Vec::new();
    match number {
        3 => {
            for _ in 0..300 {
                say.push(CollectorMessage::Stored { delta: DeltaId::new(), commit: CommitId(u64::MAX) });
                say.push(CollectorMessage::Received { delta: DeltaId::new(), chunks: u64::MAX });
            }
        }
        4 => {
            let blocks = vec![StoredBlock::Zero; 8192];
            let range = BlockRange::new(0, 8192);
            say = vec![CollectorMessage::Hashes { disk: DiskId::new(), range, blocks }; 1500];
        }
        5 => {
            let (cause, action) = ("no\nreason".to_owned(), "none".to_owned());
            let refusal = Refusal { code: 1, cause, action, retry: true, fatal: false };
            say = vec![CollectorMessage::Refused(refusal); 200];
        }
        _ => {}
    }
    let (acknowledge, mut due) = tokio::sync::mpsc::unbounded_channel();
    let talk = async {
        out.control(&codec::encode(&CollectorMessage::Welcome(welcome))?).await?;
        for message in &say {
            out.control(&codec::encode(message)?).await?;
        }
        if number == 6 {
            out.control(&[0xff; 300]).await?;
        }
        loop {
            out.control(&codec::encode(&CollectorMessage::Pong(0))?).await?;
            while let Ok(message) = due.try_recv() {
                if number == 7 {
                    out.control(&codec::encode(&message)?).await?;
                }
            }
            out.flush().await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    // What the agent sends is taken and thrown away: acknowledged by nobody, or taken over and never stored.
    let take = async {
        let (mut open, mut chunks) = (None, 0);
        while let Ok(Some(frame)) = frames.next().await {
            if let Frame::Chunk { delta, .. } = frame {
                chunks = if open == Some(delta) { chunks + 1 } else { 1 };
                open = Some(delta);
                let _ = acknowledge.send(CollectorMessage::Received { delta, chunks });
            }
        }
    };
    tokio::select! {
        ended = talk => ended,
        () = take => Ok(()),
    }
}

#[test]
fn a_hostile_collector() -> Result<()> {
    let arena = Arena::enter("hostile-collector")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 48 * MIB)?;
    let runtime = runtime()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let options = SiteOptions {
        through: Some(listener.local_addr()?),
        limits: vec!["stored = \"2s\"".into()],
        ..SiteOptions::default()
    };
    let met = Arc::new(AtomicUsize::new(0));
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = Site::new(&arena, &options)?;
    for text in [
        "the collector cannot be used",
        "the collector refused",
        "session ended",
        "sending stopped",
        "sending is tried again",
        "compared with the vault",
        "HW-1483",
        "no recovery point this time",
    ] {
        site.allow(text);
    }
    let (vault, key, to) = (site.vault().to_owned(), site.key().to_owned(), site.ingest());
    runtime.spawn(hostile_collector(listener, vault, key, to, met.clone()));
    site.start_agent()?;
    let before = resident(site.agent.as_ref())?;
    site.protect(disk.path(), "data")?;
    write(&mounted, "file", 1)?;
    // A refused agent waits for somebody to act; whoever asks for a point does.
    let until = Instant::now() + Duration::from_secs(90);
    while met.load(Ordering::SeqCst) <= SCENARIOS {
        ensure!(
            Instant::now() < until,
            "stuck after {} sessions: {}",
            met.load(Ordering::SeqCst),
            site.status()?
        );
        // Asked for at the side: the answer may take as long as the session lasts.
        let _ = site.status()?;
        let _ = site.agent_command(&["point"]);
        thread::sleep(Duration::from_millis(100));
    }
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    let after = resident(site.agent.as_ref())?;
    ensure!(site.agent_log().contains("HW-1483"), "a commit was waited for for ever");
    println!("agent: {} MiB before, {} MiB at most", before / MIB, after / MIB);
    ensure!(after < before + GROWTH_MAX, "the agent grew from {before} to {after} bytes");
    drop(mounted);
    site.stop_agent()
}
