//! What each session holds, so that those who hold more than their part can be asked for it.
//!
//! **The part of a machine** is what may be kept, divided by the sessions there are now. While nobody waits, anybody may have
//! more. Once one who asks for no more than its part has to wait, the session that holds most is asked: it lets its block map
//! go, which is only a cache, or ends (HW-1309) and comes back. If those who ask within their part wait, somebody holds more than
//! his; so their waiting ends, whoever the others are. One who asks for more than its part gets what is left over, and
//! asks nobody.
//!
//! **A delta** holds memory while it is open. One that has grown by less than [`FLOOR_BYTES_PER_SECOND`] for long is ended when
//! others wait for its memory, and only then. All that are so slow are asked: one that cannot hear it at that moment must not be
//! the others' excuse. One that is complete, and waits to be committed, is slow no longer, however long the vault takes.

use crate::lock::locked;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A delta that grows more slowly than this is in the way of others; 64 kbit/s are better than the worst of links.
pub const FLOOR_BYTES_PER_SECOND: u64 = 8 * 1024;

/// Chunks of zeros are small, and stand for much.
const CHUNK_BYTES_LEAST: u64 = 1024;

/// A session's place in the table.
#[derive(Default)]
pub struct Claim {
    kept: AtomicU64,
    delta: Mutex<Option<Growth>>,
    asked: Notify,
}

/// How an open delta has grown lately.
#[derive(Clone, Copy)]
struct Growth {
    since: Instant,
    bytes: u64,
}

impl Growth {
    fn is_slow(&self, now: Instant, patience: Duration) -> bool {
        let age = now.saturating_duration_since(self.since);
        age >= patience && self.bytes < age.as_secs().saturating_mul(FLOOR_BYTES_PER_SECOND).max(1)
    }
}

/// What a session that is asked is to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Part of what it keeps.
    Kept,
    /// Its open delta.
    Delta,
}

/// All sessions.
pub struct Claims {
    kept_bytes: u64,
    patience: Duration,
    all: Mutex<Vec<Weak<Claim>>>,
    waiting_for_kept: AtomicUsize,
    waiting_for_deltas: AtomicUsize,
}

/// Counts one who waits.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Claims {
    /// So much may be kept by all; so long a delta may be slow.
    pub fn new(kept_bytes: u64, patience: Duration) -> Self {
        let all = Mutex::default();
        Self {
            kept_bytes,
            patience,
            all,
            waiting_for_kept: AtomicUsize::new(0),
            waiting_for_deltas: AtomicUsize::new(0),
        }
    }

    /// For a session that begins.
    pub fn begin(&self) -> Arc<Claim> {
        let claim = Arc::new(Claim::default());
        let mut all = locked(&self.all);
        all.retain(|claim| claim.strong_count() > 0);
        all.push(Arc::downgrade(&claim));
        claim
    }

    fn sessions(&self) -> Vec<Arc<Claim>> {
        locked(&self.all).iter().filter_map(Weak::upgrade).collect()
    }

    /// Bytes that each session may count on.
    pub fn part(&self) -> u64 {
        self.kept_bytes / (self.sessions().len() as u64).max(1)
    }

    /// Asks the one who keeps most, again and again, while `wait` is waited for.
    pub async fn ask_for_kept<T>(&self, wait: impl Future<Output = T>) -> T {
        let _waiting = Waiting::new(&self.waiting_for_kept);
        again_and_again(wait, || {
            if let Some(most) = self.sessions().iter().max_by_key(|claim| claim.kept()) {
                most.asked.notify_one();
            }
        })
        .await
    }

    /// The same for deltas that are slow: all of them.
    pub async fn ask_for_deltas<T>(&self, wait: impl Future<Output = T>) -> T {
        let _waiting = Waiting::new(&self.waiting_for_deltas);
        again_and_again(wait, || {
            let now = Instant::now();
            for slow in self.sessions().iter().filter(|claim| claim.is_slow(now, self.patience)) {
                slow.asked.notify_one();
            }
        })
        .await
    }

    /// Waits until this session is to give something. Cancellation-safe.
    pub async fn asked(&self, claim: &Claim) -> Asked {
        loop {
            claim.asked.notified().await;
            // It may have been long ago.
            if self.waiting_for_kept.load(Ordering::SeqCst) > 0 && claim.kept() > self.part() {
                return Asked::Kept;
            }
            let deltas = self.waiting_for_deltas.load(Ordering::SeqCst) > 0;
            if deltas && claim.is_slow(Instant::now(), self.patience) {
                return Asked::Delta;
            }
        }
    }

    /// The open delta has all that it will have: what it still takes is not its machine's doing.
    pub fn complete(&self, claim: &Claim) {
        claim.delta(false);
    }

    /// The open delta has grown.
    pub fn grown(&self, claim: &Claim, bytes: usize) {
        let now = Instant::now();
        if let Some(growth) = locked(&claim.delta).as_mut() {
            growth.bytes += (bytes as u64).max(CHUNK_BYTES_LEAST);
            // What it did long ago does not excuse it for ever.
            if now.saturating_duration_since(growth.since) >= self.patience
                && !growth.is_slow(now, self.patience)
            {
                *growth = Growth { since: now, bytes: 0 };
            }
        }
    }
}

async fn again_and_again<T>(wait: impl Future<Output = T>, ask: impl Fn()) -> T {
    let mut wait = std::pin::pin!(wait);
    loop {
        ask();
        if let Ok(done) = tokio::time::timeout(super::ASK_EVERY, &mut wait).await {
            return done;
        }
    }
}

impl Claim {
    /// Bytes of state and block maps.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::SeqCst)
    }

    pub(super) fn more(&self, bytes: u64) {
        self.kept.fetch_add(bytes, Ordering::SeqCst);
    }

    pub(super) fn less(&self, bytes: u64) {
        self.kept.fetch_sub(bytes, Ordering::SeqCst);
    }

    pub(super) fn delta(&self, open: bool) {
        *locked(&self.delta) = open.then(|| Growth { since: Instant::now(), bytes: 0 });
    }

    fn is_slow(&self, now: Instant, patience: Duration) -> bool {
        locked(&self.delta).is_some_and(|growth| growth.is_slow(now, patience))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{sleep, timeout};

    const PATIENCE: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(5);

    /// Sessions with a delta of which nothing has come for long.
    async fn slow(claims: &Claims) -> [Arc<Claim>; 2] {
        let slow = [claims.begin(), claims.begin()];
        slow.iter().for_each(|claim| claim.delta(true));
        sleep(PATIENCE * 2).await;
        slow
    }

    #[tokio::test]
    async fn all_who_are_slow_are_asked() {
        let claims = Claims::new(1 << 20, PATIENCE);
        let [first, second] = slow(&claims).await;
        let both = async { (claims.asked(&second).await, claims.asked(&first).await) };
        let asked = claims.ask_for_deltas(timeout(LONG, both)).await;
        assert_eq!(asked, Ok((Asked::Delta, Asked::Delta)));
    }

    #[tokio::test]
    async fn a_delta_that_is_committed_is_not_slow() {
        let claims = Claims::new(1 << 20, PATIENCE);
        let [committed, slow] = slow(&claims).await;
        claims.complete(&committed);
        let asked = claims.ask_for_deltas(timeout(super::super::ASK_EVERY * 2, claims.asked(&committed)));
        assert!(asked.await.is_err(), "it can do no more");
        let asked = claims.ask_for_deltas(timeout(LONG, claims.asked(&slow))).await;
        assert_eq!(asked, Ok(Asked::Delta), "nor does it hide one that is slow");
        // The next one starts anew.
        committed.delta(true);
        sleep(PATIENCE * 2).await;
        assert!(committed.is_slow(Instant::now(), PATIENCE));
    }
}
