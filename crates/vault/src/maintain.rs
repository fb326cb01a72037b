//! Maintenance: recovery points expire as policies say, what lay between them is merged, and space comes back.
//!
//! # Contract
//!
//! - It runs beside writers and readers, in any process that has the key. Its records take numbers of the machine's one chain; a
//!   writer takes them in and goes on. Of several maintainers of a machine the one that began last counts: the others are
//!   fenced ([`VaultError::Maintained`]) and change nothing more. So that they do not fence each other again and again, one that is told to
//!   ([`Settings::patience`]) leaves a machine alone while somebody else's was seen at it; during long merges it says that it is there.
//! - Every step is whole or not at all: one record. Objects are written before it, and deleted only after a later one, and after
//!   [`Settings::grace`]: readers that began before may go on for so long.
//! - **Crash, failure, cancellation** at any point leave at most objects that nothing names; the next maintainer deletes
//!   them. Nothing of it has to be finished: each run plans anew from what is there. One merge moves a bounded part of the
//!   content that is to be moved, so that what an interruption costs is bounded too.
//! - Records and checkpoints that later checkpoints make needless are deleted (module `prune`).
//! - A point is expired only if its machine's policy says so now, it is not held, and no policy that was in force since it was
//!   stored protects it still ([`crate::policy`]).
//! - Memory: [`crate::MachineState`], twice while a record is put; the names of the segments that a merge touches; and up to half a
//!   MiB for each object that the merge has open at once, of which there are 256 at most unless one commit alone brought more.

mod around;
pub(crate) mod clean;
mod hold;
pub(crate) mod last;
mod lock;
pub(crate) mod merge;
mod plan;
mod prune;
pub(crate) mod turn;

pub(crate) use hold::fence;
pub use hold::set_hold;
pub use lock::Locks;
pub use plan::{Merge, Plan, Purpose, depth_max, plan};
pub use turn::{Owner, Refusals};

use crate::{
    Pace, Result, Vault, VaultError, groups,
    journal::Journal,
    maps::Fill as Full,
    policy::{Rules, Verdict},
    record::{ExpiredBody, KIND_EXPIRED, KIND_MERGED, KIND_SWEPT, MergedBody, SweptBody},
    vault::STATE_BYTES_MAX,
};
use around::Around;
use highwater_delta::MachineId;
use serde::Serialize;
use std::{sync::Arc, time::Duration};
use turn::Turn;

/// See [`Settings::skew_max`]: more than a server's clock drifts, less than the shortest time that a policy is made for.
pub(crate) const SKEW_MAX: Duration = Duration::from_secs(600);
/// Times that points are held while they expire.
const EXPIRE_TRIES: usize = 16;
/// Merges of one run: what then is left is the next one's.
const MERGES_MAX: usize = 10_000;

/// How it is to be done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long objects stay after nothing refers to them any more.
    pub grace: Duration,
    /// How fast it may go.
    pub pace: Arc<Pace>,
    /// Most bytes of memory of a machine's state.
    pub state_bytes_max: u64,
    /// How far the clock here may be from the store's; `None`: however far. By a clock that runs ahead, points would expire that
    /// are needed still.
    pub skew_max: Option<Duration>,
    /// For whom it works. Copies of these settings work for the same.
    pub owner: Owner,
    /// A machine is left alone for so long after the maintainer of another owner was seen at it; `None`: taken from it at once.
    pub patience: Option<Duration>,
    /// How long a record stays, at least, after checkpoints have made it needless.
    pub records_for: Duration,
    /// What the store refused lately, so that it is not asked for again and again. Copies of these settings share it.
    pub refusals: Arc<Refusals>,
    /// What the store has locked. Copies of these settings share it.
    pub locks: Arc<Locks>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(6 * 3600),
            pace: Arc::new(Pace::new(None)),
            state_bytes_max: STATE_BYTES_MAX,
            skew_max: Some(SKEW_MAX),
            owner: Owner::new(),
            patience: None,
            records_for: Duration::from_secs(6 * 3600),
            refusals: Arc::default(),
            locks: Arc::default(),
        }
    }
}

/// What was done for a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Points that are no longer kept.
    pub expired: u64,
    /// Runs that were merged into others.
    pub merged_runs: u64,
    /// Shortcuts that were made.
    pub shortcuts: u64,
    /// Bytes of maps and segments that were written.
    pub written_bytes: u64,
    /// Objects that nothing refers to any more since; they are deleted after the grace.
    pub trashed: u64,
    /// Their bytes.
    pub trashed_bytes: u64,
    /// Objects that were deleted.
    pub deleted: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Objects that the store would not delete yet, as one with a lock on them does.
    pub kept_by_store: u64,
    /// Records and checkpoints that were deleted.
    pub pruned: u64,
    /// Objects that the store was asked to lock, for what is immutable.
    pub locked: u64,
}

/// Is told what is done.
pub trait Progress: Send + Sync {
    /// A merge of so many begins: the n-th from 1, how many there are, and the bytes that its runs hold.
    fn merge(&self, n: usize, of: usize, bytes: u64) {
        let _ = (n, of, bytes);
    }
}
impl Progress for () {}

impl Report {
    /// Whether nothing was to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Maintains one machine.
pub struct Maintainer {
    journal: Journal,
    settings: Settings,
    turn: Turn,
    full: Full,
    around: Around,
    report: Report,
}

impl std::fmt::Debug for Maintainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Maintainer({} at {})", self.journal.machine, self.journal.state.last_record)
    }
}

impl Maintainer {
    /// Reads a machine's history; nothing is changed yet.
    pub async fn open(vault: &Vault, machine: MachineId, settings: Settings) -> Result<Self> {
        let journal = Journal::open(vault.clone(), machine, settings.state_bytes_max).await?;
        let turn = Turn::new(&settings);
        let (around, full) = (settings.refusals.around(machine), Full::DEFAULT);
        Ok(Self { journal, settings, turn, full, around, report: Report::default() })
    }

    /// What is stored of the machine, as far as it is known here.
    #[must_use]
    pub fn state(&self) -> &crate::MachineState {
        &self.journal.state
    }

    /// What [`Maintainer::run`] would do at this moment, in milliseconds since 1970.
    #[must_use]
    pub fn plan(&self, rules: &Rules, now_ms: u64) -> Plan {
        self.planned(rules.verdict(&self.journal.state, now_ms), now_ms)
    }

    fn planned(&self, verdict: Verdict, now_ms: u64) -> Plan {
        let (state, grace) = (&self.journal.state, self.settings.grace);
        let mut plan = plan::plan_around(state, verdict, grace, now_ms, &self.around);
        // Shortcuts make reading faster and the state larger: it must not become larger than what can be read again.
        if self.journal.state.memory_bytes() > self.settings.state_bytes_max / 4 * 3 {
            plan.merges.retain(|merge| merge.purpose != Purpose::Shortcut);
        }
        plan
    }

    /// Does all there is to do at this moment, in milliseconds since 1970. With nothing to do, nothing is written.
    ///
    /// # Errors
    /// [`VaultError::Maintained`]: another maintainer has begun; what was done until then holds. Damage, and failures to delete, are told
    /// after all else that can be done was.
    pub async fn run(&mut self, rules: &Rules, now_ms: u64, progress: &dyn Progress) -> Result<Report> {
        self.report = Report::default();
        let mut done = self.steps(rules, now_ms, progress).await;
        if done.as_ref().err().is_none_or(|error| error.is_damage() || matches!(error, VaultError::Store(_)))
        {
            // Last: a damaged checkpoint, which is told of each time, keeps no point from expiring.
            let pruned = prune::prune(&self.journal, self.settings.records_for).await;
            done = done.and(pruned.map(|count| self.report.pruned = count));
            let locked = self.lock(rules, now_ms).await;
            done = done.and(locked.map(|count| self.report.locked = count));
            done = done.and(groups::forget_points(&self.journal.vault, &self.journal.state).await);
        }
        let report = std::mem::take(&mut self.report);
        done.map(|()| report)
    }

    async fn steps(&mut self, rules: &Rules, now_ms: u64, progress: &dyn Progress) -> Result<()> {
        let first = self.plan(rules, now_ms);
        let only_deletes = first.expire.is_empty() && first.merges.is_empty();
        let refused = self.settings.refusals.has_kept(self.journal.machine);
        if first.is_empty() || (only_deletes && refused) {
            return Ok(());
        }
        self.begin().await?;
        let now_ms = self.checked(now_ms).await?;
        self.expire(rules, now_ms).await?;
        // What cannot be deleted keeps nothing from being merged.
        let swept = match self.sweep(now_ms).await {
            Err(error) if !matches!(error, VaultError::Store(_)) => return Err(error),
            swept => swept,
        };
        let merged = match self.merges(now_ms, progress).await {
            Err(error) if !error.is_damage() => return Err(error),
            merged => merged,
        };
        self.journal.checkpoint().await;
        swept.and(merged)
    }

    async fn merges(&mut self, now_ms: u64, progress: &dyn Progress) -> Result<()> {
        let (mut n, mut damage) = (0, Ok(()));
        while n < MERGES_MAX {
            // Points that are superseded by now expire the next time: they are recorded still.
            let merges = self.planned(Verdict::default(), now_ms).merges;
            if merges.is_empty() {
                break;
            }
            let of = n + merges.len();
            for next in &merges {
                // Writers go on meanwhile, and merges change what is to be merged.
                if self.journal.state.runs_within(next.from, next.to).is_err() {
                    break;
                }
                if next.purpose != Purpose::Shortcut
                    && let Some((last, error)) = self.last_shortcut(next).await?
                {
                    self.around.keeps(last);
                    self.settings.refusals.damaged(self.journal.machine, &self.around);
                    damage = damage.and(Err(error));
                    break;
                }
                n += 1;
                progress.merge(n, of, next.bytes);
                match self.merge(next).await {
                    Err(error) if error.is_damage() => {
                        self.around.failed(&self.journal.state, next, &error);
                        self.settings.refusals.damaged(self.journal.machine, &self.around);
                        damage = damage.and(Err(error));
                        // What it wrote until then, before a later merge is named that is newer.
                        let left = clean::unnamed(&self.journal).await?;
                        self.turn.say(&mut self.journal).await?;
                        clean::leftovers(&self.journal, left).await?;
                        break;
                    }
                    merged => merged?,
                }
            }
        }
        damage
    }

    /// Becomes the machine's maintainer, and deletes what an interrupted one left.
    async fn begin(&mut self) -> Result<()> {
        // Looked for before: whoever is held up afterwards may be fenced, and see what his successor has named meanwhile.
        let left = clean::unnamed(&self.journal).await?;
        if self.turn.begin(&mut self.journal).await? {
            clean::leftovers(&self.journal, left).await?;
        }
        Ok(())
    }

    /// Compares the clock here with the store's, and answers a moment that is past by both: `now_ms` may have been told by a clock that
    /// was set right since.
    async fn checked(&self, now_ms: u64) -> Result<u64> {
        let Some(skew_max) = self.settings.skew_max else { return Ok(now_ms) };
        let vault = &self.journal.vault;
        let store_ms = vault.store_time().await?.now_ms();
        let skew = Duration::from_millis(vault.now_ms().abs_diff(store_ms));
        if skew > skew_max { Err(VaultError::Clock(skew.as_secs())) } else { Ok(now_ms.min(store_ms)) }
    }

    /// Lets points expire that rules do not keep, nothing holds, and nothing protects that was said until this maintainer began.
    async fn expire(&mut self, rules: &Rules, now_ms: u64) -> Result<()> {
        // Whoever protects points fences maintainers after he has said so.
        let newest = Rules::load(&self.journal.vault, self.journal.machine).await?;
        // So does whoever decides on a marker, but for the fence: what it is about was stored just now.
        let shared = newest.shared.kept(&newest.policy, now_ms);
        for _ in 0..EXPIRE_TRIES {
            let state = &self.journal.state;
            let mut points = self.plan(rules, now_ms).expire;
            points.retain(|id| {
                let until = state.point(*id).map(|point| newest.immutable_until_ms(point.stored_at_ms));
                until.is_ok_and(|until| until <= now_ms) && !shared.contains(id)
            });
            if points.is_empty() {
                return Ok(());
            }
            let count = points.len() as u64;
            let body = encode(&ExpiredBody { points: points.clone() })?;
            // Held meanwhile?
            let fits = |state: &crate::MachineState| {
                points.iter().all(|id| state.point(*id).is_ok() && !state.holds.contains_key(id))
            };
            if self.journal.put_after_others(KIND_EXPIRED, &body, fits).await? {
                self.report.expired = count;
                return Ok(());
            }
            if self.journal.state.maintainer != self.journal.identity() {
                break;
            }
        }
        Err(VaultError::Maintained(self.journal.machine))
    }

    #[cfg(test)]
    pub(crate) fn filled(self, full: Full) -> Self {
        Self { full, ..self }
    }
    #[cfg(test)]
    pub(crate) async fn begin_for_test(&mut self) -> Result<()> {
        self.begin().await
    }

    /// Deletes what has been in the trash for long enough.
    async fn sweep(&mut self, now_ms: u64) -> Result<()> {
        let due = plan::due(&self.journal.state, self.settings.grace, now_ms);
        let (deleted, failed) = clean::delete(&self.journal, &due).await;
        if failed.is_ok() {
            self.report.kept_by_store = (due.len() - deleted.len()) as u64;
            self.settings.refusals.kept(self.journal.machine, deleted.is_empty() && !due.is_empty());
        }
        if !deleted.is_empty() {
            self.report.deleted = deleted.len() as u64;
            self.report.deleted_bytes = deleted.iter().map(|trashed| trashed.bytes).sum();
            let objects = deleted.iter().map(|trashed| trashed.object).collect();
            self.put(KIND_SWEPT, encode(&SweptBody { objects })?).await?;
        }
        failed
    }

    async fn merge(&mut self, planned: &Merge) -> Result<()> {
        let merged = self.written(planned).await?;
        self.report.written_bytes += merged.written_bytes;
        match &merged.body.replaces {
            None => self.report.shortcuts += 1,
            Some(replaces) => {
                self.report.merged_runs += planned.runs as u64;
                self.report.trashed += replaces.dead.len() as u64;
                self.report.trashed_bytes += replaces.dead.iter().map(|dead| dead.bytes).sum::<u64>();
            }
        }
        let body = encode::<MergedBody>(&merged.body)?;
        if self.journal.put_after_others(KIND_MERGED, &body, |state| merged.fits(state)).await? {
            return Ok(());
        }
        // It was refused, so that nobody names these.
        clean::delete_all(&self.journal, &merged.created).await?;
        Err(VaultError::Maintained(self.journal.machine))
    }

    async fn written(&mut self, planned: &Merge) -> Result<merge::Merged> {
        merge::merge(&mut self.journal, &mut self.turn, planned, &self.settings.pace, self.full).await
    }

    async fn put(&mut self, kind: u16, body: Vec<u8>) -> Result<()> {
        match self.journal.put_after_others(kind, &body, |_| true).await? {
            true => Ok(()),
            false => Err(VaultError::Maintained(self.journal.machine)),
        }
    }
}

/// Does all there is to do for a machine now, by the vault's documents and clock.
pub async fn machine(
    vault: &Vault,
    machine: MachineId,
    settings: &Settings,
    progress: &dyn Progress,
) -> Result<Report> {
    let rules = Rules::load(vault, machine).await?;
    let mut maintainer = Maintainer::open(vault, machine, settings.clone()).await?;
    maintainer.run(&rules, vault.now_ms(), progress).await
}

fn encode<T: Serialize>(body: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(body).map_err(|_| VaultError::Limit("bytes of a record"))
}
