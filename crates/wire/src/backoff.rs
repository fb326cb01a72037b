//! When to try again: 1, 2, 4, 8, 10 minutes, then every 30, scaled and with jitter. Pure: no clock, no randomness.

use std::time::Duration;

const MINUTES: [u32; 5] = [1, 2, 4, 8, 10];
const MINUTES_THEN: u32 = 30;

/// Counts failures in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    unit: Duration,
    failures: usize,
}

impl Backoff {
    /// `unit` is what stands for a minute.
    #[must_use]
    pub const fn new(unit: Duration) -> Self {
        Self { unit, failures: 0 }
    }

    /// After a success: the next failure counts as the first.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row so far.
    #[must_use]
    pub const fn failures(&self) -> usize {
        self.failures
    }

    /// After a failure: how long to wait, between 75 % and 125 % of the step as `random` (any number) decides. `None` if
    /// `retry` is false: trying again, unchanged, cannot succeed, and somebody must act.
    pub fn next(&mut self, retry: bool, random: u32) -> Option<Duration> {
        let minutes = MINUTES.get(self.failures).copied().unwrap_or(MINUTES_THEN);
        self.failures = self.failures.saturating_add(1);
        if !retry {
            return None;
        }
        let jitter = 0.75 + 0.5 * f64::from(random) / f64::from(u32::MAX);
        Some(self.unit.saturating_mul(minutes).mul_f64(jitter).min(Duration::from_secs(86_400)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_steps_are_those_of_the_field() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        let middle = u32::MAX / 2;
        let minutes: Vec<u64> = (0..8)
            .map(|_| (backoff.next(true, middle).unwrap().as_secs_f64() / 60.0).round() as u64)
            .collect();
        assert_eq!(minutes, [1, 2, 4, 8, 10, 30, 30, 30]);
        backoff.reset();
        assert!(backoff.next(true, middle).unwrap() <= Duration::from_secs(60));
    }

    #[test]
    fn what_cannot_succeed_is_not_tried_again() {
        assert_eq!(Backoff::new(Duration::from_secs(1)).next(false, 7), None);
    }

    proptest! {
        #[test]
        fn jitter_stays_within_a_quarter(random: u32, failures in 0_usize..20, unit_ms in 1_u64..120_000) {
            let mut backoff = Backoff { unit: Duration::from_millis(unit_ms), failures };
            let step = MINUTES.get(failures).copied().unwrap_or(30);
            let wait = backoff.next(true, random).unwrap().as_secs_f64();
            let exact = unit_ms as f64 / 1000.0 * f64::from(step);
            prop_assert!(wait >= exact * 0.7499 && wait <= exact * 1.2501);
        }
    }
}
