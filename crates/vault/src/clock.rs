//! What time it is, in milliseconds since 1970: the system's clock, unless told otherwise, as far as the store's clock bears it out.
//!
//! By a clock that is behind, points would be stored as older than they are, and expire at once; by one that is ahead, they would be
//! kept for ever. So what is recorded is stamped by the local clock only while it was found to agree with the store's, and has gone on evenly
//! since; else by the store's ([`Vault::stamp_ms`]). Asking the store what time it is costs a small object that is put, looked at and deleted:
//! once an hour, and for each stamp while the local clock is wrong.

use crate::{Result, Vault, VaultError, key::random, store};
use highwater_delta::SegmentId;
use object_store::{ObjectStoreExt, path::Path};
use std::{
    fmt::Write as _,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::Instant;

/// A local clock within this of the store's is right. With [`ANSWER_WITHIN`] and what clocks drift in [`ASK_EVERY`] it stays below
/// what maintenance bears ([`crate::maintain::Settings::skew_max`]).
const AGREES_MS: u64 = 300_000;
const ASK_EVERY: Duration = Duration::from_secs(3600);
/// An answer that took longer tells too little.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// Times that it is asked until an answer comes in time.
const TRIES: usize = 3;

/// Tells the time. Cheap to clone.
#[derive(Clone)]
pub struct Clock {
    now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Whether it may be wrong.
    is_doubtful: bool,
    last: Arc<Mutex<Option<StoreTime>>>,
    /// Of the newest id that it gave out: when, and the how many-th.
    newest_id: Arc<Mutex<(u64, u16)>>,
}

/// Ids of one millisecond.
const IDS_A_MS: u16 = 1 << 12;

/// What the store's clock said, and when.
#[derive(Clone, Copy)]
pub(crate) struct StoreTime {
    ms: u64,
    at: Instant,
}

impl StoreTime {
    /// What it says now.
    pub(crate) fn now_ms(&self) -> u64 {
        self.ms.saturating_add(u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

impl Clock {
    /// One that says what `now_ms` says and is right, for simulations.
    pub fn new(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { now_ms: Arc::new(now_ms), is_doubtful: false, last: Arc::default(), newest_id: Arc::default() }
    }
    /// One that may be wrong.
    pub fn doubtful(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { is_doubtful: true, ..Self::new(now_ms) }
    }
    pub(crate) fn now_ms(&self) -> u64 {
        (self.now_ms)()
    }
    fn last(&self) -> MutexGuard<'_, Option<StoreTime>> {
        // Whole between statements.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Clock {
    fn default() -> Self {
        /// There is one such clock: what several vaults give out in one millisecond is ordered too.
        static NEWEST_ID: LazyLock<Arc<Mutex<(u64, u16)>>> = LazyLock::new(Arc::default);
        let since = || SystemTime::now().duration_since(UNIX_EPOCH);
        let clock = Self::doubtful(move || since().map_or(0, |since| since.as_millis() as u64));
        Self { newest_id: NEWEST_ID.clone(), ..clock }
    }
}

impl Vault {
    /// A new identity, which sorts after all that were made here before, whatever the clock does.
    pub(crate) fn new_segment_id(&self) -> SegmentId {
        let now_ms = self.now_ms();
        let mut newest = self.clock().newest_id.lock().unwrap_or_else(PoisonError::into_inner);
        let (ms, sequence) = *newest;
        *newest = match sequence + 1 {
            _ if now_ms > ms => (now_ms, 0),
            IDS_A_MS => (ms + 1, 0),
            next => (ms, next),
        };
        SegmentId::at_ms(newest.0, newest.1)
    }

    /// Now, in milliseconds since 1970, for what is recorded: within `AGREES_MS` and a minute of the store's clock, unless the clock was
    /// given as right.
    pub async fn stamp_ms(&self) -> Result<u64> {
        let clock = self.clock();
        let agrees = |store: &StoreTime| clock.now_ms().abs_diff(store.now_ms()) <= AGREES_MS;
        let is_known = |store: &StoreTime| store.at.elapsed() < ASK_EVERY && agrees(store);
        if !clock.is_doubtful || clock.last().as_ref().is_some_and(is_known) {
            return Ok(clock.now_ms());
        }
        let store = self.store_time().await?;
        Ok(if agrees(&store) { clock.now_ms() } else { store.now_ms() })
    }

    /// Asks the store what time it is.
    pub(crate) async fn store_time(&self) -> Result<StoreTime> {
        for _ in 0..TRIES {
            let path = probe_path()?;
            let at = Instant::now();
            store::create_object(&**self.store(), &path, Vec::new()).await?;
            let took = at.elapsed();
            let found = self.store().head(&path).await;
            // What stays after a failure is empty, and nothing looks at it.
            let _ = store::delete_if_there(&**self.store(), &path).await;
            let ms = u64::try_from(found?.last_modified.timestamp_millis()).unwrap_or(0);
            if took <= ANSWER_WITHIN {
                let time = StoreTime { ms, at };
                *self.clock().last() = Some(time);
                return Ok(time);
            }
        }
        let source = "it took longer than a minute to answer, several times".into();
        Err(VaultError::Store(object_store::Error::Generic { store: "store", source }))
    }
}

fn probe_path() -> Result<Path> {
    let mut name = [0; 16];
    random(&mut name)?;
    let mut text = String::from("clock/");
    for byte in name {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(Path::from(text))
}
