//! A token bucket: so many at once, so many a second afterwards. Pure: the time is given.

use std::time::{Duration, Instant};

/// See the module.
#[derive(Clone, Debug)]
pub struct Bucket {
    capacity: f64,
    per_second: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A full one. `capacity` is at least 1, `per_second` more than 0.
    #[must_use]
    pub fn new(capacity: f64, per_second: f64, now: Instant) -> Self {
        Self { capacity, per_second, tokens: capacity, at: now }
    }

    /// Takes one, or tells how long it is until there is one.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        self.tokens = self.tokens(now);
        self.at = self.at.max(now);
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - self.tokens) / self.per_second))
    }

    /// Whether there is one to take.
    #[must_use]
    pub fn has_one(&self, now: Instant) -> bool {
        self.tokens(now) >= 1.0
    }

    /// Which part of its capacity is there: 0 to 1.
    #[must_use]
    pub fn fullness(&self, now: Instant) -> f64 {
        self.tokens(now) / self.capacity
    }

    fn tokens(&self, now: Instant) -> f64 {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        (self.tokens + earned).min(self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut bucket = Bucket::new(3.0, 2.0, start);
        for _ in 0..3 {
            bucket.take(start).unwrap();
        }
        assert_eq!(bucket.take(start), Err(Duration::from_millis(500)));
        assert_eq!(bucket.take(at(250)), Err(Duration::from_millis(250)));
        bucket.take(at(500)).unwrap();
        assert!(!bucket.has_one(at(999)) && bucket.has_one(at(1000)));
        assert!(bucket.take(at(400)).is_err(), "a clock that goes back earns nothing");
        for _ in 0..3 {
            bucket.take(at(60_000)).unwrap();
        }
        assert!(bucket.take(at(60_000)).is_err(), "never more than its capacity");
        assert!(bucket.fullness(at(60_000)) < 0.01 && bucket.fullness(at(60_750)) == 0.5);
    }
}
