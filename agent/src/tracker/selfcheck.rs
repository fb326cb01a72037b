//! Compares the tracker's own counters with the kernel's (invariant I2; pure).
//!
//! Let `offset` = the kernel's count of sectors − the tracker's. If nothing is missed it never changes, because every
//! completion is traced, and the program has run, before the kernel accounts it. Under load the two cannot be read at
//! the same instant, but read in the right order they bound it: the kernel's count read *first* and the tracker's
//! *after* it give a difference that is at most the offset. A missed write raises the offset for ever, so that every
//! later quiet reading is above it. A quiet reading (nothing in flight, the tracker's count the same before and
//! after) gives it exactly.

use serde::{Deserialize, Serialize};

/// One reading of one class of operations. Counts are sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The tracker's count, read before the kernel's.
    pub tracker_before: u64,
    /// The kernel's count.
    pub kernel: u64,
    /// The tracker's count, read after the kernel's. For bio-based devices: counted at submission.
    pub tracker_after: u64,
    /// Nothing was in flight while the three were read.
    pub quiet: bool,
}

/// What a reading says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// No contradiction.
    Consistent,
    /// The kernel counted so many sectors that the tracker did not see.
    Unseen(u64),
    /// The kernel counts less than the tracker: its statistics are off (`queue/iostats`) or were reset. The check says nothing
    /// until the next quiet reading.
    KernelBehind,
}

/// The offset as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfCheck {
    /// Exact, from a quiet reading.
    exact: Option<i128>,
}

impl SelfCheck {
    /// Takes a reading into account.
    pub fn check(&mut self, reading: &Reading) -> Finding {
        let at_most = i128::from(reading.kernel) - i128::from(reading.tracker_after);
        let quiet = reading.quiet && reading.tracker_before == reading.tracker_after;
        let Some(exact) = self.exact else {
            if quiet {
                self.exact = Some(at_most);
            }
            return Finding::Consistent;
        };
        if at_most > exact {
            // Told once: the disk is suspect from here on, and the offset starts anew.
            self.exact = quiet.then_some(at_most);
            return Finding::Unseen(u64::try_from(at_most - exact).unwrap_or(u64::MAX));
        }
        if quiet && at_most < exact {
            self.exact = Some(at_most);
            return Finding::KernelBehind;
        }
        Finding::Consistent
    }

    /// The offset, if it is known.
    #[must_use]
    pub fn base(&self) -> Option<i128> {
        self.exact
    }

    /// Whether a base has been found: before that, nothing can be told.
    #[must_use]
    pub fn armed(&self) -> bool {
        self.exact.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quiet(tracker: u64, kernel: u64) -> Reading {
        Reading { tracker_before: tracker, kernel, tracker_after: tracker, quiet: true }
    }

    #[test]
    fn a_hidden_write_shows_at_the_next_quiet_reading() {
        let mut check = SelfCheck::default();
        assert_eq!(check.check(&quiet(0, 1000)), Finding::Consistent);
        assert_eq!(check.check(&quiet(80, 1080)), Finding::Consistent);
        assert_eq!(check.check(&quiet(80, 1088)), Finding::Unseen(8));
        assert_eq!(check.check(&quiet(90, 1098)), Finding::Consistent);
    }

    #[test]
    fn statistics_switched_off_are_not_unseen_writes() {
        let mut check = SelfCheck::default();
        check.check(&quiet(0, 1000));
        assert_eq!(check.check(&quiet(16, 1000)), Finding::KernelBehind);
        assert_eq!(check.check(&quiet(16, 1000)), Finding::Consistent);
    }

    proptest! {
        /// Writes are traced, then accounted; readings fall anywhere between. Without a hidden write no reading
        /// contradicts; with one, some reading up to the last quiet one does.
        #[test]
        fn sound_under_interleaving(
            steps in proptest::collection::vec((1u64..64, 0u8..4), 1..200),
            hide in proptest::option::of(0usize..200),
        ) {
            let (mut kernel, mut tracker) = (5000u64, 0u64);
            let mut check = SelfCheck::default();
            check.check(&quiet(tracker, kernel));
            let (mut hidden, mut told) = (false, false);
            for (index, (sectors, when)) in steps.iter().enumerate() {
                let (before, kernel_before) = (tracker, kernel);
                if hide == Some(index) { hidden = true; } else { tracker += sectors; }
                kernel += sectors;
                let reading = match when {
                    0 => Reading { tracker_before: before, kernel: kernel_before, tracker_after: tracker, quiet: false },
                    1 => Reading { tracker_before: before, kernel, tracker_after: tracker, quiet: false },
                    2 => Reading { tracker_before: tracker, kernel: kernel_before, tracker_after: tracker, quiet: false },
                    _ => quiet(tracker, kernel),
                };
                let finding = check.check(&reading);
                prop_assert!(hidden || finding == Finding::Consistent);
                told |= matches!(finding, Finding::Unseen(_));
            }
            told |= matches!(check.check(&quiet(tracker, kernel)), Finding::Unseen(_));
            prop_assert_eq!(hidden, told);
        }
    }
}
