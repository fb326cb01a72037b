//! A store that stalls, and the cache that takes what machines send meanwhile.

use crate::support::{Agent, DISK_BLOCKS, Site, block, chunk, point};
use bytes::Bytes;
use highwater_collector::Config;
use highwater_delta::{BLOCK_BYTES, BlockRange, CommitId, DeltaId, DiskId};
use highwater_wire::Identity;
use highwater_wire::message::{AgentMessage, CollectorMessage};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::timeout;

const MIB: u64 = 1 << 20;
/// Blocks of a chunk, which do not compress.
const CHUNK: u64 = 32;
/// For what is to come at once; long, since it only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(30);

fn cached(bytes: u64) -> impl FnOnce(&mut Config) {
    move |config| {
        config.window = 512 << 10;
        let cache = config.key_file.as_ref().and_then(|file| file.parent()).map(|dir| dir.join("cache"));
        (config.cache, config.cache_bytes) = (cache, bytes);
    }
}

/// A machine, its disk, and what it should hold.
struct Machine {
    identity: Identity,
    disk: DiskId,
    model: Vec<u8>,
    seed: u8,
}

impl Machine {
    async fn new(site: &Site) -> Self {
        let model = vec![0; DISK_BLOCKS as usize * BLOCK_BYTES];
        Self { identity: site.machine().await, disk: DiskId::new(), model, seed: 0 }
    }

    /// The next chunk, at a place of its own.
    fn next(&mut self, agent: &Agent) -> Bytes {
        let start = u64::from(self.seed) * CHUNK % DISK_BLOCKS;
        self.seed += 1;
        let seeds: Vec<u8> = (0..CHUNK as u8).map(|n| self.seed.wrapping_mul(37).wrapping_add(n)).collect();
        let content: Vec<u8> = seeds.iter().flat_map(|seed| block(*seed)).collect();
        self.model[start as usize * BLOCK_BYTES..][..content.len()].copy_from_slice(&content);
        chunk(&agent.welcome.hash_key, self.disk, start, &seeds)
    }

    /// Sends so many chunks as a delta; all of them are taken.
    async fn send(&mut self, agent: &mut Agent, chunks: u64) -> DeltaId {
        let delta = DeltaId::new();
        agent.send(AgentMessage::DeltaBegin(delta)).await;
        for n in 0..chunks {
            let chunk = self.next(agent);
            timeout(GUARD, agent.push(delta, &chunk))
                .await
                .unwrap_or_else(|_| panic!("chunk {n} is not taken"));
        }
        agent.commit(delta, chunks, point(self.disk)).await;
        delta
    }

    async fn assert_exact(&self, site: &Site, at: CommitId) {
        let vault = site.vault().await;
        let map = vault.block_map(self.identity.machine, self.disk, at).await.unwrap();
        let mut out = vec![0; self.model.len()];
        map.read(BlockRange::new(0, DISK_BLOCKS), &mut out).await.unwrap();
        assert!(out == self.model, "other content");
        assert!(highwater_vault::verify::verify_vault(&vault).await.unwrap().is_clean());
    }

    async fn commits(&self, site: &Site) -> usize {
        site.vault().await.machine(self.identity.machine).await.unwrap().points.len()
    }
}

fn used(site: &Site) -> u64 {
    site.running.shared.metrics.cache.used_bytes()
}

/// Files of spools that this process has open, which have no names.
fn spools(dir: &std::path::Path) -> Vec<PathBuf> {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let ours = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|to| {
            let to = to.to_string_lossy().into_owned();
            to.starts_with(&*dir.to_string_lossy()) && to.ends_with(".spool (deleted)")
        })
    };
    open.filter(ours).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_store_stalls_chunks_are_received_and_nothing_is_stored() {
    let (site, store) = Site::faulty(cached(24 * MIB)).await;
    let mut machine = Machine::new(&site).await;
    let mut agent = site.agent(&machine.identity, machine.disk).await;
    machine.send(&mut agent, 2).await;
    agent.stored().await;

    store.stall(true);
    // Far more than window and upload hold, in two deltas.
    let first = machine.send(&mut agent, 60).await;
    let second = machine.send(&mut agent, 30).await;
    assert!(used(&site) > 4 * MIB, "{}", used(&site));
    let early = timeout(Duration::from_secs(2), async {
        loop {
            match agent.receiver.recv().await.unwrap() {
                CollectorMessage::Received { delta, chunks } => agent.window.received(delta, chunks).unwrap(),
                other => panic!("{other:?} while the store stalls"),
            }
        }
    });
    assert!(early.await.is_err());
    assert_eq!(machine.commits(&site).await, 1);
    store.stall(false);
    assert_eq!(agent.stored().await.0, first);
    let (stored, commit) = agent.stored().await;
    assert_eq!(stored, second);
    machine.assert_exact(&site, commit).await;
    assert_eq!(used(&site), 0);
    // And as before.
    machine.send(&mut agent, 3).await;
    machine.assert_exact(&site, agent.stored().await.1).await;
    let metrics = site.metrics().await;
    assert!(metrics.contains("highwater_collector_cache_errors_total 0"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_lets_machines_wait_each_with_its_part() {
    let (site, store) = Site::faulty(cached(16 * MIB)).await;
    let (mut one, mut other) = (Machine::new(&site).await, Machine::new(&site).await);
    let mut agents =
        [site.agent(&one.identity, one.disk).await, site.agent(&other.identity, other.disk).await];
    store.stall(true);
    let mut taken = [0, 0];
    let mut deltas = Vec::new();
    for ((agent, machine), taken) in agents.iter_mut().zip([&mut one, &mut other]).zip(&mut taken) {
        let delta = DeltaId::new();
        agent.send(AgentMessage::DeltaBegin(delta)).await;
        let next = loop {
            let chunk = machine.next(agent);
            if timeout(Duration::from_secs(2), agent.push(delta, &chunk)).await.is_err() {
                break chunk;
            }
            *taken += 1;
            assert!(*taken < 120, "it has no end");
        };
        deltas.push((delta, next));
    }
    // Two thirds, and two thirds of the rest; a window, and what the writer holds.
    assert!(used(&site) <= 16 * MIB);
    assert!(taken[0] > 75 && taken[1] > 20 && taken[1] < taken[0], "{taken:?}");
    store.stall(false);
    for ((agent, machine), ((delta, next), taken)) in
        agents.iter_mut().zip([&mut one, &mut other]).zip(deltas.into_iter().zip(taken))
    {
        timeout(GUARD, agent.push(delta, &next)).await.expect("there is room again");
        agent.commit(delta, taken + 1, point(machine.disk)).await;
        let (_, commit) = agent.stored().await;
        machine.assert_exact(&site, commit).await;
    }
    assert_eq!(used(&site), 0);
    let metrics = site.metrics().await;
    let waited =
        metrics.lines().find_map(|l| l.strip_prefix("highwater_collector_cache_wait_seconds_total "));
    assert!(waited.unwrap().parse::<f64>().unwrap() > 0.5, "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_in_the_cache_never_reaches_the_vault() {
    let (site, store) = Site::faulty(cached(24 * MIB)).await;
    let mut machine = Machine::new(&site).await;
    let mut agent = site.agent(&machine.identity, machine.disk).await;
    store.stall(true);
    machine.send(&mut agent, 60).await;
    let spools = spools(site.dir.path());
    assert!(!spools.is_empty(), "nothing was spooled");
    assert_eq!(fs::read_dir(site.dir.path().join("cache")).unwrap().count(), 0, "no names");
    for spool in &spools {
        let file = File::options().read(true).write(true).open(spool).unwrap();
        let (mut byte, at) = ([0], file.metadata().unwrap().len() / 2);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }
    store.stall(false);
    let refusal = agent.refusal().await;
    assert!(refusal.code == 1352 && refusal.retry, "{refusal:?}");
    // The machine sends it again, and the new session knows nothing of the old one's.
    machine.seed = 0;
    let mut agent = site.agent(&machine.identity, machine.disk).await;
    assert_eq!(machine.commits(&site).await, 0);
    machine.send(&mut agent, 60).await;
    machine.assert_exact(&site, agent.stored().await.1).await;
    assert_eq!(used(&site), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_directory_the_cache_is_done_without() {
    let (site, store) = Site::faulty(cached(24 * MIB)).await;
    let mut machine = Machine::new(&site).await;
    let mut agent = site.agent(&machine.identity, machine.disk).await;
    fs::remove_dir_all(site.dir.path().join("cache")).unwrap();
    store.stall(true);
    let delta = DeltaId::new();
    agent.send(AgentMessage::DeltaBegin(delta)).await;
    let mut taken = 0;
    let next = loop {
        let chunk = machine.next(&agent);
        if timeout(Duration::from_secs(2), agent.push(delta, &chunk)).await.is_err() {
            break chunk;
        }
        taken += 1;
    };
    assert!(taken < 40, "{taken}");
    assert_eq!(site.running.shared.metrics.cache.spooled_bytes(), 0);
    store.stall(false);
    timeout(GUARD, agent.push(delta, &next)).await.unwrap();
    agent.commit(delta, taken + 1, point(machine.disk)).await;
    machine.assert_exact(&site, agent.stored().await.1).await;
    assert!(site.metrics().await.contains("highwater_collector_cache_errors_total 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_ends_gives_its_part_of_the_cache_back() {
    let (site, store) = Site::faulty(cached(24 * MIB)).await;
    let mut machine = Machine::new(&site).await;
    let mut agent = site.agent(&machine.identity, machine.disk).await;
    store.stall(true);
    machine.send(&mut agent, 60).await;
    assert!(used(&site) > 0);
    drop(agent);
    store.stall(false);
    // Once the new one is welcome, the old one is gone. What it had received and not stored may be there or not.
    let mut agent = site.agent(&machine.identity, machine.disk).await;
    // But for what its disk was just doing.
    let gone = async {
        while !spools(site.dir.path()).is_empty() || used(&site) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(GUARD, gone).await.expect("its spool is still there");
    machine.seed = 0;
    machine.send(&mut agent, 60).await;
    machine.assert_exact(&site, agent.stored().await.1).await;
}
