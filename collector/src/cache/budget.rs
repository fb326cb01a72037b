//! Bytes of the cache's disk, for all sessions together.
//!
//! A session may hold up to twice what is left over. So one alone gets two thirds of all, two get two fifths each, and there is always
//! something for whoever comes next; nobody has to be asked for anything, since what a session holds it gives back as the vault takes it.

use crate::lock::locked;
use crate::metrics::CacheMetrics;
use std::sync::{Arc, Mutex};

/// See the module.
pub struct Budget {
    bytes: u64,
    used: Mutex<u64>,
    metrics: CacheMetrics,
}

impl Budget {
    /// So many bytes.
    #[must_use]
    pub fn new(bytes: u64, metrics: &CacheMetrics) -> Arc<Self> {
        metrics.budget(bytes);
        Arc::new(Self { bytes, used: Mutex::new(0), metrics: metrics.clone() })
    }

    /// How many there are.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes some for a session that holds `own` already; false if they are not for it now.
    pub fn try_take(&self, own: u64, bytes: u64) -> bool {
        let mut used = locked(&self.used);
        let Some(left) = self.bytes.checked_sub(*used).and_then(|left| left.checked_sub(bytes)) else {
            return false;
        };
        if own.saturating_add(bytes) > left.saturating_mul(2) {
            return false;
        }
        *used += bytes;
        self.metrics.used(*used);
        true
    }

    /// Gives some back.
    pub fn give(&self, bytes: u64) {
        let mut used = locked(&self.used);
        *used = used.saturating_sub(bytes);
        self.metrics.used(*used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes one at a time as long as there are any.
    fn fill(budget: &Budget, own: &mut u64) {
        while budget.try_take(*own, 1) {
            *own += 1;
        }
    }

    #[test]
    fn whoever_comes_later_gets_something_and_in_the_end_the_same() {
        let budget = Budget::new(3000, &CacheMetrics::default());
        let (mut first, mut second) = (0, 0);
        fill(&budget, &mut first);
        assert_eq!(first, 2000);
        fill(&budget, &mut second);
        assert!((600..700).contains(&second), "{second}");
        // The first one's goes into the vault bit by bit, and both take what they may.
        for _ in 0..4000 {
            budget.give(1);
            first -= 1;
            fill(&budget, &mut second);
            fill(&budget, &mut first);
        }
        assert!(first.abs_diff(second) < 10, "{first} {second}");
        assert!(first + second < 3000);
        assert!(!budget.try_take(0, u64::MAX));
    }
}
