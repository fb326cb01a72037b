//! Strangers, and machines with a good certificate that do as they like, against the real collector.

use crate::common::{GROWTH_MAX, MIB, resident, runtime, site, write};
use anyhow::{Context, Result, bail, ensure};
use highwater_delta::{
    Block, BlockRange, CommitKind, DeltaId, DiskId, Extent, Fill, HashKey, MachineId, encode_chunk,
};
use highwater_tests::{Arena, Backing, LoopDisk, Random, SiteOptions, command, daemon};
use highwater_wire::message::{
    AgentMessage, CollectorMessage, DeltaCommit, DiskInfo, Hello, Refusal, Welcome,
};
use highwater_wire::{Identity, SessionReceiver, SessionSender, WireError, client, enroll};
use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

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
