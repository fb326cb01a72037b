//! The memory of all sessions: two pools, each bounded by the configuration. Whoever finds a pool empty gets less, waits, or
//! is told; nobody takes what is not there.
//!
//! | pool | share of `memory` | what for | when it is short |
//! |---|---|---|---|
//! | windows | half | chunks under way | a new session gets a smaller window; below 512 KiB it is refused (HW-1309) |
//! | work | the rest | state of each connected machine, open deltas, block maps | waits, first come first served, for [`WAIT_MAX`]; then it is refused (HW-1309), and the agent comes back |
//! | … of it, kept | all but a quarter, which deltas alone may take, and at least one delta | states and block maps | as above |
//! | pages | a sixteenth, at most 64 MiB | decoded index pages, of all block maps | the oldest are thrown out |
//!
//! No machine keeps others out: its state takes a quarter of the work at most ([`Memory::machine_bytes_max`]; the vault refuses commits
//! beyond), a block map another quarter, and it has one open delta. Nor do several together: each session has its part of
//! what is kept, and what others hold beyond theirs is taken back for it; a delta that drips makes room for those who wait
//! ([`claim`]).
//!
//! A share that is larger than its pool is granted when the pool is whole: so a small collector does one thing at a time.

pub mod claim;

use crate::{CollectorError, metrics::MemoryMetrics};
use claim::{Claim, Claims};
use prometheus_client::metrics::gauge::Gauge;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How long an open session waits for its turn; less than an agent waits for it.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// How long a new one does.
pub const WELCOME_WAIT_MAX: Duration = Duration::from_secs(20);
/// How often those who hold what another waits for are asked.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// Bytes that one permit stands for.
const UNIT: u64 = 64 * 1024;
/// What a machine may take in a small budget.
const MACHINE_BYTES_LEAST: u64 = 4 << 20;
/// Most bytes of index pages.
const PAGES_MAX: u64 = 64 << 20;

/// See the module.
pub struct Memory {
    /// For chunks under way.
    pub windows: Pool,
    /// For states, deltas and block maps.
    pub work: Pool,
    /// What states and block maps may take of that.
    kept: Pool,
    machine_bytes_max: u64,
    delta_bytes: u64,
    /// Who holds what.
    pub claims: Claims,
}

/// A bounded number of bytes.
pub struct Pool {
    units: Arc<Semaphore>,
    units_all: u32,
    used: Gauge,
    metrics: MemoryMetrics,
}

/// Bytes taken out of a pool; given back when dropped.
pub struct Share {
    bytes: u64,
    used: Gauge,
    permit: OwnedSemaphorePermit,
}

/// Bytes of states and block maps; given back when dropped.
pub struct Kept {
    part: Share,
    all: Share,
    claim: Arc<Claim>,
}

/// Bytes of an open delta; given back when dropped.
pub struct OpenDelta {
    _share: Share,
    claim: Arc<Claim>,
}

/// Bytes for index pages in a budget.
#[must_use]
pub fn page_cache_bytes(memory: u64) -> u64 {
    (memory / 16).min(PAGES_MAX)
}

impl Memory {
    /// Divides a budget. One open delta takes `delta_bytes` ([`highwater_vault::Vault::delta_bytes_max`]), and may be slow for
    /// `patience` before it makes room for others.
    #[must_use]
    pub fn new(memory: u64, delta_bytes: u64, patience: Duration, metrics: &MemoryMetrics) -> Self {
        let (windows, pages) = (memory / 2, page_cache_bytes(memory));
        let work = memory - windows - pages;
        metrics.budget("pages", pages);
        // A delta must have its place, whatever else is kept.
        let kept = work - (work / 4).max(delta_bytes).min(work / 2);
        Self {
            windows: Pool::new("windows", windows, metrics),
            work: Pool::new("work", work, metrics),
            kept: Pool::new("kept", kept, metrics),
            machine_bytes_max: Self::machine_bytes_max_of(memory),
            delta_bytes,
            claims: Claims::new(kept / UNIT * UNIT, patience),
        }
    }

    /// Most bytes of a machine's state, and of a block map, in a budget.
    #[must_use]
    pub fn machine_bytes_max_of(memory: u64) -> u64 {
        let work = memory - memory / 2 - page_cache_bytes(memory);
        (work / 4).max(MACHINE_BYTES_LEAST)
    }

    /// Most bytes of a machine's state, and of a block map.
    #[must_use]
    pub const fn machine_bytes_max(&self) -> u64 {
        self.machine_bytes_max
    }

    /// Waits for memory for a state or a block map. Cancellation-safe.
    pub async fn keep(
        &self,
        claim: &Arc<Claim>,
        bytes: u64,
        wait_max: Duration,
    ) -> Result<Kept, CollectorError> {
        let taken = async {
            let part = match self.kept.try_take(bytes) {
                Some(part) => part,
                None if claim.kept() + self.kept.bytes(bytes) <= self.claims.part() => {
                    self.claims.ask_for_kept(self.kept.take(bytes, wait_max)).await?
                }
                None => self.kept.left_over(bytes).await,
            };
            let all = match self.work.try_take(bytes) {
                Some(all) => all,
                None => self.claims.ask_for_deltas(self.work.take(bytes, wait_max)).await?,
            };
            Ok::<_, CollectorError>(Kept::new(part, all, claim.clone()))
        };
        timeout(wait_max, taken).await.unwrap_or(Err(CollectorError::Full("its memory is in use")))
    }

    /// Waits for memory for a delta. Cancellation-safe.
    pub async fn open_delta(
        &self,
        claim: &Arc<Claim>,
        wait_max: Duration,
    ) -> Result<OpenDelta, CollectorError> {
        let bytes = self.delta_bytes;
        let share = match self.work.try_take(bytes) {
            Some(share) => share,
            None => self.claims.ask_for_deltas(self.work.take(bytes, wait_max)).await?,
        };
        claim.delta(true);
        Ok(OpenDelta { _share: share, claim: claim.clone() })
    }
}

impl Pool {
    fn new(name: &'static str, bytes: u64, metrics: &MemoryMetrics) -> Self {
        let units_all = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).max(1);
        // A semaphore holds far more than a u32 on the machines that this runs on.
        let units = usize::try_from(units_all).unwrap_or(Semaphore::MAX_PERMITS);
        metrics.budget(name, u64::from(units_all) * UNIT);
        Self {
            units: Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))),
            units_all,
            used: metrics.used(name),
            metrics: metrics.clone(),
        }
    }

    /// Takes bytes that are there.
    pub fn try_take(&self, bytes: u64) -> Option<Share> {
        let permit = Arc::clone(&self.units).try_acquire_many_owned(self.units(bytes)).ok()?;
        Some(self.share(bytes, permit))
    }

    /// Waits for its turn, so long at most. Cancellation-safe.
    pub async fn take(&self, bytes: u64, wait_max: Duration) -> Result<Share, CollectorError> {
        // Passes nobody by: what comes free goes to those who wait, and only what they leave is found here.
        if let Some(share) = self.try_take(bytes) {
            return Ok(share);
        }
        self.metrics.waited();
        let turn = Arc::clone(&self.units).acquire_many_owned(self.units(bytes));
        match timeout(wait_max, turn).await {
            Ok(Ok(permit)) => Ok(self.share(bytes, permit)),
            // A pool is never closed.
            Ok(Err(_)) | Err(_) => Err(CollectorError::Full("its memory is in use")),
        }
    }

    /// Waits until so much is left by those who wait for their turn.
    async fn left_over(&self, bytes: u64) -> Share {
        self.metrics.waited();
        loop {
            tokio::time::sleep(ASK_EVERY).await;
            if let Some(share) = self.try_take(bytes) {
                return share;
            }
        }
    }

    /// What a share of so many bytes takes.
    fn bytes(&self, bytes: u64) -> u64 {
        u64::from(self.units(bytes)) * UNIT
    }

    fn share(&self, bytes: u64, permit: OwnedSemaphorePermit) -> Share {
        self.used.inc_by(i64::try_from(bytes).unwrap_or(i64::MAX));
        Share { bytes, used: self.used.clone(), permit }
    }

    fn units(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.units_all)
    }
}

impl Share {
    /// How many.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it takes of its pool.
    fn taken(&self) -> u64 {
        self.permit.num_permits() as u64 * UNIT
    }

    /// Gives back all but so many.
    fn shrink(&mut self, bytes: u64) {
        let units = usize::try_from(bytes.div_ceil(UNIT)).unwrap_or(usize::MAX);
        drop(self.permit.split(self.permit.num_permits().saturating_sub(units)));
        let less = self.bytes.saturating_sub(bytes);
        self.bytes -= less;
        self.used.dec_by(i64::try_from(less).unwrap_or(i64::MAX));
    }
}

impl Kept {
    fn new(part: Share, all: Share, claim: Arc<Claim>) -> Self {
        claim.more(part.taken());
        Self { part, all, claim }
    }

    /// How many.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.all.bytes()
    }

    /// Gives back all but so many.
    pub fn shrink(&mut self, bytes: u64) {
        let before = self.part.taken();
        self.part.shrink(bytes);
        self.claim.less(before - self.part.taken());
        self.all.shrink(bytes);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.claim.less(self.part.taken());
    }
}

impl Drop for OpenDelta {
    fn drop(&mut self) {
        self.claim.delta(false);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.used.dec_by(i64::try_from(self.bytes).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use claim::Asked;

    const MIB: u64 = 1 << 20;
    const PATIENCE: Duration = Duration::from_millis(300);

    /// A machine that holds so much, and lets go of it only when it is asked.
    async fn greedy(memory: &Arc<Memory>, mib: &[u64]) -> tokio::task::JoinHandle<Asked> {
        let claim = memory.claims.begin();
        let mut kept = Vec::new();
        for mib in mib {
            kept.push(memory.keep(&claim, mib * MIB, WAIT_MAX).await.unwrap());
        }
        let memory = memory.clone();
        tokio::spawn(async move {
            let asked = memory.claims.asked(&claim).await;
            drop(kept);
            asked
        })
    }

    #[tokio::test]
    async fn several_greedy_ones_leave_each_its_part() {
        let memory = Arc::new(Memory::new(64 * MIB, 6 * MIB, PATIENCE, &MemoryMetrics::default()));
        let first = greedy(&memory, &[7, 7]).await;
        let (second, third) = (greedy(&memory, &[4]).await, greedy(&memory, &[3]).await);
        assert!(memory.kept.try_take(UNIT).is_none(), "they hold it all");
        // More than its part: waits for what is left over, and nobody is asked.
        let late = memory.claims.begin();
        let part = memory.claims.part();
        let short = Duration::from_millis(700);
        assert_eq!(memory.keep(&late, part + UNIT, short).await.err().unwrap().code(), 1309);
        assert!(!first.is_finished() && !second.is_finished() && !third.is_finished());
        // Its part, in two pieces: the one who holds most is asked, and no more than are needed.
        let state = memory.keep(&late, part / 2, WAIT_MAX).await.unwrap();
        let more = memory.keep(&late, part / 2, short).await.unwrap();
        assert!(late.kept() <= part && late.kept() + 2 * UNIT >= part, "{} of {part}", late.kept());
        assert_eq!(first.await.unwrap(), Asked::Kept);
        assert!(!second.is_finished() && !third.is_finished());
        drop((state, more));
    }

    #[tokio::test]
    async fn a_delta_that_drips_makes_room_for_those_who_wait_and_only_then() {
        let memory = Memory::new(64 * MIB, 6 * MIB, PATIENCE, &MemoryMetrics::default());
        let (drips, flows, waits) = (memory.claims.begin(), memory.claims.begin(), memory.claims.begin());
        let dripping = memory.open_delta(&drips, WAIT_MAX).await.unwrap();
        let flowing = memory.open_delta(&flows, WAIT_MAX).await.unwrap();
        let kept = memory.keep(&flows, 14 * MIB, WAIT_MAX).await.unwrap();
        for _ in 0..8 {
            tokio::time::sleep(PATIENCE / 4).await;
            memory.claims.grown(&drips, 1);
            memory.claims.grown(&flows, MIB as usize);
        }
        let nobody = timeout(PATIENCE, memory.claims.asked(&drips)).await;
        assert!(nobody.is_err(), "nobody waits, and it was asked");
        let giving = async {
            let asked = memory.claims.asked(&drips).await;
            drop(dripping);
            asked
        };
        let (asked, delta) = tokio::join!(giving, memory.open_delta(&waits, WAIT_MAX));
        assert_eq!(asked, Asked::Delta);
        assert!(timeout(PATIENCE / 2, memory.claims.asked(&flows)).await.is_err());
        drop((delta.unwrap(), flowing, kept));
    }

    fn pool(bytes: u64) -> Pool {
        Pool::new("work", bytes, &MemoryMetrics::default())
    }

    #[tokio::test]
    async fn what_is_not_there_is_waited_for_and_then_refused() {
        let pool = pool(10 * MIB);
        let first = pool.take(6 * MIB, WAIT_MAX).await.unwrap();
        assert!(pool.try_take(6 * MIB).is_none());
        assert_eq!(pool.take(6 * MIB, Duration::from_millis(50)).await.err().unwrap().code(), 1309);
        assert_eq!(pool.used.get(), 6 << 20);
        let second = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(first);
        };
        let (taken, ()) = tokio::join!(pool.take(6 * MIB, WAIT_MAX), second);
        assert_eq!(taken.unwrap().bytes(), 6 * MIB);
        assert_eq!(pool.used.get(), 0);
        assert_eq!(pool.units.available_permits(), 160);
    }

    #[tokio::test]
    async fn more_than_all_is_granted_to_one_at_a_time() {
        let pool = pool(MIB);
        let huge = pool.take(u64::MAX / 2, WAIT_MAX).await.unwrap();
        assert!(pool.try_take(1).is_none());
        drop(huge);
        assert!(pool.try_take(1).is_some());
    }

    #[tokio::test]
    async fn what_is_kept_leaves_deltas_their_part() {
        let memory = Memory::new(64 * MIB, 6 * MIB, PATIENCE, &MemoryMetrics::default());
        let one = memory.claims.begin();
        let work = u64::from(memory.work.units_all) * UNIT;
        assert_eq!((work, memory.machine_bytes_max()), (28 * MIB, 7 * MIB));
        let mut kept = Vec::new();
        for _ in 0..3 {
            kept.push(memory.keep(&one, memory.machine_bytes_max(), WAIT_MAX).await.unwrap());
        }
        let short = Duration::from_millis(20);
        assert_eq!(memory.keep(&one, UNIT, short).await.err().unwrap().code(), 1309);
        let delta = memory.open_delta(&one, short).await.unwrap();
        kept[0].shrink(MIB);
        assert_eq!(memory.keep(&one, 6 * MIB, short).await.unwrap().bytes(), 6 * MIB);
        drop((kept, delta));
        assert_eq!(one.kept(), 0);
        assert_eq!((memory.work.used.get(), memory.kept.used.get()), (0, 0));
        assert_eq!(memory.work.units.available_permits() as u64 * UNIT, 28 * MIB);
    }

    #[test]
    fn a_budget_is_divided_without_a_rest() {
        for memory in [64 * MIB, 1 << 30, 1 << 36] {
            let metrics = MemoryMetrics::default();
            let all = Memory::new(memory, 6 * MIB, PATIENCE, &metrics);
            let work = u64::from(all.work.units_all) * UNIT;
            let windows = u64::from(all.windows.units_all) * UNIT;
            assert!(memory - (work + windows + page_cache_bytes(memory)) < 2 * UNIT);
        }
    }
}
