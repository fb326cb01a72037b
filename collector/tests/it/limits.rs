//! What an enrolled machine may do, however hostile: each limit is its own, and nobody else feels it.

use crate::support::{Agent, Site, point};
use highwater_collector::shared::CLAIMS_A_DAY;
use highwater_delta::{BlockRange, CommitKind, DeltaId, DiskId, PointDisk};
use highwater_wire::message::{AgentMessage, CollectorMessage};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn commits_beyond_the_rate_wait_and_others_do_not() {
    let site = Site::with(|config| config.commits_per_minute = 1).await;
    let (greedy, modest) = (site.machine().await, site.machine().await);
    let (disk, other) = (DiskId::new(), DiskId::new());
    let mut agent = site.agent(&greedy, disk).await;
    for n in 0..5 {
        agent.deliver(disk, n, &[1]).await;
    }
    // A new session has no other allowance.
    drop(agent);
    let mut agent = site.agent(&greedy, disk).await;
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let chunk = agent.chunk(disk, 9, &[9]);
    agent.push(delta, &chunk).await;
    agent.commit(delta, 1, point(disk)).await;
    let slow = tokio::time::timeout(Duration::from_secs(2), agent.stored()).await;
    assert!(slow.is_err(), "the sixth has to wait for the next minute");
    let begun = Instant::now();
    site.agent(&modest, other).await.deliver(other, 0, &[1]).await;
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(site.vault().await.machine(greedy.machine).await.unwrap().points.len(), 5);
    // Waiting for its turn, it is still told to end.
    let mut newer = site.connect(&greedy).await.unwrap();
    assert_eq!(agent.refusal().await.code, 1307);
    newer.send(AgentMessage::Ping(1)).await;
    assert_eq!(newer.receiver.recv().await.unwrap(), CollectorMessage::Pong(1));
}

async fn named(agent: &mut Agent, disks: &[DiskId]) -> Result<(), u16> {
    agent.disks(disks).await;
    agent.send(AgentMessage::Ping(1)).await;
    match agent.receiver.recv().await.unwrap() {
        CollectorMessage::Pong(_) => Ok(()),
        CollectorMessage::Refused(refusal) => Err(refusal.code),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_claimed_in_bounds() {
    let site = Site::new().await;
    let identity = site.machine().await;
    let many = |n| (0..n).map(|_| DiskId::new()).collect::<Vec<_>>();
    let mut agent = site.connect(&identity).await.unwrap();
    let (first, second) = (many(256), many(256));
    assert_eq!(named(&mut agent, &first).await, Ok(()));
    assert_eq!(named(&mut agent, &second).await, Ok(()));
    assert_eq!(named(&mut agent, &many(1)).await, Err(1312), "within one session");
    // Over all sessions: no new ones today; those that are its own cost nothing.
    let mut agent = site.connect(&identity).await.unwrap();
    assert_eq!(named(&mut agent, &first).await, Ok(()));
    assert_eq!(named(&mut agent, &many(1)).await, Err(1329));
    let claimed = site.vault().await.control_list("disks/").await.unwrap().len();
    assert_eq!(claimed, CLAIMS_A_DAY as usize);
    // Another machine is not concerned.
    let other = site.machine().await;
    assert_eq!(named(&mut site.connect(&other).await.unwrap(), &many(3)).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_waits_for_memory_and_gets_it() {
    // Work for one delta at a time.
    let site = Site::with(|config| {
        config.window = 1 << 20;
        config.memory = 16 << 20;
    })
    .await;
    let (one, two, disk, other) = (site.machine().await, site.machine().await, DiskId::new(), DiskId::new());
    let (mut first, mut second) = (site.agent(&one, disk).await, site.agent(&two, other).await);
    let (held, waiting) = (DeltaId::new(), DeltaId::new());
    first.send(AgentMessage::DeltaBegin(held)).await;
    first.send(AgentMessage::Ping(1)).await;
    first.receiver.recv().await.unwrap();
    second.send(AgentMessage::DeltaBegin(waiting)).await;
    let chunk = second.chunk(other, 0, &[1]);
    second.push(waiting, &chunk).await;
    second.commit(waiting, 1, point(other)).await;
    let early = tokio::time::timeout(Duration::from_secs(1), second.stored()).await;
    assert!(early.is_err(), "stored without memory");
    let metrics = site.metrics().await;
    for line in [
        "highwater_collector_memory_waits_total 1",
        "highwater_collector_memory_budget_bytes{use=\"windows\"} 8388608",
        "highwater_collector_memory_budget_bytes{use=\"work\"} 7340032",
        "highwater_collector_memory_budget_bytes{use=\"pages\"} 1048576",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    let used = |metrics: &str| {
        let line = metrics.lines().find(|line| line.contains("memory_used_bytes{use=\"work\"}")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(used(&metrics) >= 6 << 20 && used(&metrics) < 7 << 20, "{metrics}");
    first.send(AgentMessage::DeltaAbort(held)).await;
    assert_eq!(second.stored().await.0, waiting);
    // A session that breaks off gives everything back.
    first.send(AgentMessage::DeltaBegin(DeltaId::new())).await;
    first.send(AgentMessage::Hashes { disk, range: BlockRange::new(0, 1) }).await;
    first.receiver.recv().await.unwrap();
    drop((first, second));
    let mut tries = 0;
    while used(&site.metrics().await) > 0 {
        tries += 1;
        assert!(tries < 100, "{}", site.metrics().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn comparing_takes_memory_too_and_is_still_exact() {
    let site = Site::with(|config| {
        config.window = 1 << 20;
        config.memory = 16 << 20;
    })
    .await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    for n in 0..40 {
        let delta = DeltaId::new();
        agent.send(AgentMessage::DeltaBegin(delta)).await;
        let chunk = agent.chunk(disk, n, &[n as u8, n as u8 + 1]);
        agent.push(delta, &chunk).await;
        agent.commit(delta, 1, CommitKind::Partial).await;
        agent.stored().await;
    }
    let range = BlockRange::new(0, 41);
    for _ in 0..3 {
        agent.send(AgentMessage::Hashes { disk, range }).await;
        let CollectorMessage::Hashes { blocks, .. } = agent.receiver.recv().await.unwrap() else { panic!() };
        let key = &agent.welcome.hash_key;
        for (n, found) in blocks.iter().enumerate() {
            let content = crate::support::block(n as u8).try_into().unwrap();
            assert_eq!(*found, highwater_delta::StoredBlock::Data(key.hash(&content)));
        }
    }
    let metrics = site.metrics().await;
    let pages = metrics.lines().find(|line| line.contains("memory_used_bytes{use=\"pages\"}")).unwrap();
    assert!(!pages.ends_with(" 0"), "{pages}");
}

fn used(metrics: &str, what: &str) -> u64 {
    let name = format!("memory_used_bytes{{use=\"{what}\"}}");
    metrics.lines().find(|line| line.contains(&name)).unwrap().rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_a_huge_history_stops_at_its_share_and_others_go_on() {
    let site = Site::with(|config| {
        config.window = 1 << 20;
        config.memory = 32 << 20;
        config.commits_per_minute = 1_000_000;
    })
    .await;
    let (greedy, modest) = (site.machine().await, site.machine().await);
    let disks: Vec<_> = (0..256).map(|_| DiskId::new()).collect();
    let mut agent = site.connect(&greedy).await.unwrap();
    agent.disks(&disks).await;
    let mut points = 0;
    let refusal = loop {
        let delta = DeltaId::new();
        let CommitKind::Point(mut info) = point(disks[0]) else { panic!() };
        info.disks = disks.iter().map(|disk| PointDisk { disk: *disk, size_bytes: 4096 }).collect();
        agent.send(AgentMessage::DeltaBegin(delta)).await;
        agent.commit(delta, 0, CommitKind::Point(info)).await;
        match agent.receiver.recv().await.unwrap() {
            CollectorMessage::Stored { .. } => points += 1,
            CollectorMessage::Refused(refusal) => break refusal,
            other => panic!("{other:?}"),
        }
        // Each commit is charged.
        if points == 100 {
            assert!(used(&site.metrics().await, "kept") > 100 * 256 * 24);
        }
        assert!(points < 1000);
    };
    assert_eq!((refusal.code, refusal.retry), (1223, true), "{refusal:?}");
    assert!(points > 300, "{points}");
    // It comes again, stays, and pings: the memory that is left is enough for everybody else.
    let mut agent = site.connect(&greedy).await.unwrap();
    agent.send(AgentMessage::Ping(1)).await;
    agent.receiver.recv().await.unwrap();
    let kept = used(&site.metrics().await, "kept");
    assert!(kept > 3 << 20 && kept <= 4 << 20, "{kept}");
    let disk = DiskId::new();
    let begun = Instant::now();
    site.agent(&modest, disk).await.deliver(disk, 0, &[1]).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_that_drips_makes_room_when_others_wait() {
    // Work for one delta at a time.
    let site = Site::with(|config| {
        config.window = 1 << 20;
        config.memory = 16 << 20;
        config.idle_timeout = Duration::from_secs(1);
    })
    .await;
    let (one, two, disk, other) = (site.machine().await, site.machine().await, DiskId::new(), DiskId::new());
    let mut drips = site.agent(&one, disk).await;
    let held = DeltaId::new();
    drips.send(AgentMessage::DeltaBegin(held)).await;
    let drip = async |drips: &mut Agent, n: u64| {
        let chunk = drips.chunk(disk, n, &[1]);
        // The window is large enough for all.
        drips.sender.send_chunk(held, &chunk).await?;
        drips.sender.flush().await
    };
    for n in 0..4 {
        drip(&mut drips, n).await.unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
    }
    let begun = Instant::now();
    let delivered = tokio::spawn({
        let mut second = site.agent(&two, other).await;
        async move { second.deliver(other, 0, &[1]).await }
    });
    // It goes on as if nothing were.
    for n in 4..30 {
        if delivered.is_finished() || drip(&mut drips, n).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(800)).await;
    }
    delivered.await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let refusal = loop {
        match drips.receiver.recv().await.unwrap() {
            CollectorMessage::Refused(refusal) => break refusal,
            CollectorMessage::Received { .. } | CollectorMessage::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((refusal.code, refusal.retry), (1336, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_nobody_uses_is_given_back() {
    let site = Site::with(|config| config.idle_timeout = Duration::from_secs(1)).await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    agent.deliver(disk, 0, &[1]).await;
    // What is stored is charged after it was said to be stored.
    agent.send(AgentMessage::Ping(0)).await;
    agent.receiver.recv().await.unwrap();
    let before = used(&site.metrics().await, "kept");
    agent.send(AgentMessage::Hashes { disk, range: BlockRange::new(0, 1) }).await;
    agent.receiver.recv().await.unwrap();
    assert!(used(&site.metrics().await, "kept") > before);
    let delta = DeltaId::new();
    let mut begun = None;
    let refusal = loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        if begun.is_none() && used(&site.metrics().await, "kept") == before {
            // The map is gone, though the machine never was silent. Now a delta that nothing comes of.
            agent.send(AgentMessage::DeltaBegin(delta)).await;
            begun = Some(Instant::now());
        }
        // A session that has ended says so.
        let _ = agent.sender.send(&AgentMessage::Ping(1)).await;
        let _ = agent.sender.flush().await;
        match agent.receiver.recv().await.unwrap() {
            CollectorMessage::Pong(_) => {}
            CollectorMessage::Refused(refusal) => break refusal,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((refusal.code, refusal.retry), (1335, true));
    assert!(begun.unwrap().elapsed() >= Duration::from_secs(3), "{:?}", begun.unwrap().elapsed());
    site.agent(&identity, disk).await.deliver(disk, 0, &[2]).await;
}
