//! The proof that an epoch missed nothing (pure).
//!
//! The kernel does not run a tracing program that is already running on the CPU; it counts a miss. Each hook has several
//! copies of its program, and each event is offered to all of them. Readings of the misses are taken twice at
//! an epoch's end: *before* the bitmaps are replaced and *after* the barrier that outlasts every running tracepoint.
//! An epoch is proved for a hook if one copy has the same misses after its end as before the end of the epoch
//! before it: that copy saw every event whose handling could have fallen into the epoch. The windows overlap across
//! each end; without the overlap an event that straddles it could be missed by one copy in the one epoch and by another
//! copy in the next, with both epochs proved.

use serde::{Deserialize, Serialize};

/// Misses of each copy of one hook's programs, in the order of the copies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Misses(pub Vec<u64>);

impl Misses {
    /// The sum over copies, for the metrics.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// Verdict on one epoch of one hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This copy (from 0) saw everything.
    Proved(usize),
    /// Every copy missed something.
    Unproved,
}

/// Keeps the reading that opened the current window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prover {
    opened: Misses,
}

impl Prover {
    /// Starts with the misses read before the first bitmap was put in place.
    #[must_use]
    pub fn new(opened: Misses) -> Self {
        Self { opened }
    }

    /// How many copies have missed nothing since the window was opened.
    #[must_use]
    pub fn clean(&self, now: &Misses) -> usize {
        let same = self.opened.0.len() == now.0.len();
        self.opened.0.iter().zip(&now.0).filter(|(opened, now)| same && opened == now).count()
    }

    /// Ends an epoch. `before`: read before the bitmaps were replaced; `after`: read after the barrier.
    pub fn end(&mut self, before: Misses, after: &Misses) -> Verdict {
        let same = self.opened.0.len() == after.0.len();
        let witness = (0..after.0.len()).find(|i| same && self.opened.0[*i] == after.0[*i]);
        self.opened = before;
        witness.map_or(Verdict::Unproved, Verdict::Proved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn m(v: &[u64]) -> Misses {
        Misses(v.to_vec())
    }

    #[test]
    fn one_clean_copy_proves() {
        let mut p = Prover::new(m(&[5, 0, 2]));
        assert_eq!((p.clean(&m(&[5, 0, 3])), p.clean(&m(&[5, 0])), p.clean(&m(&[5, 0, 2]))), (2, 0, 3));
        assert_eq!(p.end(m(&[6, 0, 3]), &m(&[7, 0, 4])), Verdict::Proved(1));
        assert_eq!(p.end(m(&[7, 1, 4]), &m(&[7, 1, 5])), Verdict::Unproved);
    }

    #[test]
    fn windows_overlap() {
        // A miss of copy 0 between `before` and `after` counts in both epochs.
        let mut p = Prover::new(m(&[0, 1]));
        assert_eq!(p.end(m(&[0, 2]), &m(&[1, 2])), Verdict::Unproved);
        assert_eq!(p.end(m(&[1, 2]), &m(&[1, 2])), Verdict::Proved(1));
    }

    #[test]
    fn a_change_of_copies_proves_nothing() {
        let mut p = Prover::new(m(&[0, 0]));
        assert_eq!(p.end(m(&[0, 0, 0]), &m(&[0, 0, 0])), Verdict::Unproved);
        assert_eq!(Prover::new(m(&[])).end(m(&[]), &m(&[])), Verdict::Unproved);
    }

    proptest! {
        /// Events with a handling time that may straddle ends; each copy sees or misses each event at some moment of
        /// its handling. If all copies miss an event, some epoch it touches must be unproved.
        #[test]
        fn no_lost_event_is_proved(
            events in proptest::collection::vec((0u64..100, 0u64..12, 0u8..8), 1..60),
            ends in proptest::collection::btree_set(5u64..110, 1..6),
        ) {
            const COPIES: usize = 3;
            // (time, copy) of each miss; the barrier of an end at t lasts until events running at t are over.
            let mut misses: Vec<(u64, usize)> = vec![];
            let mut lost: Vec<(u64, u64)> = vec![];
            for (start, len, mask) in &events {
                for copy in 0..COPIES {
                    if mask & (1 << copy) != 0 {
                        misses.push((start + len * copy as u64 / COPIES as u64, copy));
                    }
                }
                if mask & 7 == 7 { lost.push((*start, start + len)); }
            }
            let reading = |t: u64| Misses((0..COPIES).map(|c| misses.iter().filter(|m| m.1 == c && m.0 <= t).count() as u64).collect());
            let mut prover = Prover::new(Misses(vec![0; COPIES]));
            let mut opened = 0;
            for end in ends {
                let barrier = events.iter().filter(|(s, l, _)| *s <= end && s + l >= end).map(|(s, l, _)| s + l).max().unwrap_or(end).max(end);
                if let Verdict::Proved(_) = prover.end(reading(end), &reading(barrier)) {
                    // A lost event whose whole handling lies within this window must have unproved it.
                    for (start, last) in &lost {
                        prop_assert!(!(*start > opened && *last <= barrier), "lost event {start}-{last} in proved window {opened}-{barrier}");
                    }
                }
                opened = end;
            }
        }
    }
}
