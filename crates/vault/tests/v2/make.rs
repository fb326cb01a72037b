//! How the fixture was made, beside a model that tells what it holds.

use super::{
    Fixture, PASSPHRASE, START_MS,
    facts::{Content, content},
    pack::pack,
};
use futures::TryStreamExt;
use highwater_delta::*;
use highwater_vault::{
    Clock, DiskRecord, Hold, KeyRing, KeySource, MachineWriter, Vault, erase,
    keys::Passphrase,
    maintain::{self, Settings, set_hold},
    policy::{Policy, Tier, set_policy},
};
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

const B: usize = BLOCK_BYTES;
const BLOCKS: u64 = 64;
const MINUTE_MS: u64 = 60_000;

struct Disk {
    record: DiskRecord,
    blocks: Vec<u8>,
    stored: Vec<StoredBlock>,
}

impl Disk {
    fn new(id: u8, name: &str) -> Self {
        let size_bytes = BLOCKS * B as u64;
        let record = DiskRecord { disk: DiskId::from_bytes([id; 16]), name: name.to_owned(), size_bytes };
        Self {
            record,
            blocks: vec![0; BLOCKS as usize * B],
            stored: vec![StoredBlock::Absent; BLOCKS as usize],
        }
    }
    fn content(&self) -> Content {
        content(self.record.disk, self.record.size_bytes, &self.blocks, &self.stored)
    }
    /// `count` blocks of a version; of version 0 zeros.
    fn write(&mut self, start: u64, count: u32, version: u32, key: &HashKey) -> bytes::Bytes {
        let mut payload = Vec::new();
        for number in start..start + u64::from(count) {
            let mut block = [0; B];
            if version > 0 {
                block.iter_mut().enumerate().for_each(|(at, b)| *b = version as u8 ^ (at / 300) as u8 | 1);
                block[..12].copy_from_slice(&[&number.to_le_bytes()[..], &version.to_le_bytes()].concat());
                payload.extend_from_slice(&block);
            }
            self.blocks[number as usize * B..][..B].copy_from_slice(&block);
            let hash = StoredBlock::Data(key.hash(&block));
            self.stored[number as usize] = if version == 0 { StoredBlock::Zero } else { hash };
        }
        let fill = if version == 0 { Fill::Zero } else { Fill::Data };
        let extent = Extent { start: Block(start), count, fill };
        let mut out = Vec::new();
        encode_chunk(self.record.disk, &[extent], &payload, key, 3, &mut out).unwrap();
        out.into()
    }
}

struct Making {
    vault: Vault,
    clock: Arc<AtomicU64>,
    writer: MachineWriter,
    /// Every point that was made.
    points: BTreeMap<CommitId, Vec<Content>>,
}

impl Making {
    async fn commit(
        &mut self,
        disks: &[&Disk],
        point: Option<Consistency>,
        chunks: Vec<bytes::Bytes>,
    ) -> CommitId {
        self.writer.set_disks(disks.iter().map(|disk| disk.record.clone()).collect()).unwrap();
        self.writer.begin(DeltaId::new()).await.unwrap();
        for chunk in chunks {
            self.writer.push(chunk).await.unwrap();
        }
        let covered = |disk: &&Disk| PointDisk { disk: disk.record.disk, size_bytes: disk.record.size_bytes };
        let info = point.map(|consistency| PointInfo {
            consistency,
            taken_at_ms: self.clock.load(SeqCst),
            freeze_us: 42,
            disks: disks.iter().map(covered).collect(),
        });
        let kind = info.clone().map_or(CommitKind::Partial, CommitKind::Point);
        let commit = self.writer.commit(kind).await.unwrap();
        if info.is_some() {
            self.points.insert(commit, disks.iter().map(|disk| disk.content()).collect());
        }
        commit
    }
}

pub async fn make(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let file = KeySource::File(dir.join("vault.key"));
    let passphrase = KeySource::Passphrase(Passphrase::new(PASSPHRASE).unwrap());
    let mut ring = KeyRing::create(store.clone(), &file, "file").await.unwrap();
    ring.add(&passphrase, "passphrase").await.unwrap();
    let clock = Arc::new(AtomicU64::new(START_MS));
    let told = clock.clone();
    let vault = ring.vault().unwrap().with_clock(Clock::new(move || told.load(SeqCst)));
    vault.control_create("ca/1", b"a certificate authority").await.unwrap();
    let machines = [1, 2, 3].map(|n| MachineId::from_bytes([n; 16]));
    for (machine, name) in machines.into_iter().zip(["web-1", "interrupted", "erased"]) {
        vault.register_machine(machine, name).await.unwrap();
    }
    let tier = Tier { every: Duration::from_secs(86_400), keep_for: Duration::from_secs(30 * 86_400) };
    let default = Policy::default();
    let tiers = default.tiers.iter().copied().chain([tier]).collect();
    let longer = Policy { tiers, immutable_for: Duration::from_secs(3600), ..default };
    set_policy(&vault, None, Some(Policy::default()), START_MS).await.unwrap();
    set_policy(&vault, Some(machines[0]), Some(longer), START_MS).await.unwrap();

    let mut points = BTreeMap::new();
    for machine in machines {
        let writer = vault.writer(machine).await.unwrap();
        let mut making =
            Making { vault: vault.clone(), clock: clock.clone(), writer, points: BTreeMap::new() };
        match machine == machines[0] {
            true => long(&mut making, machine).await,
            false => short(&mut making).await,
        }
        points.insert(machine, making.points);
    }
    erase::erase(&vault, machines[2]).await.unwrap();
    points.remove(&machines[2]);
    // An upload whose record was not put.
    let segments = object_store::path::Path::from(format!("machines/{}/segments", machines[1]));
    let listed = store.list(Some(&segments)).try_next().await.unwrap().unwrap();
    let content = store.get(&listed.location).await.unwrap().bytes().await.unwrap();
    store.put(&segments.join(format!("{}.seg", SegmentId::new())), content.into()).await.unwrap();

    let mut expected = BTreeMap::new();
    for (machine, mut made) in points {
        let state = vault.machine(machine).await.unwrap();
        made.retain(|point, _| state.point(*point).is_ok());
        expected.insert(machine, made.into_iter().collect());
    }
    let now_ms = clock.load(SeqCst);
    let fixture = Fixture { vault: vault.id(), now_ms, points: expected };
    fs::write(dir.join("expected.json"), serde_json::to_vec(&fixture).unwrap()).unwrap();
    fs::write(dir.join("vault.pack"), pack(&*store).await).unwrap();
}

async fn short(making: &mut Making) {
    let key = making.writer.hash_key();
    let mut disk = Disk::new(9, "vda");
    for n in 1..4 {
        let chunk = disk.write(n, 4, n as u32, &key);
        making.commit(&[&disk], Some(Consistency::Crash), vec![chunk]).await;
    }
}

/// Two weeks of points every quarter of an hour, maintained every two hours; one disk comes and goes.
async fn long(making: &mut Making, machine: MachineId) {
    let key = making.writer.hash_key();
    let (mut root, mut data) = (Disk::new(10, "vda"), Disk::new(11, "vdb"));
    let mut n: u32 = 0;
    let is_pruned = async |vault: &Vault| {
        let mark = object_store::path::Path::from(format!("machines/{machine}/pruned/{:020}", 2048));
        vault.objects().head(&mark).await.is_ok()
    };
    while !is_pruned(&making.vault).await {
        n += 1;
        making.clock.fetch_add(15 * MINUTE_MS, SeqCst);
        let start = u64::from(n * 7 % 60);
        let mut chunks = vec![root.write(start, 1 + n % 4, if n.is_multiple_of(9) { 0 } else { n }, &key)];
        let has_data = n % 700 < 500;
        if has_data {
            if n.is_multiple_of(700) {
                data = Disk::new(11, "vdb");
                chunks.push(data.write(0, BLOCKS as u32, 0, &key));
            }
            chunks.push(data.write(u64::from(n * 11 % 50), 1 + n % 11, n, &key));
        }
        let disks: Vec<&Disk> = if has_data { vec![&root, &data] } else { vec![&root] };
        let point = match n % 12 {
            3 => None,
            5 => Some(Consistency::Application),
            8 => Some(Consistency::Filesystem),
            _ => Some(Consistency::Crash),
        };
        let commit = making.commit(&disks, point, chunks).await;
        if point.is_some() && n % 400 == 100 {
            let hold = if n % 800 == 100 { Hold::Legal } else { Hold::Pin };
            set_hold(&making.vault, machine, commit, Some(hold), format!("case {n}")).await.unwrap();
        }
        if n.is_multiple_of(8) {
            let settings = Settings { skew_max: None, records_for: Duration::ZERO, ..Settings::default() };
            maintain::machine(&making.vault, machine, &settings, &()).await.unwrap();
        }
    }
}
