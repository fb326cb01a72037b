//! When to try again: soon at first, then each minute; every five where the answer was a refusal. Pure: no clock, no
//! randomness.

use std::time::Duration;

/// The waits after failures in a row, in sixtieths of the unit; the last is kept.
const STEPS: [u32; 6] = [1, 2, 5, 10, 30, 60];
/// The wait after a refusal, in units.
const REFUSED: u32 = 5;

/// Why the last attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Nobody answered, or the connection broke: that may be over at any moment.
    Network,
    /// Somebody must act first. It is tried again, rarely, so that the machine comes back by itself once that has happened.
    Refused,
}

/// Counts failures in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    unit: Duration,
    failures: usize,
}

impl Backoff {
    /// `unit` is what stands for a minute: the longest wait for a collector that does not answer.
    #[must_use]
    pub const fn new(unit: Duration) -> Self {
        Self { unit, failures: 0 }
    }

    /// After a success, or when an operator asked: the next failure counts as the first.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row so far.
    #[must_use]
    pub const fn failures(&self) -> usize {
        self.failures
    }

    /// After a failure: how long to wait, between 75 % and 100 % of the step as `random` (any number) decides.
    pub fn next(&mut self, failure: Failure, random: u32) -> Duration {
        let step = match failure {
            Failure::Network => {
                let sixtieths = STEPS.get(self.failures).or(STEPS.last()).copied().unwrap_or(60);
                self.unit.saturating_mul(sixtieths) / 60
            }
            Failure::Refused => self.unit.saturating_mul(REFUSED),
        };
        self.failures = self.failures.saturating_add(1);
        let jitter = 1.0 - 0.25 * f64::from(random) / f64::from(u32::MAX);
        step.min(Duration::from_secs(86_400)).mul_f64(jitter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_collector_that_is_back_is_found_within_a_minute() {
        let mut backoff = Backoff::new(MINUTE);
        let waits: Vec<u64> = (0..8).map(|_| backoff.next(Failure::Network, 0).as_secs()).collect();
        assert_eq!(waits, [1, 2, 5, 10, 30, 60, 60, 60]);
        backoff.reset();
        assert_eq!(backoff.next(Failure::Network, 0), Duration::from_secs(1));
    }

    #[test]
    fn a_refusal_is_asked_about_rarely() {
        let mut backoff = Backoff::new(MINUTE);
        assert_eq!(backoff.next(Failure::Refused, 0), MINUTE * 5);
        assert_eq!(backoff.next(Failure::Refused, 0), MINUTE * 5);
        assert_eq!(backoff.failures(), 2);
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_its_step(random: u32, failures in 0_usize..20, unit_ms in 60_u64..120_000) {
            let unit = Duration::from_millis(unit_ms);
            let mut backoff = Backoff { unit, failures };
            let network = backoff.next(Failure::Network, random);
            prop_assert!(network <= unit && network >= unit.mul_f64(0.0124), "{network:?}");
            let refused = backoff.next(Failure::Refused, random);
            prop_assert!(refused <= unit * 5 && refused >= unit.mul_f64(3.74), "{refused:?}");
        }
    }
}
