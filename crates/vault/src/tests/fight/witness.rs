//! Who sees everything that happens to the store, and knows the right time: all that is promised is asserted here.

use super::{
    copy::Copied,
    sea::{Recorded, Shore},
};
use crate::{
    DiskRecord, MachineState, Vault, VaultKey,
    key::MachineKeys,
    policy::Policy,
    record::*,
    tests::support::{B, content},
    vault::open_record,
    verify,
};
use highwater_delta::*;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex},
};

/// How far stamps and ages may be from the right time.
pub const TOLERANCE_MS: u64 = 600_000;

/// A stretch of blocks of a disk, and their versions.
pub type Written = Vec<(DiskId, u64, Vec<u32>)>;
type Blocks = BTreeMap<(DiskId, u64), u32>;

/// What became of a delta, as far as whoever sent it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Unknown,
    Stored(CommitId),
    /// Fenced, or refused before anything was recorded.
    Never,
}

/// What was tried.
#[derive(Default)]
pub struct Ledger(Mutex<HashMap<DeltaId, Attempt>>);
struct Attempt {
    written: Written,
    outcome: Outcome,
    times: u32,
}
impl Ledger {
    pub fn begin(&self, delta: DeltaId, written: &Written) {
        let mut all = self.0.lock().unwrap();
        let new = Attempt { written: written.clone(), outcome: Outcome::Unknown, times: 0 };
        all.entry(delta).or_insert(new).times += 1;
    }
    pub fn end(&self, delta: DeltaId, outcome: Outcome) {
        let mut all = self.0.lock().unwrap();
        let attempt = all.get_mut(&delta).expect("it was begun");
        // An earlier time may still come true, and be what fences the later.
        if outcome != Outcome::Never || attempt.times == 1 {
            attempt.outcome = outcome;
        }
    }
}

/// What was seen of one machine.
struct Seen {
    keys: MachineKeys,
    state: MachineState,
    now: Blocks,
    commits: HashMap<DeltaId, CommitId>,
    /// Of each point: what it holds, and when it was really sent to be stored.
    points: BTreeMap<CommitId, (Blocks, u64)>,
    /// When each commit's record was there, which may be long after it was sent.
    arrived: BTreeMap<CommitId, u64>,
    writer: [u8; 16],
    fenced: HashSet<[u8; 16]>,
    fights: usize,
    expired: usize,
}

pub struct Witness {
    pub shore: Arc<Shore>,
    pub ledger: Arc<Ledger>,
    vault: Vault,
    machines: BTreeMap<MachineId, Seen>,
    policy: Policy,
    pub trace: blake3::Hasher,
}

/// What a run came to, so that one sees that it was worth something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub records: u64,
    pub commits: usize,
    pub fights: usize,
    pub fenced: usize,
    pub expired: usize,
    pub read_back: usize,
}
impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.records += other.records;
        self.commits += other.commits;
        self.fights += other.fights;
        self.fenced += other.fenced;
        self.expired += other.expired;
        self.read_back += other.read_back;
    }
}

impl Witness {
    /// `vault` reaches the store at once, whatever the weather.
    pub async fn new(shore: Arc<Shore>, vault: Vault, machines: &[MachineId], policy: Policy) -> Self {
        let mut seen = BTreeMap::new();
        for machine in machines {
            let (keys, host_name) = vault.machine_keys(*machine).await.unwrap();
            let state = MachineState::empty(*machine, host_name);
            let (now, commits, points, arrived, fenced) = Default::default();
            let (writer, fights, expired) = ([0; 16], 0, 0);
            let one = Seen { keys, state, now, commits, points, arrived, writer, fenced, fights, expired };
            seen.insert(*machine, one);
        }
        let (ledger, trace) = (Arc::default(), blake3::Hasher::new());
        Self { shore, ledger, vault, machines: seen, policy, trace }
    }

    /// Looks at all that was recorded since the last time.
    pub fn look(&mut self) {
        for Recorded { path, sealed, sent_ms, at_ms } in self.shore.take_records() {
            let text = path.to_string();
            let mut parts = text.split('/').skip(1);
            let machine: MachineId = parts.next().unwrap().parse().unwrap();
            let seen = self.machines.get_mut(&machine).unwrap();
            let envelope = open_record(&seen.keys, &path, &sealed).unwrap();
            self.trace.update(format!("{machine} {} {} {at_ms}", envelope.number, envelope.kind).as_bytes());
            if envelope.number <= seen.state.last_record {
                // By one who was away for so long that the number is free again: he finds the mark, and it counts nothing.
                let mark = crate::store::pruned_path(machine, envelope.number);
                assert!(self.shore.had(&mark), "{text} is there a second time");
                seen.fenced.insert(envelope.writer);
                continue;
            }
            let before = seen.state.clone();
            // Numbers without gaps, hashes that follow each other, epochs, maintainers: all that readers insist on.
            seen.state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), &text).unwrap_or_else(|e| {
                panic!("nobody can read {text} (kind {}, at {at_ms}): {e}", envelope.kind);
            });
            // A record may be on its way for long; its commit's age is counted from when it set out.
            let off = envelope.stored_at_ms.abs_diff(sent_ms);
            match envelope.kind {
                KIND_COMMIT => {
                    assert!(off <= TOLERANCE_MS, "{text} is stamped {off} ms off");
                    seen.commit(&envelope, sent_ms, &self.ledger);
                    seen.arrived.insert(CommitId(envelope.number), at_ms);
                }
                KIND_TAKEOVER => seen.fence(&envelope, &text),
                KIND_EXPIRED => seen.expire(&before, &envelope, at_ms, &self.policy),
                _ => {}
            }
        }
        let ledger = self.ledger.0.lock().unwrap();
        for (delta, Attempt { outcome, .. }) in ledger.iter() {
            let found = self.machines.values().find_map(|seen| seen.commits.get(delta).copied());
            match outcome {
                Outcome::Unknown => {}
                Outcome::Stored(commit) => assert_eq!(found, Some(*commit), "{delta} was told as stored"),
                // Who learns of it when its records are deleted already cannot be told which.
                Outcome::Never => assert!(
                    self.machines.iter().all(|(machine, seen)| seen.commits.get(delta).is_none_or(
                        |commit| { self.shore.had(&crate::store::pruned_path(*machine, commit.0)) }
                    )),
                    "{delta} was told as not stored"
                ),
            }
        }
    }

    /// Every point that is kept reads back; answers how many do.
    pub async fn read_back(&mut self) -> usize {
        self.look();
        let mut count = 0;
        for (machine, seen) in &self.machines {
            let state = self.vault.machine(*machine).await.unwrap();
            assert_eq!(state, seen.state, "a checkpoint makes no difference");
            count += seen.read(&self.vault, &state).await;
        }
        count
    }

    /// The same for a copy that was made meanwhile, of which only the newest points may be missing.
    pub async fn compare(&mut self, copy: &Copied, key: &VaultKey) -> usize {
        self.look();
        let vault = Vault::open(copy.store.clone(), key).await.unwrap();
        let mut count = 0;
        for (machine, seen) in &self.machines {
            let state = vault.machine(*machine).await.unwrap();
            let there = |commit: &CommitId| *commit <= state.last_commit;
            // What had arrived before it began.
            let mut old = seen.arrived.iter().filter(|(_, at_ms)| **at_ms < copy.began_ms);
            assert!(old.all(|(id, _)| there(id)), "old points are missing");
            count += seen.read(&vault, &state).await;
        }
        let report = verify::verify_vault(&vault).await.unwrap();
        assert!(report.is_clean(), "{:?}", report.problems);
        count
    }

    pub fn tally(&self) -> Tally {
        let all = || self.machines.values();
        let ledger = self.ledger.0.lock().unwrap();
        Tally {
            records: all().map(|seen| seen.state.last_record).sum(),
            commits: all().map(|seen| seen.commits.len()).sum(),
            fights: all().map(|seen| seen.fights).sum(),
            fenced: ledger.values().filter(|attempt| attempt.outcome == Outcome::Never).count(),
            expired: all().map(|seen| seen.expired).sum(),
            read_back: 0,
        }
    }
}

impl Seen {
    async fn read(&self, vault: &Vault, state: &MachineState) -> usize {
        for point in &state.points {
            let (expected, _) = &self.points[&point.id];
            for DiskRecord { disk, size_bytes, .. } in &state.disks {
                let map = vault.block_map_of(state, *disk, point.id).await.unwrap();
                let mut read = vec![7; *size_bytes as usize];
                map.read(BlockRange::new(0, map.blocks()), &mut read).await.unwrap();
                for (block, have) in read.chunks(B).enumerate() {
                    let version = expected.get(&(*disk, block as u64)).copied().unwrap_or(0);
                    assert!(
                        have == content(version),
                        "{disk} block {block} at {} of {}",
                        point.id,
                        state.machine
                    );
                }
            }
        }
        state.points.len()
    }

    /// Whoever writes after another fences him for ever.
    fn fence(&mut self, envelope: &Envelope, name: &str) {
        let writer = envelope.writer;
        assert!(!self.fenced.contains(&writer), "{name} is of a writer that was fenced");
        if writer != self.writer {
            self.fenced.insert(self.writer);
            self.writer = writer;
            self.fights += 1;
        }
    }

    fn commit(&mut self, envelope: &Envelope, sent_ms: u64, ledger: &Ledger) {
        let commit = CommitId(envelope.number);
        self.fence(envelope, &format!("commit {commit}"));
        let body: CommitBody = postcard::from_bytes(&envelope.body).unwrap();
        let ledger = ledger.0.lock().unwrap();
        let written = &ledger.get(&body.delta).expect("somebody sent it").written;
        assert_eq!(self.commits.insert(body.delta, commit), None, "{} is there twice", body.delta);
        for (disk, start, versions) in written {
            self.now.extend((*start..).zip(versions).map(|(block, version)| ((*disk, block), *version)));
        }
        if matches!(body.kind, CommitKind::Point(_)) {
            self.points.insert(commit, (self.now.clone(), sent_ms));
        }
    }

    /// Nothing goes before its time, by the right clock.
    fn expire(&mut self, before: &MachineState, envelope: &Envelope, at_ms: u64, policy: &Policy) {
        let body: ExpiredBody = postcard::from_bytes(&envelope.body).unwrap();
        let least = policy.keep_all.max(policy.immutable_for).as_millis() as u64;
        let newest = before.points.last().expect("there are points").id;
        let stored = |id: &CommitId| self.points[id].1;
        for point in &body.points {
            let age = at_ms - stored(point);
            assert!(*point != newest, "the newest point expires");
            assert!(age + TOLERANCE_MS >= least, "{point} expires {age} ms after it was stored");
            for tier in &policy.tiers {
                if age + TOLERANCE_MS >= tier.keep_for.as_millis() as u64 {
                    continue;
                }
                let around = tier.every.as_millis() as u64 + 2 * TOLERANCE_MS;
                let near = |kept: &PointRecord| stored(&kept.id).abs_diff(stored(point)) <= around;
                assert!(self.state.points.iter().any(near), "{point} expires with all that is near it");
            }
        }
        self.expired += body.points.len();
    }
}
