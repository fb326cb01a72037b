//! The bandwidth limit: a token bucket whose rate can change while senders wait.
//!
//! [`TokenBucket`] is pure: the caller gives the time. [`Throttle`] is its async face. Senders are served in the order
//! they came. Over any stretch of `t` seconds at most `rate · t + burst + one request` bytes pass. A waiting sender that is
//! cancelled has taken nothing.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, Semaphore};

const NANOS: u128 = 1_000_000_000;
/// How much of a second the bucket holds: short enough that a pause does not turn into a burst that fills a link's queue.
const BURST_DIVISOR: u64 = 10;
/// The smallest burst, so that low rates still send whole chunks.
const BURST_MIN_BYTES: u64 = 64 * 1024;

/// The pure core. Time is a [`Duration`] since any fixed origin and must not go back (if it does, nothing is refilled).
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate_per_s: Option<u64>,
    /// In units of bytes · 1e-9, so that no rate loses a fraction of a byte. Negative: debt.
    level: i128,
    refilled_at: Duration,
}

impl TokenBucket {
    /// A full bucket; `None` does not limit. A rate of 0 lets nothing pass until it is changed.
    #[must_use]
    pub fn new(rate_per_s: Option<u64>, now: Duration) -> Self {
        let mut bucket = Self { rate_per_s, level: 0, refilled_at: now };
        bucket.level = bucket.burst();
        bucket
    }

    /// The rate in force, bytes per second.
    #[must_use]
    pub fn rate_per_s(&self) -> Option<u64> {
        self.rate_per_s
    }

    /// Takes `bytes`, or tells how long to wait before asking again. A request larger than the bucket passes when
    /// the bucket is not empty and leaves a debt.
    ///
    /// # Errors
    /// The time until the bucket is out of debt at the present rate; [`Duration::MAX`] if the rate is 0.
    pub fn try_take(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        let Some(rate) = self.rate_per_s else { return Ok(()) };
        self.refill(now);
        if bytes == 0 || (self.level > 0 && rate > 0) {
            self.level -= i128::from(bytes) * NANOS as i128;
            return Ok(());
        }
        if rate == 0 {
            return Err(Duration::MAX);
        }
        let missing = self.level.unsigned_abs() + 1;
        let nanos = missing.div_ceil(u128::from(rate));
        Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Changes the rate. What was saved up or owed so far stays, within the new burst.
    pub fn set_rate(&mut self, rate_per_s: Option<u64>, now: Duration) {
        self.refill(now);
        self.rate_per_s = rate_per_s;
        self.refilled_at = self.refilled_at.max(now);
        self.level = self.level.min(self.burst());
    }

    fn burst(&self) -> i128 {
        let bytes = (self.rate_per_s.unwrap_or(0) / BURST_DIVISOR).max(BURST_MIN_BYTES);
        i128::from(bytes) * NANOS as i128
    }

    fn refill(&mut self, now: Duration) {
        let Some(elapsed) = now.checked_sub(self.refilled_at) else { return };
        self.refilled_at = now;
        let gained = elapsed.as_nanos().saturating_mul(u128::from(self.rate_per_s.unwrap_or(0)));
        let gained = i128::try_from(gained).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gained).min(self.burst());
    }
}

/// The token bucket on real time, shared by all senders.
#[derive(Debug)]
pub struct Throttle {
    bucket: Mutex<TokenBucket>,
    /// One permit: who holds it is next, the others queue in order.
    turn: Semaphore,
    changed: Notify,
    origin: Instant,
}

impl Throttle {
    /// A throttle of so many bytes per second; `None` does not limit.
    #[must_use]
    pub fn new(rate_per_s: Option<u64>) -> Self {
        Self {
            bucket: Mutex::new(TokenBucket::new(rate_per_s, Duration::ZERO)),
            turn: Semaphore::new(1),
            changed: Notify::new(),
            origin: Instant::now(),
        }
    }

    /// Waits until `bytes` may be sent.
    pub async fn acquire(&self, bytes: u64) {
        // The semaphore is never closed; were it, passing unlimited is the harmless outcome.
        let _turn = self.turn.acquire().await;
        loop {
            let changed = self.changed.notified();
            let wait = match self.with(|bucket, now| bucket.try_take(bytes, now)) {
                Ok(()) => return,
                Err(wait) => wait.min(Duration::from_secs(3600)),
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    /// Changes the rate; who waits is told at once.
    pub fn set_rate(&self, rate_per_s: Option<u64>) {
        self.with(|bucket, now| bucket.set_rate(rate_per_s, now));
        self.changed.notify_waiters();
    }

    /// The rate in force, bytes per second.
    #[must_use]
    pub fn rate_per_s(&self) -> Option<u64> {
        self.with(|bucket, _| bucket.rate_per_s())
    }

    fn with<T>(&self, act: impl FnOnce(&mut TokenBucket, Duration) -> T) -> T {
        let now = self.origin.elapsed();
        act(&mut self.bucket.lock().unwrap_or_else(PoisonError::into_inner), now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    proptest! {
        /// Whatever is asked when, no stretch passes more than its rate, the burst and one request.
        #[test]
        fn never_more_than_the_rate(rate in 1_u64..1 << 32, asks in prop::collection::vec((0_u64..1 << 20, 0_u64..50_000_000), 1..200)) {
            let mut bucket = TokenBucket::new(Some(rate), Duration::ZERO);
            let mut now = Duration::ZERO;
            let mut passed: Vec<(Duration, u64)> = Vec::new();
            for (bytes, gap) in asks {
                now += Duration::from_nanos(gap);
                if let Err(wait) = bucket.try_take(bytes, now) {
                    now += wait;
                    prop_assert_eq!(bucket.try_take(bytes, now), Ok(()), "the wait it named is enough");
                }
                passed.push((now, bytes));
            }
            let burst = (rate / 10).max(64 * 1024);
            for first in 0..passed.len().min(20) {
                let mut sum = 0_u128;
                for (at, bytes) in &passed[first..] {
                    sum += u128::from(*bytes);
                    let allowed = (*at - passed[first].0).as_nanos() * u128::from(rate) / NANOS;
                    prop_assert!(sum <= allowed + u128::from(burst) + (1 << 20) + 1);
                }
            }
        }
    }

    #[test]
    fn unlimited_never_waits_and_zero_never_passes() {
        let mut bucket = TokenBucket::new(None, Duration::ZERO);
        assert_eq!(bucket.try_take(u64::MAX, Duration::ZERO), Ok(()));
        bucket.set_rate(Some(0), Duration::from_secs(1));
        assert_eq!(bucket.try_take(1, Duration::from_secs(100)), Err(Duration::MAX));
    }

    #[tokio::test]
    async fn a_change_wakes_who_waits() {
        let throttle = Arc::new(Throttle::new(Some(1)));
        throttle.acquire(1 << 30).await;
        let waiting = tokio::spawn({
            let throttle = Arc::clone(&throttle);
            async move { throttle.acquire(1).await }
        });
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(!waiting.is_finished());
        throttle.set_rate(None);
        tokio::time::timeout(Duration::from_secs(1), waiting).await.expect("woken").expect("no panic");
    }

    #[tokio::test]
    async fn keeps_to_its_rate_on_real_time() {
        let throttle = Throttle::new(Some(10_000_000));
        let start = Instant::now();
        for _ in 0..30 {
            throttle.acquire(100_000).await;
        }
        // 3 MB, of which 1 MB is the burst and one request may be owed: at least 0.19 s.
        assert!(start.elapsed() >= Duration::from_millis(185), "{:?}", start.elapsed());
        assert!(start.elapsed() <= Duration::from_secs(2));
    }
}
