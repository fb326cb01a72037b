//! Whose turn it is: one maintainer of a machine at a time, of any number of programs that would be.
//!
//! The chain of records decides: the one that said last that it begins counts. That alone would let two programs, whose work takes longer than
//! the time between two of their rounds, fence each other for ever. So each says for whom it works, and says so again while it is at a long
//! merge; who is patient leaves the machine alone for a while after that. Nothing depends on clocks: by a wrong one, a machine is
//! maintained too late, or by somebody who is then fenced.

use super::{Settings, around::Around};
use crate::{
    Result, VaultError,
    journal::Journal,
    record::{KIND_MAINTAINER, MaintainerBody},
    state::Lease,
    store,
};
use highwater_delta::{MachineId, SegmentId};
use object_store::ObjectStoreExt;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// During long work it is said so often that it goes on.
const RENEW_EVERY: Duration = Duration::from_secs(240);
/// How long it is believed that the store would refuse again.
const REFUSED_FOR: Duration = Duration::from_secs(3600);
/// A map that could be opened is not looked at for so long.
const GOOD_FOR: Duration = Duration::from_secs(24 * 3600);
/// Maps of which that is remembered.
const GOOD_MAX: usize = 1 << 20;
/// A clock that differs by less from what it said plus the time since was not set.
const UNSET: Duration = Duration::from_secs(60);

/// For whom a maintainer works: a collector over all its starts, or one run of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner([u8; 16]);

impl Owner {
    /// One that there was not before.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        Self(*SegmentId::new().as_bytes())
    }
    /// One that was kept ([`Owner::to_bytes`]). Only one process may go by it at a time, or both fence each other again and again.
    #[must_use]
    pub const fn from_bytes(id: [u8; 16]) -> Self {
        Self(id)
    }
    /// To be kept.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

/// See [`Settings::refusals`].
#[derive(Debug, Default)]
pub struct Refusals(Mutex<Refused>);

#[derive(Debug, Default)]
struct Refused {
    /// Machines of whose trash nothing could be deleted.
    kept: HashMap<MachineId, Instant>,
    /// Damage that merges go around; it may be mended meanwhile.
    damaged: HashMap<MachineId, (Instant, Around)>,
    /// Maps that could be opened.
    good: HashMap<SegmentId, Instant>,
    /// When the clock was wrong, what it said then, and by how many seconds it was.
    clock: Option<(Instant, u64, u64)>,
}

impl Refusals {
    pub(super) fn kept(&self, machine: MachineId, all: bool) {
        let mut refused = self.lock();
        refused.kept.remove(&machine);
        if all {
            refused.kept.insert(machine, Instant::now());
        }
    }
    pub(super) fn has_kept(&self, machine: MachineId) -> bool {
        self.lock().kept.get(&machine).is_some_and(|since| since.elapsed() < REFUSED_FOR)
    }
    /// What of a machine was damaged lately.
    pub(super) fn around(&self, machine: MachineId) -> Around {
        let refused = self.lock();
        let known = refused.damaged.get(&machine).filter(|(since, _)| since.elapsed() < REFUSED_FOR);
        known.map(|(_, around)| around.clone()).unwrap_or_default()
    }
    pub(super) fn damaged(&self, machine: MachineId, around: &Around) {
        let damaged = &mut self.lock().damaged;
        let since = damaged.get(&machine).map_or_else(Instant::now, |(since, _)| *since);
        let since = if since.elapsed() < REFUSED_FOR { since } else { Instant::now() };
        damaged.insert(machine, (since, around.clone()));
    }
    /// A map could be opened.
    pub(super) fn good(&self, map: SegmentId) {
        let good = &mut self.lock().good;
        if good.len() >= GOOD_MAX {
            good.clear();
        }
        good.insert(map, Instant::now());
    }
    /// Whether it could lately.
    pub(super) fn was_good(&self, map: SegmentId) -> bool {
        self.lock().good.get(&map).is_some_and(|since| since.elapsed() < GOOD_FOR)
    }
    /// By how many seconds the clock is wrong, if it was and has not been set since.
    fn wrong_clock(&self, now_ms: u64) -> Option<u64> {
        let (since, then_ms, skew_seconds) = self.lock().clock?;
        let is_unset = Duration::from_millis(now_ms.abs_diff(then_ms)).abs_diff(since.elapsed()) < UNSET;
        (is_unset && since.elapsed() < REFUSED_FOR).then_some(skew_seconds)
    }
    fn clock(&self, wrong: Option<(u64, u64)>) {
        self.lock().clock = wrong.map(|(now_ms, skew_seconds)| (Instant::now(), now_ms, skew_seconds));
    }
    fn lock(&self) -> MutexGuard<'_, Refused> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A maintainer's turn.
pub(crate) struct Turn {
    owner: [u8; 16],
    patience: Option<Duration>,
    skew_max: Option<Duration>,
    refusals: Arc<Refusals>,
    said: Instant,
    /// Asked since, and not yet time.
    asked: u64,
}

impl Turn {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self {
            owner: settings.owner.0,
            patience: settings.patience,
            skew_max: settings.skew_max,
            refusals: settings.refusals.clone(),
            said: Instant::now(),
            asked: 0,
        }
    }

    /// Becomes the machine's maintainer; false if it is already.
    pub(crate) async fn begin(&mut self, journal: &mut Journal) -> Result<bool> {
        if journal.state.maintainer == journal.identity() {
            return Ok(false);
        }
        let now_ms = journal.vault.now_ms();
        // Its record would fence one whose clock is right.
        if let Some(skew_seconds) = self.refusals.wrong_clock(now_ms).filter(|_| self.skew_max.is_some()) {
            return Err(VaultError::Clock(skew_seconds));
        }
        let (owner, patience) = (self.owner, self.patience);
        let body = self.body()?;
        let put = journal.put_after_others(KIND_MAINTAINER, &body, |state| {
            !is_taken(state.lease, owner, patience, now_ms)
        });
        if !put.await? {
            return Err(VaultError::Maintained(journal.machine));
        }
        self.said = Instant::now();
        self.check_clock(journal).await?;
        Ok(true)
    }

    /// Says that it is at work still, if it is time to.
    ///
    /// # Errors
    /// [`VaultError::Maintained`]: another one is.
    pub(crate) async fn renew(&mut self, journal: &mut Journal) -> Result<()> {
        self.asked += 1;
        // Tests have no time.
        let is_time =
            if cfg!(test) { self.asked.is_multiple_of(16) } else { self.said.elapsed() >= RENEW_EVERY };
        if is_time { self.say(journal).await } else { Ok(()) }
    }

    /// Says that it is at work still: whatever there is then, nobody has begun after it.
    ///
    /// # Errors
    /// [`VaultError::Maintained`]: somebody has.
    pub(crate) async fn say(&mut self, journal: &mut Journal) -> Result<()> {
        let (body, own) = (self.body()?, journal.identity());
        if !journal.put_after_others(KIND_MAINTAINER, &body, |state| state.maintainer == own).await? {
            return Err(VaultError::Maintained(journal.machine));
        }
        self.said = Instant::now();
        Ok(())
    }

    fn body(&self) -> Result<Vec<u8>> {
        super::encode(&MaintainerBody { owner: self.owner })
    }

    /// Compares the clock here with the store's, by the record that was put just now.
    async fn check_clock(&self, journal: &Journal) -> Result<()> {
        let Some(skew_max) = self.skew_max else { return Ok(()) };
        let Journal { vault, machine, state, .. } = journal;
        let put = vault.store().head(&store::manifest_path(*machine, state.last_record)).await?;
        let stored_ms = u64::try_from(put.last_modified.timestamp_millis()).unwrap_or(0);
        let now_ms = vault.now_ms();
        let skew = Duration::from_millis(now_ms.abs_diff(stored_ms));
        let is_wrong = skew > skew_max;
        self.refusals.clock(is_wrong.then_some((now_ms, skew.as_secs())));
        if is_wrong { Err(VaultError::Clock(skew.as_secs())) } else { Ok(()) }
    }
}

/// Whether somebody else was seen at work lately.
fn is_taken(lease: Lease, owner: [u8; 16], patience: Option<Duration>, now_ms: u64) -> bool {
    let is_anothers = lease.owner != [0; 16] && lease.owner != owner;
    let since = Duration::from_millis(now_ms.abs_diff(lease.seen_ms));
    is_anothers && patience.is_some_and(|patience| since < patience)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_left_alone_while_another_owner_is_at_it() {
        let patience = Some(Duration::from_secs(900));
        let (own, other) = ([1; 16], [2; 16]);
        let lease = Lease { owner: other, seen_ms: 1_000_000 };
        assert!(is_taken(lease, own, patience, 1_000_000 + 899_999));
        assert!(!is_taken(lease, own, patience, 1_000_000 + 900_000));
        // It may be by a clock that is ahead; by one that is far off, nobody waits for days.
        assert!(is_taken(lease, own, patience, 1_000_000 - 5_000));
        assert!(!is_taken(Lease { seen_ms: u64::MAX, ..lease }, own, patience, 1_000_000));
        assert!(!is_taken(lease, own, None, 1_000_000));
        assert!(!is_taken(lease, other, patience, 1_000_000));
        assert!(!is_taken(Lease { owner: [0; 16], ..lease }, own, patience, 1_000_000));
    }

    #[test]
    fn what_was_refused_is_remembered_and_a_clock_that_was_set_is_tried() {
        let refusals = Refusals::default();
        let machine = MachineId::new();
        refusals.kept(machine, true);
        assert!(refusals.has_kept(machine));
        refusals.kept(machine, false);
        assert!(!refusals.has_kept(machine));
        refusals.clock(Some((5_000_000, 700)));
        assert_eq!(refusals.wrong_clock(5_000_000), Some(700));
        assert_eq!(refusals.wrong_clock(4_300_000), None);
        refusals.clock(None);
        assert_eq!(refusals.wrong_clock(5_000_000), None);
    }
}
