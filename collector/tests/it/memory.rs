//! How much memory the process takes with so many machines at work. A measurement: `cargo test -p highwater-collector
//! --test it memory -- --ignored --nocapture`.

use crate::command::{any_ports, init, json, run};
use crate::support::{Agent, DISK_BLOCKS, point};
use highwater_delta::{BlockRange, CommitKind, DeltaId, DiskId};
use highwater_wire::enroll::enroll;
use highwater_wire::message::{AgentMessage, CollectorMessage};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// What is promised: so much, and so much for each active machine.
const BASE_MAX: u64 = 256 * MIB;
const MACHINE_MAX: u64 = 8 * MIB;
/// How long each number of machines is at work.
const WORK: Duration = Duration::from_secs(12);

fn resident(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Sends deltas as fast as they are taken, commits them, and compares the disk, in turn.
async fn work(mut agent: Agent, disk: DiskId, until: Instant) -> (u64, u64) {
    agent.disks(&[disk]).await;
    let seeds: Vec<u8> = (1..=32).collect();
    let chunks: Vec<_> = (0..DISK_BLOCKS / 32).map(|n| agent.chunk(disk, n * 32, &seeds)).collect();
    let (mut bytes, mut compared, mut round) = (0, 0, 0);
    while Instant::now() < until {
        let delta = DeltaId::new();
        agent.send(AgentMessage::DeltaBegin(delta)).await;
        let mut sent = 0;
        // 64 MiB, so that segments are finished within a delta.
        for chunk in chunks.iter().cycle().take(512) {
            agent.push(delta, chunk).await;
            bytes += chunk.len() as u64;
            sent += 1;
            if Instant::now() > until {
                break;
            }
        }
        round += 1;
        let kind = if round % 2 == 0 { point(disk) } else { CommitKind::Partial };
        agent.commit(delta, sent, kind).await;
        agent.stored().await;
        agent.send(AgentMessage::Hashes { disk, range: BlockRange::new(0, DISK_BLOCKS) }).await;
        loop {
            match agent.receiver.recv().await.unwrap() {
                CollectorMessage::Hashes { blocks, .. } => break compared += blocks.len() as u64,
                CollectorMessage::Received { .. } | CollectorMessage::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    agent.sender.close().await.unwrap();
    (bytes, compared)
}

#[test]
#[ignore = "a measurement of a minute"]
fn memory_of_sessions() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for machines in [1_u64, 8, 32] {
        // On a disk of its own speed; a vault in memory would be measured with it.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = init(dir.path());
        any_ports(&config);
        let (mut child, ports) = run(&config);
        let pid = child.id();
        let idle = resident(pid, "VmRSS:");
        let url = format!("https://{}", ports["management"].as_str().unwrap());
        let endpoint = ports["ingest"].as_str().unwrap().to_owned();
        let (bytes, compared) = runtime.block_on(async {
            let mut agents = Vec::new();
            for _ in 0..machines {
                let (_, token) = json(&["token", "create", "--config", &config]);
                let token = token["token"].as_str().unwrap().parse().unwrap();
                let identity = enroll(&url, &token, "h").await.unwrap().identity;
                agents.push(Agent::connect(&endpoint, &identity, identity.machine).await.unwrap());
            }
            let until = Instant::now() + WORK;
            let tasks: Vec<_> =
                agents.into_iter().map(|agent| tokio::spawn(work(agent, DiskId::new(), until))).collect();
            let mut all = (0, 0);
            for task in tasks {
                let (bytes, compared) = task.await.unwrap();
                all = (all.0 + bytes, all.1 + compared);
            }
            all
        });
        let (peak, after) = (resident(pid, "VmHWM:"), resident(pid, "VmRSS:"));
        println!(
            "{machines:>3} machines: idle {} MiB, at most {} MiB, afterwards {} MiB; {} MiB sent, {compared} blocks compared",
            idle / MIB,
            peak / MIB,
            after / MIB,
            bytes / MIB
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(peak < BASE_MAX + machines * MACHINE_MAX, "{machines} machines: {} MiB", peak / MIB);
    }
}
