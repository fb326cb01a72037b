//! Lines that strangers can cause are said sparingly: some at once, then now and then, with the number of those left out.

use crate::bucket::Bucket;
use std::time::Instant;

/// Lines said at once, and every minute afterwards.
const LINES: f64 = 20.0;

/// See the module.
#[derive(Debug)]
pub struct LogLimit {
    bucket: Bucket,
    left_out: u64,
}

impl LogLimit {
    /// Nothing was said yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { bucket: Bucket::new(LINES, LINES / 60.0, now), left_out: 0 }
    }

    /// Whether to say it: with how many were left out since the last one that was said.
    pub fn say(&mut self, now: Instant) -> Option<u64> {
        if self.bucket.take(now).is_err() {
            self.left_out += 1;
            return None;
        }
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_told_by_its_number() {
        let start = Instant::now();
        let mut limit = LogLimit::new(start);
        let said = (0..1000).filter(|_| limit.say(start).is_some()).count();
        assert_eq!(said, 20);
        assert_eq!(limit.say(start + Duration::from_secs(3)), Some(980));
        assert_eq!(limit.say(start + Duration::from_secs(6)), Some(0));
    }
}
