//! What well-behaved agents may expect.

use crate::support::{Site, block};
use highwater_delta::{BLOCK_BYTES, BlockRange, CommitId, CommitKind, DeltaId, DiskId, StoredBlock};
use highwater_wire::message::{AgentMessage, CollectorMessage};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_no_other_follows_is_acknowledged() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let chunk = agent.chunk(disk, 10, &[1]);
    agent.push(delta, &chunk).await;
    agent.sender.flush().await.unwrap();
    let received = tokio::time::timeout(Duration::from_secs(5), agent.receiver.recv()).await;
    let received = received.expect("an eighth of the window was waited for").unwrap();
    assert_eq!(received, CollectorMessage::Received { delta, chunks: 1 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_becomes_a_point_that_anybody_with_the_key_reads() {
    let site = Site::new().await;
    let (identity, disk) = (site.enrolled().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    assert_eq!(agent.welcome.last_commit, CommitId::NONE);
    let first = agent.deliver(disk, 10, &[1, 2]).await;
    let second = agent.deliver(disk, 11, &[3]).await;
    assert_eq!((first, second), (CommitId(1), CommitId(2)));

    let vault = site.vault().await;
    let state = vault.machine(identity.machine).await.unwrap();
    assert_eq!((state.points.len(), state.last_commit), (2, second));
    for (at, expected) in [(first, [1, 2]), (second, [1, 3])] {
        let map = vault.block_map(identity.machine, disk, at).await.unwrap();
        let mut out = vec![0; 2 * BLOCK_BYTES];
        map.read(BlockRange::new(10, 2), &mut out).await.unwrap();
        assert_eq!(out, expected.map(block).concat());
    }

    let range = BlockRange::new(9, 3);
    agent.send(AgentMessage::Hashes { disk, range }).await;
    let CollectorMessage::Hashes { blocks, .. } = agent.receiver.recv().await.unwrap() else { panic!() };
    let key = agent.welcome.hash_key.clone();
    let hash = |seed| StoredBlock::Data(key.hash(&block(seed).try_into().unwrap()));
    assert_eq!(blocks, [StoredBlock::Absent, hash(1), hash(3)]);
    // After another delta the answer is the new one; a disk that was only named holds nothing.
    agent.deliver(disk, 9, &[4]).await;
    agent.send(AgentMessage::Hashes { disk, range }).await;
    let CollectorMessage::Hashes { blocks, .. } = agent.receiver.recv().await.unwrap() else { panic!() };
    assert_eq!(blocks, [hash(4), hash(1), hash(3)]);
    let named = DiskId::new();
    agent.disks(&[disk, named]).await;
    agent.send(AgentMessage::Hashes { disk: named, range }).await;
    let CollectorMessage::Hashes { blocks, .. } = agent.receiver.recv().await.unwrap() else { panic!() };
    assert_eq!(blocks, [StoredBlock::Absent; 3]);
    agent.send(AgentMessage::Ping(77)).await;
    assert_eq!(agent.receiver.recv().await.unwrap(), CollectorMessage::Pong(77));
    agent.sender.close().await.unwrap();

    let again = site.connect(&identity).await.unwrap();
    assert_eq!((again.welcome.last_commit, &again.welcome.disks[..]), (CommitId(3), &[disk][..]));
    let metrics = site.metrics().await;
    for line in [
        "highwater_collector_received_chunks_total 3",
        "highwater_collector_commits_total{kind=\"filesystem\"} 3",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    assert!(metrics.contains(&format!("rpo_age_seconds{{machine=\"{}\"}}", identity.machine)));
}

#[tokio::test(flavor = "multi_thread")]
async fn much_more_than_a_window_flows_and_memory_stays_bounded() {
    let site = Site::with(|config| config.window = 512 << 10).await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    assert_eq!(agent.welcome.window_bytes, 512 << 10);
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let chunks = 120;
    for n in 0..chunks {
        let chunk = agent.chunk(disk, n * 32, &[n as u8 + 1; 32].map(|seed| seed));
        agent.push(delta, &chunk).await;
        assert!(agent.window.under_way_bytes() <= 512 << 10);
    }
    agent.commit(delta, chunks, CommitKind::Partial).await;
    assert_eq!(agent.stored().await, (delta, CommitId(1)));
    assert_eq!(agent.window.under_way_bytes(), 0, "everything was acknowledged before it was stored");
    let metrics = site.metrics().await;
    assert!(metrics.contains("highwater_collector_window_used_bytes 0\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_sent_twice_is_stored_once() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let delta = DeltaId::new();
    for _ in 0..2 {
        let mut agent = site.agent(&identity, disk).await;
        agent.send(AgentMessage::DeltaBegin(delta)).await;
        let chunk = agent.chunk(disk, 0, &[5]);
        agent.push(delta, &chunk).await;
        agent.commit(delta, 1, CommitKind::Partial).await;
        assert_eq!(agent.stored().await, (delta, CommitId(1)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_or_aborted_delta_leaves_nothing() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    agent.deliver(disk, 0, &[1]).await;
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let chunk = agent.chunk(disk, 0, &[9]);
    agent.push(delta, &chunk).await;
    agent.send(AgentMessage::DeltaAbort(delta)).await;
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    agent.push(delta, &chunk).await;
    agent.sender.flush().await.unwrap();
    drop(agent);
    let mut agent = site.agent(&identity, disk).await;
    assert_eq!(agent.welcome.last_commit, CommitId(1));
    assert_eq!(agent.deliver(disk, 1, &[2]).await, CommitId(2));
    let state = site.vault().await.machine(identity.machine).await.unwrap();
    let segments = site.vault_dir().join(format!("machines/{}/segments", identity.machine));
    let files = std::fs::read_dir(segments).unwrap().filter(|f| f.as_ref().unwrap().path().is_file()).count();
    assert_eq!(files, state.segments().count(), "no segment of an unfinished delta is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_session_wins() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut old = site.agent(&identity, disk).await;
    let delta = DeltaId::new();
    old.send(AgentMessage::DeltaBegin(delta)).await;
    let chunk = old.chunk(disk, 0, &[1]);
    old.push(delta, &chunk).await;
    old.sender.flush().await.unwrap();
    let mut new = site.agent(&identity, disk).await;
    let refusal = old.refusal().await;
    assert_eq!((refusal.code, refusal.retry), (1307, false));
    assert_eq!(new.deliver(disk, 0, &[2]).await, CommitId(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_machines_at_once() {
    let site = Site::new().await;
    let mut tasks = Vec::new();
    for _ in 0..12 {
        let identity = site.machine().await;
        let disk = DiskId::new();
        let mut agent = site.agent(&identity, disk).await;
        tasks.push(tokio::spawn(async move {
            for n in 1..=5 {
                assert_eq!(agent.deliver(disk, n, &[n as u8]).await, CommitId(n));
            }
            (identity.machine, agent)
        }));
    }
    for task in tasks {
        let (machine, _agent) = task.await.unwrap();
        assert_eq!(site.vault().await.machine(machine).await.unwrap().points.len(), 5);
    }
    assert!(site.metrics().await.contains("highwater_collector_commits_total{kind=\"filesystem\"} 60\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_is_quick_and_said() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    agent.deliver(disk, 0, &[1]).await;
    agent.send(AgentMessage::DeltaBegin(DeltaId::new())).await;
    agent.send(AgentMessage::Ping(1)).await;
    agent.receiver.recv().await.unwrap();
    let vault = site.vault().await;
    let Site { running, dir } = site;
    let ending = tokio::spawn(running.shutdown());
    let refusal = agent.refusal().await;
    assert_eq!((refusal.code, refusal.retry), (1310, true));
    drop(agent);
    tokio::time::timeout(Duration::from_secs(5), ending).await.unwrap().unwrap();
    assert_eq!(vault.machine(identity.machine).await.unwrap().last_commit, CommitId(1));
    drop(dir);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn throughput_of_one_session() {
    let site = Site::new().await;
    let (identity, disk) = (site.machine().await, DiskId::new());
    let mut agent = site.agent(&identity, disk).await;
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let seeds: Vec<u8> = (1..=32).collect();
    let chunk = agent.chunk(disk, 0, &seeds);
    let chunks = 4096;
    let begun = std::time::Instant::now();
    for _ in 0..chunks {
        agent.push(delta, &chunk).await;
    }
    let sent = begun.elapsed();
    agent.commit(delta, chunks, CommitKind::Partial).await;
    agent.stored().await;
    let mib = (chunk.len() as u64 * chunks) as f64 / f64::from(1 << 20);
    println!(
        "{mib:.0} MiB: {:.0} MiB/s, stored after another {:?}",
        mib / sent.as_secs_f64(),
        begun.elapsed() - sent
    );
}
