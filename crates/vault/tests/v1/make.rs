//! How the fixture was made, beside a model that tells what it holds.

use super::facts::{Commit, Content, Expected, Machine, content};
use highwater_delta::*;
use highwater_vault::{DiskRecord, MachineWriter, Vault, VaultKey, local_store};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const B: usize = BLOCK_BYTES;

/// A disk as the agent sees it.
struct Disk {
    record: DiskRecord,
    blocks: Vec<u8>,
    stored: Vec<StoredBlock>,
}

impl Disk {
    fn new(id: u8, name: &str, size_bytes: u64) -> Self {
        let record = DiskRecord { disk: DiskId::from_bytes([id; 16]), name: name.to_owned(), size_bytes: 0 };
        let mut disk = Self { record, blocks: Vec::new(), stored: Vec::new() };
        disk.resize(size_bytes);
        disk
    }
    fn resize(&mut self, size_bytes: u64) {
        let blocks = Block::count_for(size_bytes) as usize;
        self.record.size_bytes = size_bytes;
        self.blocks.resize(blocks * B, 0);
        self.stored.resize(blocks, StoredBlock::Absent);
    }
    fn content(&self) -> Content {
        content(self.record.disk, self.record.size_bytes, &self.blocks, &self.stored)
    }
    /// A chunk of these extents; data is of the kind given.
    fn write(&mut self, extents: &[(u64, u32, Data)], key: &HashKey) -> bytes::Bytes {
        let (mut payload, mut list) = (Vec::new(), Vec::new());
        for (start, count, data) in extents {
            for block in *start..*start + u64::from(*count) {
                let bytes = data.block(block);
                self.blocks[block as usize * B..][..B].copy_from_slice(&bytes);
                let hash = || StoredBlock::Data(key.hash(&bytes));
                self.stored[block as usize] = if bytes == [0; B] { StoredBlock::Zero } else { hash() };
                if !matches!(data, Data::Discard) {
                    payload.extend_from_slice(&bytes);
                }
            }
            let fill = if matches!(data, Data::Discard) { Fill::Zero } else { Fill::Data };
            list.push(Extent { start: Block(*start), count: *count, fill });
        }
        let mut out = Vec::new();
        encode_chunk(self.record.disk, &list, &payload, key, 3, &mut out).unwrap();
        out.into()
    }
}

#[derive(Clone, Copy)]
enum Data {
    /// Compresses well.
    Text(u8),
    /// Does not compress.
    Noise(u64),
    /// Zeros that came as data.
    Zeros,
    /// A zero extent.
    Discard,
}

impl Data {
    fn block(self, number: u64) -> [u8; B] {
        let mut block = [0; B];
        match self {
            Self::Text(version) => {
                block.iter_mut().enumerate().for_each(|(at, byte)| *byte = version ^ (at / 200) as u8 | 1);
                block[..8].copy_from_slice(&number.to_le_bytes());
            }
            Self::Noise(seed) => {
                let mut state = seed << 32 | number | 1;
                block.as_chunks_mut::<8>().0.iter_mut().for_each(|word| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
                    *word = (state ^ state >> 29).to_le_bytes();
                });
            }
            Self::Zeros | Self::Discard => {}
        }
        block
    }
}

/// One machine being made.
struct Making {
    writer: MachineWriter,
    vault: Vault,
    dir: PathBuf,
    taken_at_ms: u64,
    commits: Vec<Commit>,
}

impl Making {
    async fn new(vault: &Vault, dir: &Path, machine: u8, host_name: &str) -> Self {
        let machine = MachineId::from_bytes([machine; 16]);
        vault.register_machine(machine, host_name).await.unwrap();
        let writer = vault.writer(machine).await.unwrap();
        let dir = dir.join("machines").join(machine.to_string());
        Self { writer, vault: vault.clone(), dir, taken_at_ms: 1_795_000_000_000, commits: Vec::new() }
    }

    async fn commit(&mut self, present: &[&Disk], point: Option<Consistency>, chunks: Vec<bytes::Bytes>) {
        let keep = point.is_some() || !chunks.is_empty();
        self.writer.set_disks(present.iter().map(|disk| disk.record.clone()).collect()).unwrap();
        let delta = DeltaId::new();
        self.writer.begin(delta).await.unwrap();
        for chunk in chunks {
            self.writer.push(chunk).await.unwrap();
        }
        self.taken_at_ms += 60_000;
        let covered = |disk: &&Disk| PointDisk { disk: disk.record.disk, size_bytes: disk.record.size_bytes };
        let info = point.map(|consistency| PointInfo {
            consistency,
            taken_at_ms: self.taken_at_ms,
            freeze_us: if consistency == Consistency::Crash { 0 } else { 1234 },
            disks: present.iter().map(covered).collect(),
        });
        let kind = info.clone().map_or(CommitKind::Partial, CommitKind::Point);
        let commit = self.writer.commit(kind).await.unwrap();
        if keep {
            // Of a partial commit sizes are the machine's last ones: told of points only.
            let disks =
                if info.is_some() { present.iter().map(|disk| disk.content()).collect() } else { vec![] };
            self.commits.push(Commit { commit, delta, remembered: true, info, disks });
        }
    }

    async fn idle(&mut self, present: &[&Disk], upto: u64) {
        while self.writer.state().last_record < upto {
            self.commit(present, None, Vec::new()).await;
        }
    }

    /// What a crash between a segment and its record leaves.
    fn interrupt(&self) {
        let segments = self.dir.join("segments");
        let any = fs::read_dir(&segments).unwrap().next().unwrap().unwrap().path();
        fs::copy(any, segments.join(format!("{}.seg", SegmentId::new()))).unwrap();
    }
    async fn take_over(&mut self) {
        self.interrupt();
        let epoch = self.writer.state().epoch;
        self.writer = self.vault.writer(self.writer.machine()).await.unwrap();
        assert_eq!(self.writer.state().epoch, epoch + 1);
    }

    fn facts(self, interrupted: bool) -> Machine {
        let state = self.writer.state();
        let mut commits = self.commits;
        for commit in &mut commits {
            commit.remembered = state.commit_of(commit.delta).is_some();
        }
        Machine {
            machine: state.machine,
            host_name: state.host_name.clone(),
            last_record: state.last_record,
            epoch: state.epoch,
            interrupted,
            disks: state.disks.clone(),
            former_disks: state.former_disks.clone(),
            commits,
        }
    }
}

const CRASH: Option<Consistency> = Some(Consistency::Crash);
const FILESYSTEM: Option<Consistency> = Some(Consistency::Filesystem);
const APPLICATION: Option<Consistency> = Some(Consistency::Application);

async fn web(vault: &Vault, dir: &Path) -> Machine {
    use Data::*;
    let mut m = Making::new(vault, dir, 0x11, "web-1.example.com").await;
    let key = m.writer.hash_key();
    let mut a = Disk::new(0xa1, "vda", 256 * B as u64);
    // Its last block is not whole.
    let mut b = Disk::new(0xb2, "vg0/données", 5000 * B as u64 - 1000);
    // A first copy in two parts.
    let chunks = vec![
        a.write(&[(0, 2, Noise(1)), (2, 20, Text(3)), (40, 1, Zeros)], &key),
        a.write(&[(64, 32, Text(5))], &key),
    ];
    m.commit(&[&a, &b], None, chunks).await;
    let chunks = vec![a.write(&[(100, 4, Text(7)), (104, 100, Discard)], &key)];
    m.commit(&[&a], CRASH, chunks).await;
    // An index of more than one page.
    let mut chunks = Vec::new();
    for first in (0..2200).step_by(250) {
        let extents: Vec<_> = (first..(first + 250).min(2200)).map(|n| (2 * n + 1, 1, Discard)).collect();
        chunks.push(b.write(&extents, &key));
    }
    let mut end = Text(9).block(4999);
    end[B - 1000..].fill(0);
    chunks.push(b.write(&[(4400, 8, Text(11)), (4990, 2, Noise(2))], &key));
    m.commit(&[&a, &b], None, chunks).await;
    // Several chunks of one segment overlap; both disks.
    let chunks = vec![
        a.write(&[(0, 4, Text(13)), (250, 6, Text(15))], &key),
        b.write(&[(0, 6, Text(17)), (10, 4, Discard), (4995, 1, Noise(3))], &key),
        a.write(&[(1, 2, Text(19)), (3, 1, Discard), (252, 1, Zeros)], &key),
        b.write(&[(2, 1, Zeros), (3, 9, Text(21))], &key),
    ];
    m.commit(&[&a, &b], FILESYSTEM, chunks).await;
    m.take_over().await;
    // Grown, and written behind its old end.
    a.resize(400 * B as u64);
    let chunks = vec![a.write(&[(5, 1, Text(23)), (300, 2, Text(25)), (399, 1, Noise(4))], &key)];
    m.commit(&[&a, &b], APPLICATION, chunks).await;
    m.idle(&[&a, &b], 63).await;
    let chunks = vec![b.write(&[(4400, 3, Discard)], &key)];
    m.commit(&[&a, &b], FILESYSTEM, chunks).await;
    // One is taken away, another comes.
    let chunks = vec![a.write(&[(7, 1, Text(27))], &key)];
    m.commit(&[&a], FILESYSTEM, chunks).await;
    let mut c = Disk::new(0xc3, "", 64 * B as u64);
    let chunks = vec![c.write(&[(0, 30, Text(29)), (30, 34, Discard)], &key)];
    m.commit(&[&a, &c], None, chunks).await;
    let chunks = vec![c.write(&[(63, 1, Noise(5))], &key)];
    m.commit(&[&a, &c], CRASH, chunks).await;
    c.resize(40 * B as u64);
    let chunks = vec![c.write(&[(39, 1, Text(31))], &key)];
    m.commit(&[&a, &c], FILESYSTEM, chunks).await;
    m.take_over().await;
    m.idle(&[&a, &c], 129).await;
    let chunks = vec![a.write(&[(0, 1, Text(33))], &key)];
    m.commit(&[&a, &c], FILESYSTEM, chunks).await;
    m.commit(&[&a, &c], APPLICATION, Vec::new()).await;
    m.facts(false)
}

async fn db(vault: &Vault, dir: &Path) -> Machine {
    use Data::*;
    let mut m = Making::new(vault, dir, 0x22, "datenbänke").await;
    let key = m.writer.hash_key();
    let mut d = Disk::new(0xd4, "nvme0n1", 1000 * B as u64);
    let all = d.write(&[(0, 4, Noise(6)), (4, 20, Text(35)), (24, 976, Discard)], &key);
    let chunks = vec![all];
    m.commit(&[&d], FILESYSTEM, chunks).await;
    let chunks = vec![d.write(&[(2, 1, Text(37)), (500, 1, Text(39))], &key)];
    m.commit(&[&d], FILESYSTEM, chunks).await;
    let chunks = vec![d.write(&[(0, 1, Discard), (500, 1, Discard), (999, 1, Text(41))], &key)];
    m.commit(&[&d], CRASH, chunks).await;
    m.interrupt();
    m.facts(true)
}

/// Makes the fixture in an existing directory.
pub async fn make(dir: &Path) {
    let key = VaultKey::generate().unwrap();
    key.save(&dir.join("vault.key")).unwrap();
    let objects = dir.join("vault");
    let vault = Vault::create(local_store(&objects).unwrap(), &key).await.unwrap();
    let control: BTreeMap<String, String> = [
        ("authority", "{\"cert_pem\": \"none\"}"),
        ("tokens/00ff", "a token"),
        ("disks/a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1", "whose"),
        ("revoked/22222222.0", ""),
    ]
    .map(|(name, text)| (name.to_owned(), text.to_owned()))
    .into();
    for (name, text) in &control {
        assert!(vault.control_create(name, text.as_bytes()).await.unwrap());
    }
    let machines = vec![web(&vault, &objects).await, db(&vault, &objects).await];
    let expected = Expected { vault: vault.id(), control, machines };
    let text = serde_json::to_string_pretty(&expected).unwrap();
    fs::write(dir.join("expected.json"), text + "\n").unwrap();
}
