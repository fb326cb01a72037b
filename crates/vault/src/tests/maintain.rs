//! Maintenance against a model: whatever is merged, rewritten, interrupted or failed meanwhile, every point that is kept reads back,
//! and what is not is gone.

mod around;
mod last;
mod lock;

use super::support::*;
use crate::{
    BlockMap, Clock, Hold, MachineWriter, Pace, Vault, VaultError,
    maintain::{Maintainer, Settings, depth_max, set_hold},
    maps::Fill as Full,
    policy::{Policy, Rules, Tier},
    verify,
};
use highwater_delta::*;
use highwater_faults::When;
use object_store::ObjectStoreExt;
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

const BLOCKS: u64 = 96;
const MINUTE_MS: u64 = 60_000;

#[derive(Clone, Debug)]
enum Step {
    /// Runs of disk, start and versions; a stretch of zeros; whether it is a point.
    Delta(Vec<(u8, u64, Vec<u32>)>, (u8, u64, u32), bool),
    /// Minutes pass.
    Wait(u64),
    /// Which call to the store fails, and whether it has its effect all the same.
    Maintain(Option<(u64, bool)>),
    Reopen,
    Hold(prop::sample::Index, bool),
    /// The second disk goes, or comes.
    Disk,
}

fn step() -> impl Strategy<Value = Step> {
    let versions = prop::collection::vec(1_u32..5000, 1..24);
    let runs = prop::collection::vec((0_u8..2, 0..BLOCKS, versions), 0..5);
    let zeros = (0_u8..2, 0..BLOCKS, 1_u32..20);
    prop_oneof![
        12 => (runs, zeros, prop::bool::weighted(0.8)).prop_map(|(r, z, p)| Step::Delta(r, z, p)),
        6 => (1_u64..200).prop_map(Step::Wait),
        4 => Just(Step::Maintain(None)),
        2 => (1_u64..60, any::<bool>()).prop_map(|(n, late)| Step::Maintain(Some((n, late)))),
        1 => Just(Step::Reopen),
        1 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(i, on)| Step::Hold(i, on)),
        1 => Just(Step::Disk),
    ]
}

type Disks = BTreeMap<(u8, u64), u32>;

fn policy() -> Policy {
    let minutes = |n: u64| Duration::from_secs(n * 60);
    let tiers = vec![
        Tier { every: minutes(60), keep_for: minutes(480) },
        Tier { every: minutes(240), keep_for: minutes(1440) },
    ];
    Policy { keep_all: minutes(120), tiers, immutable_for: Duration::ZERO }
}

struct Model {
    faulty: Arc<Faulty>,
    clock: Arc<AtomicU64>,
    vault: Vault,
    key: crate::VaultKey,
    writer: MachineWriter,
    now: Disks,
    points: BTreeMap<CommitId, (Disks, Vec<u8>)>,
    held: Vec<CommitId>,
    has_second: bool,
    /// How long records stay; none at all fences a writer that has put nothing since.
    records_for: Duration,
    /// The second disk has returned: what was held of it may be gone, so that it is copied anew, as agents do.
    is_back: bool,
}

impl Model {
    async fn new() -> Self {
        let faulty = Faulty::new(memory());
        let (vault, key) = vault_on(faulty.clone()).await;
        let clock = Arc::new(AtomicU64::new(1_000_000 * MINUTE_MS));
        let vault = timed(vault, &clock);
        let writer = vault.writer(machine()).await.unwrap();
        let (now, points, held) = Default::default();
        Self {
            faulty,
            clock,
            vault,
            key,
            writer,
            now,
            points,
            held,
            has_second: true,
            records_for: Duration::ZERO,
            is_back: false,
        }
    }

    fn disks(&self) -> Vec<crate::DiskRecord> {
        records(BLOCKS)[..if self.has_second { 2 } else { 1 }].to_vec()
    }

    async fn deliver(&mut self, runs: Vec<(u8, u64, Vec<u32>)>, zeros: (u8, u64, u32), is_point: bool) {
        let hash = self.writer.hash_key();
        self.writer.set_disks(self.disks()).unwrap();
        self.writer.begin(DeltaId::new()).await.unwrap();
        if std::mem::take(&mut self.is_back) {
            self.writer.push(zero_chunk(1, 0, BLOCKS as u32, &hash)).await.unwrap();
            self.now.retain(|(d, _), _| *d == 0);
            self.now.extend((0..BLOCKS).map(|block| ((1, block), 0)));
        }
        let has = |d: u8| d == 0 || self.has_second;
        for (d, start, mut versions) in runs.into_iter().filter(|(d, ..)| has(*d)) {
            versions.truncate((BLOCKS - start) as usize);
            self.writer.push(chunk(disk(10 + d), start, &versions, &hash)).await.unwrap();
            self.now.extend((start..).zip(versions).map(|(block, version)| ((d, block), version)));
        }
        let (d, start, count) = zeros;
        if has(d) {
            let count = count.min((BLOCKS - start) as u32);
            self.writer.push(zero_chunk(d, start, count, &hash)).await.unwrap();
            self.now.extend((start..start + u64::from(count)).map(|block| ((d, block), 0)));
        }
        let covered: Vec<u8> = if self.has_second { vec![0, 1] } else { vec![0] };
        let kind = match is_point {
            false => CommitKind::Partial,
            true => CommitKind::Point(PointInfo {
                consistency: Consistency::Filesystem,
                taken_at_ms: 5,
                freeze_us: 7,
                disks: (covered.iter())
                    .map(|d| PointDisk { disk: disk(10 + d), size_bytes: BLOCKS * B as u64 })
                    .collect(),
            }),
        };
        let commit = self.writer.commit(kind).await.unwrap();
        if is_point {
            self.points.insert(commit, (self.now.clone(), covered));
        }
    }

    /// Points every half an hour, of changing blocks of the first disk.
    async fn pass(&mut self, points: u64) {
        for i in 0..points {
            self.deliver(vec![(0, i % 80, vec![i as u32 + 1, 2, 3])], (1, 0, 1), true).await;
            self.clock.fetch_add(30 * MINUTE_MS, SeqCst);
        }
    }

    async fn state(&self) -> crate::MachineState {
        self.vault.machine(machine()).await.unwrap()
    }

    fn settings(&self) -> Settings {
        let grace = Duration::from_secs(60);
        let (skew_max, records_for) = (None, self.records_for);
        Settings { grace, pace: Arc::new(Pace::new(None)), skew_max, records_for, ..Settings::default() }
    }

    /// Whether it failed.
    async fn maintain(&mut self, fail: Option<(u64, bool)>) -> bool {
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        // Opened before, read afterwards: within the grace nothing that it needs goes.
        let last = self.vault.machine(machine()).await.unwrap().points.last().map(|point| point.id);
        let early: Option<(CommitId, BlockMap)> = match last {
            Some(at) => Some((at, self.vault.block_map(machine(), disk(10), at).await.unwrap())),
            None => None,
        };
        self.faulty.fail_call(fail.map(|(n, late)| (n, if late { When::After } else { When::Before })));
        let done = async {
            let mut maintainer =
                Maintainer::open(&self.vault, machine(), self.settings()).await?.filled(Full::TINY);
            maintainer.run(&rules, self.vault.now_ms(), &()).await?;
            Ok::<_, VaultError>(maintainer)
        };
        let done = done.await;
        self.faulty.fail_call(None);
        let failed = done.is_err();
        // The writer has not seen what was deleted meanwhile: it would be fenced.
        let next = crate::store::pruned_path(machine(), self.writer.state().last_record + 1);
        if crate::store::exists(&**self.vault.store(), &next).await.unwrap() {
            self.writer = self.vault.writer(machine()).await.unwrap();
        }
        match done {
            Ok(maintainer) => {
                let now = self.vault.now_ms();
                let again = maintainer.plan(&rules, now);
                assert!(again.is_empty(), "nothing is left to do: {again:?}");
                let report = verify::verify_vault(&self.vault).await.unwrap();
                assert!(report.is_clean(), "{:?}", report.problems);
            }
            Err(error) => assert!(fail.is_some(), "{error}"),
        }
        if let Some((at, map)) = early {
            let mut read = vec![0; BLOCKS as usize * B];
            map.read(BlockRange::new(0, BLOCKS), &mut read).await.unwrap();
            self.check(0, at, &read);
        }
        self.check_all(&rules).await;
        failed
    }

    fn check(&self, d: u8, at: CommitId, read: &[u8]) {
        let (model, _) = &self.points[&at];
        for block in 0..BLOCKS {
            let version = model.get(&(d, block)).copied().unwrap_or(0);
            assert!(read[block as usize * B..][..B] == content(version), "disk {d} block {block} at {at}");
        }
    }

    /// Every point that is there reads back; those that are not there any more had expired.
    async fn check_all(&self, rules: &Rules) {
        let state = self.vault.machine(machine()).await.unwrap();
        for point in &state.points {
            for d in &self.points[&point.id].1 {
                let read = read_all(&self.vault, disk(10 + d), point.id).await.unwrap();
                self.check(*d, point.id, &read);
            }
        }
        for held in &self.held {
            assert!(state.point(*held).is_ok(), "{held} is held");
        }
        let last = self.points.keys().next_back();
        assert_eq!(state.points.last().map(|point| &point.id), last, "the newest is never expired");
        for gone in self.points.keys().filter(|id| state.point(**id).is_err()) {
            let read = self.vault.block_map(machine(), disk(10), *gone).await;
            let _ = (read, rules);
        }
    }

    async fn finish(self) {
        self.finish_with_orphans(0).await;
    }

    /// So many strays are left.
    async fn finish_with_orphans(mut self, orphans: usize) {
        // Objects of interrupted maintainers go when the next one begins.
        self.clock.fetch_add(3 * 1440 * MINUTE_MS, SeqCst);
        for _ in 0..2 {
            self.deliver(vec![(0, 0, vec![1])], (0, 5, 1), true).await;
        }
        self.clock.fetch_add(3 * 1440 * MINUTE_MS, SeqCst);
        self.maintain(None).await;
        self.clock.fetch_add(10 * MINUTE_MS, SeqCst);
        self.maintain(None).await;
        let state = self.vault.machine(machine()).await.unwrap();
        let kept: Vec<CommitId> = state.points.iter().map(|point| point.id).collect();
        assert_eq!(kept.len(), 1 + self.held.iter().filter(|held| Some(*held) != kept.last()).count());
        assert!(state.trash.is_empty());
        let report = verify::verify_vault(&self.vault).await.unwrap();
        assert!(report.is_clean(), "{:?}", report.problems);
        assert_eq!(report.orphans.len(), orphans, "{:?}", report.orphans);
        let vault = timed(Vault::open(self.faulty.clone(), &self.key).await.unwrap(), &self.clock);
        assert_eq!(vault.machine(machine()).await.unwrap(), state);
    }
}

fn zero_chunk(d: u8, start: u64, count: u32, hash: &HashKey) -> bytes::Bytes {
    let extent = Extent { start: Block(start), count, fill: Fill::Zero };
    let mut out = Vec::new();
    encode_chunk(disk(10 + d), &[extent], &[], hash, 1, &mut out).unwrap();
    out.into()
}

fn timed(vault: Vault, clock: &Arc<AtomicU64>) -> Vault {
    let clock = clock.clone();
    vault.with_clock(Clock::new(move || clock.load(SeqCst)))
}

async fn run(steps: Vec<Step>) {
    let mut model = Model::new().await;
    for step in steps {
        match step {
            Step::Delta(runs, zeros, is_point) => model.deliver(runs, zeros, is_point).await,
            Step::Wait(minutes) => {
                model.clock.fetch_add(minutes * MINUTE_MS, SeqCst);
            }
            Step::Maintain(fail) => drop(model.maintain(fail).await),
            Step::Reopen => model.writer = model.vault.writer(machine()).await.unwrap(),
            Step::Disk => {
                model.has_second = !model.has_second;
                model.is_back = model.has_second;
            }
            Step::Hold(which, on) => {
                let state = model.vault.machine(machine()).await.unwrap();
                if state.points.is_empty() {
                    continue;
                }
                let id = state.points[which.index(state.points.len())].id;
                let hold = on.then_some(Hold::Legal);
                let done = set_hold(&model.vault, machine(), id, hold, "a test".into()).await;
                // What is said of a legal hold is not replaced by something else.
                assert_eq!(done.is_err(), on && model.held.contains(&id), "{done:?}");
                model.held.retain(|held| *held != id);
                model.held.extend(on.then_some(id));
            }
        }
    }
    model.finish().await;
}

/// A vault of one machine with merged runs of several maps each, shortcuts, rewritten segments, and some that are not merged.
pub async fn merged() -> (Arc<Faulty>, Vault) {
    let (store, vault, _) = merged_with_key().await;
    (store, vault)
}

/// The same with what opens it.
pub async fn merged_with_key() -> (Arc<Faulty>, Vault, crate::VaultKey) {
    let mut model = Model::new().await;
    for i in 0..40_u32 {
        let runs = vec![(0, u64::from(i * 7 % 60), (i * 9..i * 9 + 20).map(|v| v + 1).collect())];
        model.deliver(runs, (1, u64::from(i * 5 % 70), 3), true).await;
        model.clock.fetch_add(20 * MINUTE_MS, SeqCst);
        if i % 9 == 8 {
            assert!(!model.maintain(None).await);
        }
    }
    let state = model.vault.machine(machine()).await.unwrap();
    assert!(state.runs.iter().any(|run| run.is_merged()) && !state.shortcuts.is_empty());
    (model.faulty, model.vault, model.key)
}

proptest! {
    #![proptest_config(cases(60))]
    #[test]
    fn whatever_is_kept_reads_back(steps in prop::collection::vec(step(), 1..60)) {
        runtime().block_on(run(steps));
    }
}

/// Every call to the store fails once, before and after it has its effect.
#[test]
fn a_maintainer_may_fail_at_any_call() {
    runtime().block_on(async {
        for late in [false, true] {
            for n in 1.. {
                let mut model = Model::new().await;
                for i in 0..30_u32 {
                    let runs = vec![(0, u64::from(i * 7 % 60), (i..i + 20).map(|v| v + 1).collect())];
                    model.deliver(runs, (1, u64::from(i), 3), true).await;
                    model.clock.fetch_add(20 * MINUTE_MS, SeqCst);
                }
                let failed = model.maintain(Some((n, late))).await;
                model.maintain(None).await;
                if n % 8 == 0 || !failed {
                    model.finish().await;
                }
                if !failed {
                    assert!(n > 20, "{n} calls");
                    break;
                }
            }
        }
    });
}

#[test]
fn a_writer_goes_on_while_its_machine_is_maintained() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        model.records_for = Duration::from_secs(3600);
        for i in 0..20 {
            model.deliver(vec![(0, i, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(30 * MINUTE_MS, SeqCst);
        }
        // In the middle of a delta.
        let hash = model.writer.hash_key();
        model.writer.begin(DeltaId::new()).await.unwrap();
        model.writer.push(chunk(disk(10), 3, &[77], &hash)).await.unwrap();
        model.maintain(None).await;
        let commit = model.writer.commit(point(BLOCKS)).await.unwrap();
        let read = read_all(&model.vault, disk(10), commit).await.unwrap();
        assert_eq!(read[3 * B..4 * B], content(77));
        let state = model.vault.machine(machine()).await.unwrap();
        assert_eq!(&state, model.writer.state());
        assert!(state.points.len() < 20 && depth_max(&state) < 20);
    });
}

/// Points within a shortcut go, and their content is written anew: what the shortcut named goes too.
#[test]
fn a_shortcut_does_not_outlive_content_that_is_moved_beneath_it() {
    runtime().block_on(async {
        // Any three neighbours: some lie within a shortcut over nine.
        for first in 1..12 {
            let mut model = Model::new().await;
            for i in 0..26_u32 {
                let versions = (0..12).map(|v| i * 20 + v + 1).collect();
                model.deliver(vec![(0, u64::from(i * 5 % 80), versions)], (1, u64::from(i), 2), true).await;
                model.clock.fetch_add(MINUTE_MS, SeqCst);
            }
            model.maintain(None).await;
            let points: Vec<CommitId> = model.points.keys().copied().collect();
            for (index, point) in points.iter().enumerate() {
                if !(first..first + 2).contains(&index) {
                    set_hold(&model.vault, machine(), *point, Some(Hold::Pin), String::new()).await.unwrap();
                    model.held.push(*point);
                }
            }
            for _ in 0..3 {
                model.clock.fetch_add(3 * 1440 * MINUTE_MS, SeqCst);
                model.maintain(None).await;
            }
            let state = model.vault.machine(machine()).await.unwrap();
            assert_eq!(state.points.len(), 24);
            assert!(state.shortcuts.len() > 3 && state.trash.is_empty(), "{state:?}");
        }
    });
}

#[test]
fn by_a_clock_that_runs_ahead_nothing_expires() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        let now_ms = Clock::default().now_ms();
        model.clock.store(now_ms - 30 * 1440 * MINUTE_MS, SeqCst);
        for i in 0..20 {
            model.deliver(vec![(0, i, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(30 * MINUTE_MS, SeqCst);
        }
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let settings = Settings { skew_max: Settings::default().skew_max, ..model.settings() };
        // As far off in either direction; and then right.
        for (at_ms, ok) in
            [(now_ms + 1440 * MINUTE_MS, false), (now_ms - 20 * MINUTE_MS, false), (now_ms, true)]
        {
            model.clock.store(at_ms, SeqCst);
            let mut maintainer = Maintainer::open(&model.vault, machine(), settings.clone()).await.unwrap();
            let done = maintainer.run(&rules, model.vault.now_ms(), &()).await;
            let points = model.vault.machine(machine()).await.unwrap().points.len();
            match ok {
                true => assert!(done.is_ok() && points < 20, "{done:?}"),
                false => assert!(matches!(done, Err(VaultError::Clock(_))) && points == 20, "{done:?}"),
            }
        }
    });
}

#[test]
fn the_maintainer_that_began_last_counts() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        for i in 0..20 {
            model.deliver(vec![(0, i, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(30 * MINUTE_MS, SeqCst);
        }
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let (vault, now) = (model.vault.clone(), model.vault.now_ms());
        let settings = Settings { records_for: Duration::from_secs(3600), ..model.settings() };
        let mut first = Maintainer::open(&vault, machine(), settings.clone()).await.unwrap();
        let mut second = Maintainer::open(&vault, machine(), settings).await.unwrap();
        first.begin_for_test().await.unwrap();
        second.run(&rules, now, &()).await.unwrap();
        let fenced = first.run(&rules, now, &()).await.unwrap_err();
        assert!(matches!(fenced, VaultError::Maintained(_)), "{fenced}");
        model.check_all(&rules).await;
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    });
}

/// So far behind that the numbers it would take are free again.
#[test]
fn a_writer_that_comes_back_after_its_records_were_deleted_is_fenced() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        model.deliver(vec![(0, 1, vec![5])], (1, 0, 1), true).await;
        let mut stale = model.vault.writer(machine()).await.unwrap();
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let mut maintainer = Maintainer::open(&model.vault, machine(), model.settings()).await.unwrap();
        for i in 0..60 {
            model.deliver(vec![(0, i % 30, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(30 * MINUTE_MS, SeqCst);
        }
        let report = {
            let mut now = Maintainer::open(&model.vault, machine(), model.settings()).await.unwrap();
            now.run(&rules, model.vault.now_ms(), &()).await.unwrap()
        };
        assert!(report.pruned > 40, "{report:?}");
        let before = model.vault.machine(machine()).await.unwrap();
        let hash = stale.hash_key();
        stale.begin(DeltaId::new()).await.unwrap();
        stale.push(chunk(disk(10), 3, &[666], &hash)).await.unwrap();
        let fenced = stale.commit(point(BLOCKS)).await.unwrap_err();
        assert!(matches!(fenced, VaultError::Fenced(_)), "{fenced}");
        assert!(stale.begin(DeltaId::new()).await.is_err());
        // And so is a maintainer, which has read what that one has put.
        let fenced = maintainer.begin_for_test().await.unwrap_err();
        assert!(matches!(fenced, VaultError::Fenced(_)), "{fenced}");
        assert_eq!(model.vault.machine(machine()).await.unwrap(), before);
        model.check_all(&rules).await;
        let report = verify::verify_vault(&model.vault).await.unwrap();
        // Its segment stays: it cannot tell whether its record was among those that were deleted. A repair removes it.
        assert!(report.is_clean() && report.orphans.len() == 1, "{report:?}");
    });
}

/// Without the checkpoints, a history whose first records were deleted is refused, never taken for a shorter one.
#[test]
fn records_that_were_deleted_are_missed_without_their_checkpoint() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        for i in 0..60 {
            model.deliver(vec![(0, i % 30, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(MINUTE_MS, SeqCst);
        }
        model.maintain(None).await;
        let all = model.vault.checkpoint_numbers(machine()).await.unwrap();
        assert!(all.len() >= 3 && all[0] > 20, "{all:?}");
        let (newest, older) = all.split_last().unwrap();
        let store = model.vault.store().clone();
        store.delete(&crate::store::checkpoint_path(machine(), *newest)).await.unwrap();
        model.check_all(&Rules { policy: policy(), immutable: vec![], ..Rules::default() }).await;
        for number in older {
            store.delete(&crate::store::checkpoint_path(machine(), *number)).await.unwrap();
        }
        let error = model.vault.machine(machine()).await.unwrap_err();
        assert!(error.is_damage() && error.to_string().contains("no checkpoint"), "{error}");
        // One cause, and not what follows from it.
        let report = verify::verify_vault(&model.vault).await.unwrap();
        assert_eq!(report.problems.len(), 1, "{:#?}", report.problems);
    });
}

/// A collector is patient with another one that is at work; whoever works for the same owner, and an operator, are not.
#[test]
fn a_patient_maintainer_leaves_a_machine_to_another_owner() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        model.records_for = Duration::from_secs(3600);
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let patient = || Settings { patience: Some(Duration::from_secs(900)), ..model.settings() };
        let (one, other) = (patient(), patient());
        let run = async |model: &Model, settings: &Settings| {
            let mut own = Maintainer::open(&model.vault, machine(), settings.clone()).await.unwrap();
            own.run(&rules, model.vault.now_ms(), &()).await
        };
        let more = async |model: &mut Model| {
            for i in 0..20 {
                model.deliver(vec![(0, i, vec![i as u32 + 1])], (1, 0, 1), true).await;
                model.clock.fetch_add(30 * MINUTE_MS, SeqCst);
            }
        };
        more(&mut model).await;
        assert!(!run(&model, &one).await.unwrap().is_empty());
        for _ in 0..30 {
            model.deliver(vec![(0, 1, vec![7])], (1, 0, 1), true).await;
        }
        let plan = Maintainer::open(&model.vault, machine(), one.clone()).await.unwrap();
        assert!(!plan.plan(&rules, model.vault.now_ms()).is_empty());
        let taken = run(&model, &other).await;
        assert!(matches!(taken, Err(VaultError::Maintained(_))), "{taken:?}");
        assert!(!run(&model, &one).await.unwrap().is_empty());
        for _ in 0..30 {
            model.deliver(vec![(0, 1, vec![8])], (1, 0, 1), true).await;
        }
        model.clock.fetch_add(15 * MINUTE_MS, SeqCst);
        assert!(!run(&model, &other).await.unwrap().is_empty());
        for _ in 0..30 {
            model.deliver(vec![(0, 1, vec![9])], (1, 0, 1), true).await;
        }
        assert!(!run(&model, &model.settings()).await.unwrap().is_empty(), "an operator's");
    });
}

/// What makes reading faster must not make the state larger than what can be read again; what makes it smaller still happens.
#[test]
fn a_state_near_its_limit_gets_no_shortcuts() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        for i in 0..80 {
            model.deliver(vec![(0, i, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(MINUTE_MS, SeqCst);
        }
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let state = model.vault.machine(machine()).await.unwrap();
        let settings = Settings { state_bytes_max: state.memory_bytes() * 5 / 4, ..model.settings() };
        let run = async |settings: Settings, now_ms| {
            let mut own = Maintainer::open(&model.vault, machine(), settings).await.unwrap();
            let report = own.run(&rules, now_ms, &()).await.unwrap();
            (report, own.state().clone())
        };
        let (report, _) = run(settings.clone(), model.vault.now_ms()).await;
        assert_eq!(report.shortcuts, 0);
        let later_ms = model.vault.now_ms() + 300 * MINUTE_MS;
        let (report, after) = run(settings, later_ms).await;
        assert!(report.expired > 70 && after.memory_bytes() < state.memory_bytes(), "{report:?}");
        let (report, _) = run(model.settings(), model.vault.now_ms()).await;
        assert!(report.shortcuts > 0 || after.runs.len() < 6, "{report:?}");
    });
}

/// A late record under a number that was deleted, before one that was not: who takes the one in cannot take in the other.
#[test]
fn a_late_record_is_not_taken_for_damage() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        while model.writer.state().last_record < 39 {
            model.deliver(vec![(0, 1, vec![5])], (1, 0, 1), true).await;
        }
        let mut late = model.vault.writer(machine()).await.unwrap();
        let mut maintainer = Maintainer::open(&model.vault, machine(), model.settings()).await.unwrap();
        while model.writer.state().last_record < 56 {
            model.deliver(vec![(0, 2, vec![6])], (1, 0, 1), true).await;
        }
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        // So large that there are no shortcuts to make: nothing else is done.
        let state_bytes_max = model.writer.state().memory_bytes() * 5 / 4;
        let settings = Settings { state_bytes_max, ..model.settings() };
        let mut other = Maintainer::open(&model.vault, machine(), settings).await.unwrap();
        other.run(&rules, model.vault.now_ms(), &()).await.unwrap();
        let there = async |number| {
            let path = crate::store::manifest_path(machine(), number);
            crate::store::exists(&**model.vault.store(), &path).await.unwrap()
        };
        assert!(!there(40).await && there(41).await, "40 is deleted, and 41 is not");
        late.begin(DeltaId::new()).await.unwrap();
        assert_eq!(late.commit(CommitKind::Partial).await.unwrap_err().code(), 1208);
        assert!(there(40).await);
        let fenced = maintainer.begin_for_test().await.unwrap_err();
        assert!(matches!(fenced, VaultError::Fenced(_)), "{fenced}");
        assert!(verify::verify_vault(&model.vault).await.unwrap().is_clean());
        model.writer = model.vault.writer(machine()).await.unwrap();
        model.finish().await;
    });
}

/// What it tells of is a matter for a repair; points expire all the same.
#[test]
fn a_damaged_checkpoint_keeps_no_point_from_expiring() {
    runtime().block_on(async {
        let mut model = Model::new().await;
        for i in 0..60 {
            model.deliver(vec![(0, i % 30, vec![i as u32 + 1])], (1, 0, 1), true).await;
            model.clock.fetch_add(30 * MINUTE_MS, SeqCst);
        }
        let newest = *model.vault.checkpoint_numbers(machine()).await.unwrap().last().unwrap();
        let path = crate::store::checkpoint_path(machine(), newest);
        model.vault.store().put(&path, b"garbled".to_vec().into()).await.unwrap();
        let rules = Rules { policy: policy(), immutable: vec![], ..Rules::default() };
        let settings = model.settings();
        let mut maintainer = Maintainer::open(&model.vault, machine(), settings).await.unwrap();
        let done = maintainer.run(&rules, model.vault.now_ms(), &()).await;
        let points = model.vault.machine(machine()).await.unwrap().points.len();
        assert!(points < 30, "{points} points, {done:?}");
    });
}
