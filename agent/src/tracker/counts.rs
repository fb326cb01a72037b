//! What the programs counted, put together over their copies: for the comparison with the kernel and for the figures.

use super::{Tracker, TrackerError, account::Sample, object::hooks_of, quiet};
use highwater_abi::{Counters, class, hook};
use highwater_delta::DiskId;

/// Figures of one device for status and metrics.
#[derive(Clone, Debug, Default)]
pub struct DeviceFigures {
    /// Greatest counters over the copies; their sum where each event is counted once.
    pub counters: Counters,
    /// Sectors by class that the kernel counted since tracking began; `None`: the device cannot be asked now.
    pub kernel: Option<[u64; class::COUNT]>,
    /// Sectors (within `counters.sectors`) that only the net found.
    pub late: u64,
    /// Misses of each copy of all hooks.
    pub misses: u64,
    /// Whether the comparison with the kernel's counts has a base.
    pub compared: bool,
}

impl Tracker {
    /// Counters and misses, for the comparison. Where each event is counted once, whichever copy was shown it first, that is
    /// one copy that is never skipped.
    pub(super) fn sample(&self, dev: u32) -> Result<Sample, TrackerError> {
        let Some(entry) = self.devices.get(&dev) else { return Ok(Sample::default()) };
        let mut sample = Sample::default();
        for copy in 0..self.object.copies() {
            sample.counters.push(self.object.counters(entry.counter, copy)?);
        }
        for (class, late) in sample.late.iter_mut().enumerate() {
            // Written by the issue program in the first copy's place.
            *late = entry.reaped[class] + sample.counters.first().map_or(0, |c| c.late_sectors[class]);
        }
        if self.counts_once(entry.hook) {
            sample.counters = vec![self.counted(entry.counter, entry.hook)?];
            sample.misses = vec![0];
        } else {
            sample.misses = self.misses_of(dev)?;
        }
        Ok(sample)
    }

    /// Whether the programs know for each event if a copy before was shown it: from the table of bios in flight, or from the net.
    pub(super) fn counts_once(&self, hook: u32) -> bool {
        hook == hook::BIO || self.object.net()
    }

    /// Misses of a device's hooks, one a copy.
    fn misses_of(&self, dev: u32) -> Result<Vec<u64>, TrackerError> {
        let hooks = hooks_of(self.devices.get(&dev).map_or(hook::REQUEST, |d| d.hook));
        let misses = self.object.misses()?;
        let of = |copy: usize| hooks.iter().map(|h| misses[*h].0.get(copy).copied().unwrap_or(0)).sum();
        Ok((0..self.object.copies()).map(of).collect())
    }

    /// The counters of the copy that saw most. Where each event is counted once, its sectors are the sum of what each copy was
    /// shown first. What must not grow is the sum over the copies in any case: whichever saw it, it shows.
    pub(super) fn counted(&self, counter: u32, hook: u32) -> Result<Counters, TrackerError> {
        let (mut most, mut once) = (Counters::default(), [0; class::COUNT]);
        for copy in 0..self.object.copies() {
            let counters = self.object.counters(counter, copy)?;
            let old = most;
            if counters.sectors >= most.sectors {
                most = counters;
            }
            for (class, once) in once.iter_mut().enumerate() {
                *once += counters.first_sectors[class];
                // Written in the first copy's place alone.
                most.late_sectors[class] = old.late_sectors[class].max(counters.late_sectors[class]);
                if hook == hook::REQUEST && self.object.net() {
                    most.events[class] = old.events[class] + counters.events[class];
                }
            }
            most.failed = old.failed.max(counters.failed);
            most.unmarked = old.unmarked + counters.unmarked;
            most.inflight_full = old.inflight_full + counters.inflight_full;
            most.passthrough = old.passthrough + counters.passthrough;
        }
        if self.counts_once(hook) {
            (most.sectors, most.queued_sectors, most.first_sectors) = (once, once, once);
        }
        Ok(most)
    }

    /// Figures of the device that a disk lies on.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn figures(&self, disk: DiskId) -> Result<DeviceFigures, TrackerError> {
        let dev = self.slot(disk)?.record.dev;
        let sample = self.sample(dev)?;
        let mut figures =
            DeviceFigures { misses: self.misses_of(dev)?.iter().sum(), ..DeviceFigures::default() };
        let Some(entry) = self.devices.get(&dev) else { return Ok(figures) };
        figures.compared = entry.account.armed();
        figures.counters = self.counted(entry.counter, entry.hook)?;
        let kernel = quiet::kernel_count(dev, false).map(|count| count.sectors);
        for class in 0..class::COUNT {
            // Tracking can begin while others write to the device: only the base tells exactly what was before.
            if let Some(kernel) = kernel {
                figures.kernel.get_or_insert_default()[class] =
                    match entry.account.since_base(kernel[class], class) {
                        Some(count) => count.saturating_sub(entry.began[1][class]),
                        None => kernel[class].saturating_sub(entry.began[0][class]),
                    };
            }
            let sectors = &mut figures.counters.sectors[class];
            *sectors = (*sectors + sample.late[class]).saturating_sub(entry.began[1][class]);
            figures.late += sample.late[class];
        }
        Ok(figures)
    }
}
