//! When the stream was where (pure): what a point's time is told by.
//!
//! A moment says that everything that was submitted by then lies before its position: the time is read first, then the
//! position. The time of a position is that of the newest moment that does not lie behind it, so it errs on the side of age.

use super::ring::StreamPosition;
use std::collections::VecDeque;

/// More are not kept: the older half is thinned out then.
const MOMENTS_MAX: usize = 1024;

/// See the module.
#[derive(Debug)]
pub struct Moments<T>(VecDeque<(StreamPosition, T)>);

impl<T> Default for Moments<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T: Copy> Moments<T> {
    /// By `at`, the stream had come to `position`, or not even so far. Neither ever goes back.
    pub fn note(&mut self, at: T, position: StreamPosition) {
        if let Some(last) = self.0.back_mut().filter(|(known, _)| *known == position) {
            last.1 = at;
            return;
        }
        if self.0.len() >= MOMENTS_MAX {
            let mut number = 0;
            self.0.retain(|_| {
                number += 1;
                number > MOMENTS_MAX / 2 || number % 2 == 1
            });
        }
        self.0.push_back((position, at));
    }

    /// By when everything that was submitted lies before this position; `None` if nothing is known of it.
    #[must_use]
    pub fn of(&self, position: StreamPosition) -> Option<T> {
        self.0.iter().rev().find(|(known, _)| *known <= position).map(|(_, at)| *at)
    }

    /// No position before this one will be asked for any more.
    pub fn forget_before(&mut self, position: StreamPosition) {
        while self.0.get(1).is_some_and(|(next, _)| *next <= position) {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_time_of_a_position_is_never_too_late() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut moments = Moments::default();
        assert_eq!(moments.of(StreamPosition(5)), None);
        moments.note(at(1), StreamPosition(10));
        moments.note(at(2), StreamPosition(20));
        moments.note(at(3), StreamPosition(20));
        moments.note(at(4), StreamPosition(30));
        let of = |moments: &Moments<Instant>, position: u64| moments.of(StreamPosition(position));
        assert_eq!(
            [9, 10, 19, 20, 29, 99].map(|p| of(&moments, p)),
            [None, Some(1), Some(1), Some(3), Some(3), Some(4)].map(|ms| ms.map(at))
        );
        moments.forget_before(StreamPosition(25));
        assert_eq!([10, 25, 30].map(|p| of(&moments, p)), [None, Some(3), Some(4)].map(|ms| ms.map(at)));
        // Thinned out, it errs towards age, and the newest are all there.
        for number in 0..5000 {
            moments.note(at(10 + number), StreamPosition(40 + number));
        }
        assert!(moments.0.len() <= MOMENTS_MAX);
        for number in (0..5000).step_by(7) {
            let told = of(&moments, 40 + number).unwrap();
            assert!(told <= at(10 + number), "{number}");
        }
        assert_eq!(of(&moments, 40 + 4999), Some(at(10 + 4999)));
    }
}
