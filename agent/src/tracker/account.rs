//! The tracker's count of sectors, put together from the counts of the copies, and held against the kernel's (pure).
//!
//! A copy that was skipped counts too little from then on. So the value is taken from a copy that has missed nothing since
//! the counts were last aligned; they are aligned anew at each quiet reading.

use super::selfcheck::{Finding, Reading, SelfCheck};
use highwater_abi::{Counters, class, hook};
use serde::{Deserialize, Serialize};

/// Counters and misses of all copies for one device, read together.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// One a copy.
    pub counters: Vec<Counters>,
    /// Misses of the device's hooks, one a copy (bio-based: both hooks added).
    pub misses: Vec<u64>,
    /// Sectors that no copy was shown and the net found, by class.
    pub late: [u64; class::COUNT],
}

/// The kernel's side, from `/sys/dev/block/…`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelCount {
    /// Sectors by class.
    pub sectors: [u64; class::COUNT],
    /// Nothing was in flight.
    pub idle: bool,
}

/// What is remembered of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    aligned_misses: Vec<u64>,
    corrections: Vec<[u64; class::COUNT]>,
    checks: [SelfCheck; class::COUNT],
    faults: Faults,
    /// The kernel was once found to count less than the tracker: it does not count everything of this device.
    behind: bool,
}

/// Counters that must not grow; the sum over the copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// See [`Counters::unmarked`].
    pub unmarked: u64,
    /// See [`Counters::inflight_full`].
    pub inflight_full: u64,
    /// See [`Counters::passthrough`].
    pub passthrough: u64,
}

/// Why the bitmaps of a device are not to be trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Every copy of a program was skipped in one epoch.
    SkippedEvents,
    /// The kernel counted this many sectors that the tracker did not see.
    UnseenSectors(u64),
    /// Changes whose place could not be marked.
    Unmarked(u64),
    /// More writes were in flight than the table holds.
    InflightFull(u64),
    /// Passthrough commands may have changed the device.
    Passthrough(u64),
    /// The kernel's map of targets or bitmaps is not what the agent left: someone else changed it.
    Tampered,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::SkippedEvents => {
                f.write_str("the kernel skipped events of every copy of the tracking programs")
            }
            Self::UnseenSectors(n) => {
                write!(f, "the kernel counts {n} written sectors that the tracker did not see")
            }
            Self::Unmarked(n) => write!(f, "changes could not be marked in the bitmap (tried {n} times)"),
            Self::InflightFull(n) => {
                write!(f, "writes were not followed: too many were in flight (refused {n} times)")
            }
            Self::Passthrough(n) => {
                write!(
                    f,
                    "passthrough commands may have changed the device unseen (shown to the programs {n} times)"
                )
            }
            Self::Tampered => f.write_str("tracking was changed or switched off by someone else"),
        }
    }
}

impl Account {
    /// How many sectors the kernel counted that neither a copy nor the net has seen so far, by class; only at a quiet
    /// moment and with a base.
    #[must_use]
    pub fn unexplained(
        &self,
        hook: u32,
        before: &Sample,
        kernel: &KernelCount,
        after: &Sample,
    ) -> Option<[u64; class::COUNT]> {
        if !quiet(before, kernel, after) {
            return None;
        }
        let witness = self.witness(after)?;
        let mut unexplained = [0; class::COUNT];
        for (class, unexplained) in unexplained.iter_mut().enumerate() {
            let offset =
                i128::from(kernel.sectors[class]) - i128::from(self.value(hook, witness, after, class));
            *unexplained = u64::try_from(offset - self.checks[class].base()?).unwrap_or(0);
        }
        Some(unexplained)
    }

    /// Takes two samples with the kernel's count read between them; answers what is wrong, if anything. With a net, what
    /// no copy was shown may still be found: then only quiet moments count.
    pub fn check(
        &mut self,
        hook: u32,
        before: &Sample,
        kernel: &KernelCount,
        after: &Sample,
        net: bool,
    ) -> Option<Fault> {
        if let Some(fault) = self.check_faults(after) {
            return Some(fault);
        }
        let quiet = quiet(before, kernel, after);
        if self.witness(after).is_none() {
            // No copy is clean since the last alignment: start anew at the next quiet moment.
            self.checks = <[SelfCheck; class::COUNT]>::default();
            if quiet {
                self.align(hook, after, None);
            }
        }
        let witness = self.witness(after)?;
        if net && !quiet {
            return None;
        }
        let mut found = None;
        for class in 0..class::COUNT {
            let reading = Reading {
                tracker_before: self.value(hook, witness, before, class),
                kernel: kernel.sectors[class],
                tracker_after: self.value(hook, witness, after, class),
                quiet,
            };
            match self.checks[class].check(&reading) {
                Finding::Unseen(sectors) => found = Some(Fault::UnseenSectors(sectors)),
                Finding::KernelBehind => self.behind = true,
                Finding::Consistent => {}
            }
        }
        if quiet {
            self.align(hook, after, Some(witness));
        }
        found
    }

    /// What the kernel's count of a class would be had it begun when the tracker's did; `None` without a base.
    #[must_use]
    pub fn since_base(&self, kernel_sectors: u64, class: usize) -> Option<u64> {
        let base = self.checks.get(class)?.base()?;
        u64::try_from(i128::from(kernel_sectors) - base).ok()
    }

    /// Whether the comparison with the kernel has found its base.
    #[must_use]
    pub fn armed(&self) -> bool {
        self.checks.iter().all(SelfCheck::armed)
    }

    /// Whether an agreement with the kernel's counts means that everything was seen: there is a base, and the kernel counts
    /// all that the tracker does.
    #[must_use]
    pub fn proves(&self) -> bool {
        self.armed() && !self.behind
    }

    fn check_faults(&mut self, sample: &Sample) -> Option<Fault> {
        // Not the greatest: what only one copy was shown would not show beneath another's.
        let sum = |f: fn(&Counters) -> u64| sample.counters.iter().map(f).sum();
        let now = Faults {
            unmarked: sum(|c| c.unmarked),
            inflight_full: sum(|c| c.inflight_full),
            passthrough: sum(|c| c.passthrough),
        };
        let old = std::mem::replace(&mut self.faults, now);
        if now.unmarked > old.unmarked {
            Some(Fault::Unmarked(now.unmarked - old.unmarked))
        } else if now.inflight_full > old.inflight_full {
            Some(Fault::InflightFull(now.inflight_full - old.inflight_full))
        } else if now.passthrough > old.passthrough {
            Some(Fault::Passthrough(now.passthrough - old.passthrough))
        } else {
            None
        }
    }

    fn witness(&self, sample: &Sample) -> Option<usize> {
        (0..sample.misses.len().min(self.corrections.len()))
            .find(|i| self.aligned_misses.get(*i) == Some(&sample.misses[*i]))
    }

    fn value(&self, hook: u32, witness: usize, sample: &Sample, class: usize) -> u64 {
        count(hook, &sample.counters[witness], class) + self.corrections[witness][class] + sample.late[class]
    }

    fn align(&mut self, hook: u32, sample: &Sample, witness: Option<usize>) {
        // Without a witness any common value will do: the checks start anew from it.
        let mut value = [0; class::COUNT];
        for (class, value) in value.iter_mut().enumerate() {
            *value = match witness {
                Some(w) => count(hook, &sample.counters[w], class) + self.corrections[w][class],
                None => sample.counters.iter().map(|c| count(hook, c, class)).max().unwrap_or(0),
            };
        }
        self.corrections = sample
            .counters
            .iter()
            .map(|c| std::array::from_fn(|class| value[class].saturating_sub(count(hook, c, class))))
            .collect();
        self.aligned_misses.clone_from(&sample.misses);
    }
}

/// What is compared: completions of request-based devices, submissions of bio-based ones (whose kernel count can run ahead of
/// the completion's tracepoint).
fn count(hook: u32, counters: &Counters, class: usize) -> u64 {
    if hook == hook::BIO { counters.queued_sectors[class] } else { counters.sectors[class] }
}

/// Nothing was in flight, and nothing was counted, while the kernel's count was read.
#[must_use]
pub fn quiet(before: &Sample, kernel: &KernelCount, after: &Sample) -> bool {
    kernel.idle && before.counters == after.counters && before.misses == after.misses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(sectors: &[u64], misses: &[u64]) -> Sample {
        Sample {
            counters: sectors.iter().map(|s| Counters { sectors: [*s, 0], ..Counters::default() }).collect(),
            misses: misses.to_vec(),
            late: [0; class::COUNT],
        }
    }
    fn idle(sectors: u64) -> KernelCount {
        KernelCount { sectors: [sectors, 0], idle: true }
    }

    #[test]
    fn a_skipped_copy_does_not_make_the_disk_suspect() {
        let mut account = Account::default();
        let s = sample(&[0, 0, 0], &[0, 0, 0]);
        assert_eq!(account.check(hook::REQUEST, &s, &idle(100), &s, false), None);
        assert_eq!(account.check(hook::REQUEST, &s, &idle(100), &s, false), None);
        assert!(account.armed());
        // Copy 0 misses 8 sectors; the others saw 80.
        let s = sample(&[72, 80, 80], &[1, 0, 0]);
        assert_eq!(account.check(hook::REQUEST, &s, &idle(180), &s, false), None);
        // Later copy 1 and 2 miss too, copy 0 is clean since the alignment.
        let s = sample(&[92, 90, 92], &[1, 1, 1]);
        assert_eq!(account.check(hook::REQUEST, &s, &idle(200), &s, false), None);
    }

    #[test]
    fn a_write_that_no_copy_saw_does() {
        let mut account = Account::default();
        let s = sample(&[0, 0], &[0, 0]);
        account.check(hook::REQUEST, &s, &idle(100), &s, false);
        account.check(hook::REQUEST, &s, &idle(100), &s, false);
        assert_eq!(account.check(hook::REQUEST, &s, &idle(108), &s, false), Some(Fault::UnseenSectors(8)));
    }

    #[test]
    fn a_kernel_that_counts_less_proves_nothing() {
        let mut account = Account::default();
        let s = sample(&[0], &[0]);
        assert!(!account.proves());
        account.check(hook::REQUEST, &s, &idle(100), &s, true);
        assert!(account.proves());
        // A discard that the driver does not account.
        let s = sample(&[8], &[0]);
        assert_eq!(account.check(hook::REQUEST, &s, &idle(100), &s, true), None);
        assert!(!account.proves());
    }

    #[test]
    fn faults_are_told_once() {
        let mut account = Account::default();
        let mut s = sample(&[0], &[0]);
        account.check(hook::REQUEST, &s, &idle(0), &s, false);
        s.counters[0].passthrough = 2;
        assert_eq!(account.check(hook::REQUEST, &s, &idle(0), &s, false), Some(Fault::Passthrough(2)));
        assert_eq!(account.check(hook::REQUEST, &s, &idle(0), &s, false), None);
    }
}
