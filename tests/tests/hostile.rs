//! Hostile peers against real daemons, and a vault whose bytes were changed: every refusal has its code, nobody else is
//! affected, memory stays bounded, and no wrong content is ever handed out.

use anyhow::{Context, Result, bail, ensure};
use highwater_delta::{
    Block, BlockRange, CommitId, CommitKind, DeltaId, DiskId, Extent, Fill, HashKey, MachineId, StoredBlock,
    encode_chunk,
};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Random, Site, SiteOptions, command, daemon,
};
use highwater_vault::{Vault, VaultKey, local_store};
use highwater_wire::message::{
    AgentMessage, CollectorMessage, DeltaCommit, DiskInfo, Hello, Refusal, Welcome,
};
use highwater_wire::{
    Frame, FrameReader, FrameWriter, Identity, SessionReceiver, SessionSender, Timeouts, WireError, client,
    codec, enroll, tls,
};
use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const MIB: u64 = 1 << 20;
/// What a daemon may grow by under attack.
const GROWTH_MAX: u64 = 160 * MIB;

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Resident bytes of a daemon.
fn resident(daemon: Option<&highwater_tests::Daemon>) -> Result<u64> {
    let pid = daemon.and_then(highwater_tests::Daemon::pid).context("the daemon does not run")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse::<u64>()? * 1024)
}

fn hello(machine: MachineId) -> Hello {
    Hello {
        machine,
        version_min: 1,
        version_max: 1,
        agent_version: "0".into(),
        host_name: "hostile".into(),
        kernel: "0".into(),
    }
}

/// A machine with a good certificate that does as it likes.
struct Hostile {
    identity: Identity,
    address: SocketAddr,
}

struct Session {
    welcome: Welcome,
    sender: SessionSender,
    receiver: SessionReceiver,
}

impl Hostile {
    async fn connect(&self) -> Result<Session> {
        let address = self.address.to_string();
        let hello = hello(self.identity.machine);
        let (welcome, sender, receiver) =
            client::connect(&address, "127.0.0.1", &self.identity, hello).await?;
        Ok(Session { welcome, sender, receiver })
    }

    async fn with_disk(&self, disk: DiskId) -> Result<Session> {
        let mut session = self.connect().await?;
        session.say(AgentMessage::Disks(vec![info(disk)])).await?;
        Ok(session)
    }
}

impl Session {
    async fn say(&mut self, message: AgentMessage) -> Result<()> {
        self.sender.send(&message).await?;
        Ok(self.sender.flush().await?)
    }

    /// The refusal that ends the session.
    async fn refusal(&mut self) -> Result<Refusal> {
        loop {
            match self.receiver.recv().await? {
                CollectorMessage::Refused(refusal) => return Ok(refusal),
                CollectorMessage::Stored { .. } => bail!("stored"),
                _ => {}
            }
        }
    }
}

fn info(disk: DiskId) -> DiskInfo {
    DiskInfo { disk, name: "vda".into(), size_bytes: 64 * MIB }
}

fn one_chunk(key: &HashKey, disk: DiskId, start: u64) -> Result<Vec<u8>> {
    let extent = Extent { start: Block(start), count: 32, fill: Fill::Data };
    let mut content = vec![0; 32 * 4096];
    Random::new(start + 1).fill(&mut content);
    let mut out = Vec::new();
    encode_chunk(disk, &[extent], &content, key, 1, &mut out)?;
    Ok(out)
}

/// A protected filesystem, replicated, with one point.
fn site<'a>(arena: &'a Arena, disk: &LoopDisk, options: &SiteOptions) -> Result<(Site, Mounted, &'a Arena)> {
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = Site::new(arena, options)?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    write(&mounted, "first", 1)?;
    Ok((site, mounted, arena))
}

fn write(mounted: &Mounted, name: &str, seed: u64) -> Result<()> {
    let mut content = vec![0; MIB as usize];
    Random::new(seed).fill(&mut content);
    Ok(fs::write(mounted.path().join(name), content)?)
}

fn token(arena: &Arena, more: &[&str]) -> Result<enroll::Token> {
    let config = arena.dir().join("collector/collector.toml");
    let config = config.to_string_lossy();
    let mut words = vec!["token", "create", "--config", &config, "--json"];
    words.extend(more);
    let said = command::run(&daemon::program("highwater-collector")?.to_string_lossy(), &words)?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    Ok(said["token"].as_str().context("no token")?.parse()?)
}

fn port_of(arena: &Arena, key: &str) -> Result<SocketAddr> {
    let config = fs::read_to_string(arena.dir().join("collector/collector.toml"))?;
    let line = config.lines().find(|line| line.starts_with(&format!("{key} ="))).context("no such port")?;
    Ok(line.split('"').nth(1).context("no address")?.parse()?)
}

#[test]
fn strangers_and_hostile_machines() -> Result<()> {
    let arena = Arena::enter("hostile")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let (mut site, mounted, _) = site(&arena, &disk, &SiteOptions::default())?;
    for text in ["session ended", "an enrolment was refused", "cannot accept"] {
        site.allow(text);
    }
    site.wait_replicated()?;
    site.point()?;
    let before = resident(site.collector.as_ref())?;
    let management = port_of(&arena, "management-listen")?;
    let ingest = site.ingest();

    // Those who hold places and say nothing, or nonsense, on both ports; far more than may shake hands at once.
    let mut silent = Vec::new();
    for number in 0..400_u64 {
        let mut stream = TcpStream::connect(if number % 2 == 0 { ingest } else { management })?;
        let mut noise = vec![0; 600];
        Random::new(number + 1).fill(&mut noise);
        match number % 8 {
            0 | 1 => stream.write_all(&noise).unwrap_or(()),
            // A handshake that breaks off.
            2 | 3 => stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).unwrap_or(()),
            _ => {}
        }
        silent.push(stream);
    }
    let begun = Instant::now();
    let token_used = token(&arena, &[])?;
    let url = format!("https://{management}");
    let runtime = runtime()?;
    let identity = runtime.block_on(enroll::enroll(&url, &token_used, "hostile"))?.identity;
    let hostile = Hostile { identity, address: ingest };
    runtime.block_on(hostile.connect())?;
    write(&mounted, "second", 2)?;
    site.point_within(Duration::from_secs(10))?;
    ensure!(begun.elapsed() < Duration::from_secs(9), "held up for {:?}", begun.elapsed());
    drop(silent);

    // A used token, an expired one, and one used by many at once.
    let refused = |result: Result<enroll::Enrolled, WireError>| match result {
        Err(WireError::EnrolRefused { cause, .. }) => Ok(cause),
        Err(other) => bail!("{other}"),
        Ok(_) => bail!("enrolled"),
    };
    ensure!(refused(runtime.block_on(enroll::enroll(&url, &token_used, "again")))?.contains("HW-1321"));
    let contested = token(&arena, &[])?;
    let enrolled = runtime.block_on(async {
        let tries: Vec<_> = (0..4)
            .map(|_| {
                let (url, contested) = (url.clone(), contested.clone());
                tokio::spawn(async move { enroll::enroll(&url, &contested, "many").await.is_ok() })
            })
            .collect();
        let mut enrolled = 0;
        for one in tries {
            enrolled += usize::from(one.await.unwrap_or(false));
        }
        enrolled
    });
    ensure!(enrolled == 1, "{enrolled} machines with one token");

    let protected = site.disk_status("data")?["id"].as_str().context("no disk id")?.parse::<DiskId>()?;
    runtime.block_on(attack(&hostile, protected))?;
    let after = resident(site.collector.as_ref())?;
    println!("collector: {} MiB before, {} MiB at most", before / MIB, after / MIB);
    ensure!(after < before + GROWTH_MAX, "the collector grew from {before} to {after} bytes");

    write(&mounted, "third", 3)?;
    let point = site.point()?;
    site.assert_exact(point)?;
    site.verify()?;
    drop(mounted);
    site.stop_agent()
}

/// Whatever a machine with a good certificate can try.
async fn attack(hostile: &Hostile, of_another: DiskId) -> Result<()> {
    let own = DiskId::new();
    let address = hostile.address.to_string();
    match client::connect(&address, "127.0.0.1", &hostile.identity, hello(MachineId::new())).await {
        Err(WireError::Refused(refusal)) => ensure!(refusal.code == 1301, "{refusal:?}"),
        _ => bail!("another machine's name was accepted"),
    }
    ensure!(hostile.with_disk(of_another).await?.refusal().await?.code == 1302);
    for (disk, start, code) in [(of_another, 0, 1210), (own, 64 * 256 - 8, 1211)] {
        let mut session = hostile.with_disk(own).await?;
        let delta = DeltaId::new();
        session.say(AgentMessage::DeltaBegin(delta)).await?;
        let chunk = one_chunk(&session.welcome.hash_key, disk, start)?;
        session.sender.send_chunk(delta, &chunk).await?;
        session.sender.flush().await?;
        let refusal = session.refusal().await?;
        ensure!(refusal.code == code, "{refusal:?}");
    }
    // More than the window, without waiting for anything.
    let mut session = hostile.with_disk(own).await?;
    let delta = DeltaId::new();
    session.say(AgentMessage::DeltaBegin(delta)).await?;
    let chunk = one_chunk(&session.welcome.hash_key, own, 0)?;
    for _ in 0..4000 {
        // Once refused, the connection breaks.
        if session.sender.send_chunk(delta, &chunk).await.is_err() {
            break;
        }
    }
    drop(session);
    // A count that is wrong; then the same delta twice.
    let mut session = hostile.with_disk(own).await?;
    let delta = DeltaId::new();
    session.say(AgentMessage::DeltaBegin(delta)).await?;
    session.sender.send_chunk(delta, &chunk).await?;
    session
        .say(AgentMessage::DeltaCommit(DeltaCommit { delta, chunks: 2, kind: CommitKind::Partial }))
        .await?;
    ensure!(session.refusal().await?.code == 1306);
    // Thousands of deltas that hold nothing, on one session.
    let mut session = hostile.with_disk(own).await?;
    for _ in 0..1500 {
        let delta = DeltaId::new();
        session.sender.send(&AgentMessage::DeltaBegin(delta)).await?;
        let commit = DeltaCommit { delta, chunks: 0, kind: CommitKind::Partial };
        session.say(AgentMessage::DeltaCommit(commit)).await?;
        let answer = session.receiver.recv().await?;
        ensure!(matches!(answer, CollectorMessage::Stored { .. }), "{answer:?}");
    }
    // Many disks, again and again, each list another.
    for _ in 0..8 {
        let disks = (0..256).map(|_| info(DiskId::new())).collect();
        if session.say(AgentMessage::Disks(disks)).await.is_err() {
            break;
        }
    }
    let refusal = session.refusal().await?;
    ensure!(refusal.code == 1312, "{refusal:?}");
    // Questions whose answers are never read.
    let mut session = hostile.with_disk(own).await?;
    let question = AgentMessage::Hashes { disk: own, range: BlockRange::new(0, 8192) };
    let asking = async {
        while session.sender.send(&question).await.is_ok() && session.sender.flush().await.is_ok() {}
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), asking).await;
    Ok(())
}

/// A collector with the vault's own authority that does as it likes, once for each connection; then the real one.
async fn hostile_collector(
    listener: TcpListener,
    vault: PathBuf,
    key: PathBuf,
    to: SocketAddr,
    met: Arc<AtomicUsize>,
) -> Result<()> {
    let vault = Vault::open(local_store(&vault)?, &VaultKey::load(&key)?).await?;
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

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    command::run("cp", &["-a", &from.to_string_lossy(), &to.to_string_lossy()]).map(drop)
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { files(&path, found)? } else { found.push(path) }
    }
    found.sort();
    Ok(())
}

#[test]
fn a_damaged_vault_says_so_and_hands_out_nothing_wrong() -> Result<()> {
    let arena = Arena::enter("damage")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 48 * MIB)?;
    let (mut site, mounted, _) = site(&arena, &disk, &SiteOptions::default())?;
    site.wait_replicated()?;
    let mut points = vec![site.point()?];
    for seed in 2..4 {
        write(&mounted, "first", seed)?;
        points.push(site.point()?);
    }
    drop(mounted);
    let images: Vec<Vec<u8>> =
        points.iter().map(|p| Ok(fs::read(site.recover(*p)?.image("data"))?)).collect::<Result<_>>()?;
    let machine = site.machine()?;
    site.stop_agent()?;
    site.kill_collector()?;

    let good = arena.dir().join("good");
    copy_tree(site.vault(), &good)?;
    let mut all = Vec::new();
    files(site.vault(), &mut all)?;
    let of =
        |part: &str| all.iter().filter(|p| p.to_string_lossy().contains(part)).cloned().collect::<Vec<_>>();
    let (segments, manifest) = (of("/segments/"), of("/manifest/"));
    let key = of("/key");
    ensure!(segments.len() > 2 && manifest.len() > 2 && key.len() == 1);
    let mut random = Random::new(5);
    #[expect(clippy::type_complexity, reason = "a name for it would be used once")]
    let mut damages: Vec<(String, Box<dyn Fn() -> Result<()>>)> = Vec::new();
    for (path, times) in segments.iter().map(|p| (p, 2)).chain(manifest.iter().chain(&key).map(|p| (p, 1))) {
        for _ in 0..times {
            let bytes = fs::read(path)?;
            let bit = random.next_u64() as usize % (bytes.len() * 8);
            let path = path.clone();
            damages.push((
                format!("bit {bit} of {}", path.display()),
                Box::new(move || {
                    let mut bytes = fs::read(&path)?;
                    bytes[bit / 8] ^= 1 << (bit % 8);
                    Ok(fs::write(&path, bytes)?)
                }),
            ));
        }
    }
    for path in [&segments[0], &segments[1], &manifest[1], &key[0]] {
        let (gone, short) = (path.clone(), path.clone());
        damages.push((format!("{} gone", path.display()), Box::new(move || Ok(fs::remove_file(&gone)?))));
        damages.push((
            format!("{} cut off", path.display()),
            Box::new(move || {
                let bytes = fs::read(&short)?;
                Ok(fs::write(&short, &bytes[..bytes.len() / 2])?)
            }),
        ));
    }
    for pair in [&segments[..2], &manifest[..2]] {
        let (a, b) = (pair[0].clone(), pair[1].clone());
        damages.push((
            format!("{} and {} exchanged", a.display(), b.display()),
            Box::new(move || {
                let (one, two) = (fs::read(&a)?, fs::read(&b)?);
                fs::write(&a, two)?;
                Ok(fs::write(&b, one)?)
            }),
        ));
    }
    let restore = |site: &Site| -> Result<()> {
        fs::remove_dir_all(site.vault())?;
        copy_tree(&good, site.vault())
    };
    let (mut refused, mut whole) = (0, 0);
    for (what, damage) in &damages {
        damage()?;
        let said = std::process::Command::new(daemon::program("highwater")?)
            .args(["--vault".as_ref(), site.vault(), "--key".as_ref(), site.key(), "verify".as_ref()])
            .output()?;
        ensure!(!said.status.success(), "verify finds nothing wrong with {what}");
        let said = String::from_utf8([said.stdout, said.stderr].concat())?;
        ensure!(said.contains("HW-12"), "{what}: no code in: {said}");
        for (point, image) in points.iter().zip(&images) {
            let to = tempfile::tempdir_in("/dev/shm")?;
            let to_text = to.path().to_string_lossy();
            match site.operator(&["recover", &machine, "--point", &point.to_string(), "--to", &to_text]) {
                Ok(_) => {
                    ensure!(
                        fs::read(to.path().join("data.img"))? == *image,
                        "{what}: wrong content of point {point}"
                    );
                    whole += 1;
                }
                Err(error) => {
                    ensure!(error.to_string().contains("HW-1"), "{what}: no code in: {error}");
                    ensure!(
                        fs::read_dir(to.path())?.count() == 0,
                        "{what}: something was left of a failed recovery"
                    );
                    refused += 1;
                }
            }
        }
        restore(&site)?;
    }
    println!("{} damages: {refused} recoveries refused, {whole} whole", damages.len());
    site.verify()?;

    // A collector does not write on top of a history it cannot read, and the agent says that somebody must act.
    site.allow("session ended");
    site.allow("cannot read a machine's state");
    site.allow("the collector cannot be used");
    let last = manifest.last().context("no record")?;
    let mut bytes = fs::read(last)?;
    bytes[60] ^= 4;
    fs::write(last, bytes)?;
    let count = fs::read_dir(last.parent().context("no directory")?)?.count();
    site.start_collector()?;
    site.start_agent()?;
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let status = site.status()?.to_string();
        if status.contains("critical") && status.contains("12") {
            break;
        }
        ensure!(Instant::now() < until, "not critical: {status}");
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(
        fs::read_dir(last.parent().context("no directory")?)?.count() == count,
        "something was committed"
    );
    site.kill_collector()?;
    restore(&site)?;
    site.start_collector()?;
    let point = site.point()?;
    site.recover(point)?;
    site.verify()?;
    site.stop_agent()
}
