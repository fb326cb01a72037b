//! How fast maintenance may go: bytes read and written a second, so that it does not take what ingest and recovery need.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A pause that is not worth its timer is put off.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// A bound on bytes a second, or none.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<u64>,
    /// Until when the bytes so far last.
    spent_until: Mutex<Option<Instant>>,
    bytes: std::sync::atomic::AtomicU64,
}

impl Pace {
    /// So many bytes a second on average; `None` or 0: as fast as it goes.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|bytes| *bytes > 0),
            spent_until: Mutex::default(),
            bytes: Default::default(),
        }
    }

    /// Bytes spent so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Counts bytes that were moved, and waits until more may be.
    pub async fn spend(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        let Some(rate) = self.bytes_per_second.filter(|_| bytes > 0) else { return };
        let until = {
            let now = Instant::now();
            let mut spent = self.spent_until.lock().unwrap_or_else(PoisonError::into_inner);
            let until = spent.unwrap_or(now).max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *spent = Some(until);
            until
        };
        if until > Instant::now() + PAUSE_MIN {
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_takes_as_long_as_its_bytes() {
        let (pace, begun) = (Pace::new(Some(1000)), Instant::now());
        for _ in 0..50 {
            pace.spend(100).await;
        }
        assert!(
            begun.elapsed() > Duration::from_millis(4900) && begun.elapsed() < Duration::from_millis(5100)
        );
        assert_eq!(pace.bytes(), 5000);
        let begun = Instant::now();
        Pace::new(None).spend(1 << 40).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
