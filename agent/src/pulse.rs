//! The engine's sign of life, for systemd's watchdog.
//!
//! The engine says, at each piece of work, until when it will be heard of again; the watchdog is fed only while that time has not
//! passed. A promise is kept by progress, not by speed: each run that is read, each chunk that is handed over renews it, and
//! while the session waits for a slow collector, the session renews it in the engine's place, within limits of its own. So
//! neither a slow collector nor a low bandwidth looks like a hang, and an engine that hangs is noticed.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// See the module.
#[derive(Debug)]
pub struct Pulse {
    began: Instant,
    /// Milliseconds after `began` until which the engine is trusted.
    until_ms: AtomicU64,
    step: Duration,
    work: Duration,
}

impl Pulse {
    /// `step`: for what takes no time as a rule. `work`: for one read, one chunk, one freeze.
    #[must_use]
    pub fn new(step: Duration, work: Duration) -> Self {
        let pulse = Self { began: Instant::now(), until_ms: AtomicU64::new(0), step, work };
        pulse.step();
        pulse
    }

    /// A step that ends soon begins.
    pub fn step(&self) {
        self.promise(self.step);
    }

    /// Work that may wait for a disk, a filesystem or the network begins, or has made progress.
    pub fn work(&self) {
        self.promise(self.work);
    }

    /// How long the engine has been silent beyond what it promised; `None` while it keeps its word.
    #[must_use]
    pub fn overdue(&self) -> Option<Duration> {
        let until = Duration::from_millis(self.until_ms.load(Ordering::Relaxed));
        self.began.elapsed().checked_sub(until).filter(|late| !late.is_zero())
    }

    fn promise(&self, within: Duration) {
        let until = (self.began.elapsed() + within).as_millis();
        self.until_ms.store(u64::try_from(until).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_trusted_until_it_is_broken_and_renewed() {
        let pulse = Pulse::new(Duration::from_millis(50), Duration::from_secs(3600));
        assert_eq!(pulse.overdue(), None);
        std::thread::sleep(Duration::from_millis(80));
        assert!(pulse.overdue().is_some_and(|late| late < Duration::from_secs(60)));
        pulse.work();
        std::thread::sleep(Duration::from_millis(80));
        assert_eq!(pulse.overdue(), None);
        // Work that has ended is not trusted any longer than a step.
        pulse.step();
        std::thread::sleep(Duration::from_millis(80));
        assert!(pulse.overdue().is_some());
    }
}
