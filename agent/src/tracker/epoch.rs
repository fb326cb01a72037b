//! The end of an epoch: the programs are sent to the other bitmap, what they marked becomes pending, and the epoch is
//! proved or doubted.
//!
//! The order: a look at each device (`Look`), the turn of all bitmaps, one barrier, what was marked, then the counts. The
//! one barrier serves both the bitmaps (no program writes the old one after it) and the counts (see `quiet`).

use super::{
    Fault, Tracker, TrackerError,
    account::Sample,
    object::{Noted, hooks_of},
    proof::Verdict,
    quiet,
    record::Hauled,
    used,
};
use highwater_abi::{Issued, class, hook};
use highwater_delta::DiskId;
use std::time::Instant;

/// What the end of an epoch found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochEnd {
    /// Disks whose bits can't be trusted. Told again at each end until [`Tracker::faults_noted`], also to the next life of
    /// the agent.
    pub faults: Vec<(DiskId, Fault)>,
    /// Disks with something in flight: a completion that was not shown may be found only later. A state read after this
    /// epoch is no point of them.
    pub unsettled: Vec<DiskId>,
}

/// A look at a device before the barrier.
pub(super) struct Look {
    dev: u32,
    taken_ns: u64,
    rested: bool,
    before: Sample,
}

/// What the comparison of a device's counts with the kernel's found.
#[derive(Debug, Default)]
pub(super) struct Checked {
    pub fault: Option<Fault>,
    /// Nothing was in flight that could still be found.
    settled: bool,
    /// The counts agree at a quiet moment with a base from an earlier one: everything in between was seen, whichever copies
    /// were skipped.
    pub exact: bool,
}

impl Checked {
    fn fault(fault: Fault) -> Self {
        Self { fault: Some(fault), settled: true, exact: false }
    }
}

/// What is done around the one barrier of an epoch's end by whoever needs one at the same moment.
pub trait Beside {
    /// Before the programs are sent to the other bitmaps.
    fn before(&mut self) {}
    /// After the barrier that outlasts every program that was running then.
    fn after(&mut self) {}
}

impl Beside for () {}

impl Tracker {
    /// Ends the epoch of every disk at once. Bits found are in pending afterwards, and told to `each` (disk, index of the
    /// 64-bit word, bits). Answers which can't be trusted.
    ///
    /// # Errors
    /// The kernel refused something: no bit and no fault is lost, the epoch is to be ended again.
    pub fn end_epoch(&mut self, each: impl FnMut(DiskId, usize, u64)) -> Result<EpochEnd, TrackerError> {
        self.end_epoch_beside(each, &mut ())
    }

    /// The same, with something beside it.
    ///
    /// # Errors
    /// As [`Tracker::end_epoch`]; whether `beside` was called is open then.
    pub fn end_epoch_beside(
        &mut self,
        mut each: impl FnMut(DiskId, usize, u64),
        beside: &mut dyn Beside,
    ) -> Result<EpochEnd, TrackerError> {
        let began = Instant::now();
        if self.spares_full {
            self.barrier.wait()?;
            self.empty_spares(&mut each);
        }
        beside.before();
        let before = self.object.misses()?;
        let looks: Vec<Look> =
            self.devices.keys().map(|dev| self.look(*dev)).collect::<Result<_, TrackerError>>()?;
        self.spares_full = true;
        for slot in self.slots.values_mut() {
            slot.parity ^= 1;
            self.epochs.set(slot.record.slot, slot.parity);
        }
        self.barrier.wait()?;
        beside.after();
        let turned_us = began.elapsed().as_micros();
        let after = self.object.misses()?;
        let proved: Vec<bool> = (self.provers.iter_mut().zip(before).zip(&after))
            .map(|((prover, before), after)| matches!(prover.end(before, after), Verdict::Proved(_)))
            .collect();
        self.empty_spares(&mut each);
        // First of all devices: the windows of the proof have moved on, and what follows can fail.
        for device in self.devices.values_mut() {
            device.unproved |= hooks_of(device.hook).iter().any(|h| proved.get(*h) != Some(&true));
        }
        let mut unsettled = vec![];
        for look in looks {
            let dev = look.dev;
            let (fault, settled) = self.verdict(look, &mut each)?;
            let disks = || self.slots.values().filter(|s| s.record.dev == dev).map(|s| s.record.disk);
            if !settled {
                unsettled.extend(disks());
            }
            if let Some(fault) = fault {
                self.faults.extend(disks().map(|disk| (disk, fault.clone())));
            }
        }
        self.save()?;
        let total_us = began.elapsed().as_micros();
        tracing::debug!(total_us, turned_us, "epoch ended");
        Ok(EpochEnd { faults: self.faults.clone(), unsettled })
    }

    /// The faults that were told are written down elsewhere; they need not be told again.
    ///
    /// # Errors
    /// [`TrackerError::Record`]: the next life will tell them again, which does no harm.
    pub fn faults_noted(&mut self) -> Result<(), TrackerError> {
        if self.faults.is_empty() {
            return Ok(());
        }
        self.faults.clear();
        self.save()
    }

    /// Moves what the bitmaps of the epoch before hold to pending. After a barrier.
    pub(super) fn empty_spares(&mut self, each: &mut impl FnMut(DiskId, usize, u64)) {
        for slot in self.slots.values() {
            slot.empty_spare(|index, bits| each(slot.record.disk, index, bits));
        }
        self.spares_full = false;
    }

    /// To be followed by the barrier, and [`Tracker::compare`].
    pub(super) fn look(&self, dev: u32) -> Result<Look, TrackerError> {
        let before = self.sample(dev)?;
        Ok(Look { dev, taken_ns: quiet::monotonic_ns(), rested: quiet::at_rest(dev), before })
    }

    /// Whether a device's epoch can be trusted. Where every copy was skipped at some time, that is no loss yet: each event may
    /// have been shown to another copy. The counts tell, at the next quiet moment; until then the device is unsettled.
    fn verdict(
        &mut self,
        look: Look,
        each: &mut impl FnMut(DiskId, usize, u64),
    ) -> Result<(Option<Fault>, bool), TrackerError> {
        let dev = look.dev;
        let proves = self.devices.get(&dev).is_some_and(|d| self.counts_once(d.hook) && d.account.proves());
        if let Some(device) = self.devices.get_mut(&dev).filter(|d| d.unproved && !proves) {
            device.unproved = false;
            return Ok((Some(Fault::SkippedEvents), true));
        }
        let checked = self.compare(look, each)?;
        let Some(device) = self.devices.get_mut(&dev) else { return Ok((checked.fault, checked.settled)) };
        if device.unproved && checked.fault.is_none() && !checked.exact && !device.account.proves() {
            // The kernel turned out not to count everything: it cannot speak for what is unproved.
            device.unproved = false;
            return Ok((Some(Fault::SkippedEvents), true));
        }
        device.unproved &= checked.fault.is_none() && !checked.exact;
        Ok((checked.fault, checked.settled && !device.unproved))
    }

    /// Compares the counts of a device for the first time: they find their base here, if the device is at rest.
    pub(super) fn find_base(&mut self, dev: u32) -> Result<(), TrackerError> {
        let look = self.look(dev)?;
        self.barrier.wait()?;
        self.compare(look, &mut |_, _, _| ()).map(drop)
    }

    /// Compares the counts of a device with the kernel's, and empties the net.
    pub(super) fn compare(
        &mut self,
        look: Look,
        each: &mut impl FnMut(DiskId, usize, u64),
    ) -> Result<Checked, TrackerError> {
        let Look { dev, taken_ns, rested, mut before } = look;
        let bio = match self.intact(dev)? {
            Some(hook) => hook == hook::BIO,
            None => return Ok(Checked::fault(Fault::Tampered)),
        };
        let net = bio || self.object.net();
        let Some(kernel) = quiet::kernel_count(dev, rested) else {
            return Ok(Checked { fault: None, settled: !net, exact: false });
        };
        let notes = if net && kernel.idle { self.haul(dev, bio, taken_ns, each)? } else { vec![] };
        // After the net: a request that was used again meanwhile was counted by its issue, and shows here.
        let mut after = self.sample(dev)?;
        let quiet = super::account::quiet(&before, &kernel, &after);
        // What was counted in between hides how much of the net's was: the notes stay until a quiet moment tells. What is
        // compared of a bio-based device is counted at submission, which the net has seen by definition.
        if quiet && !bio {
            let Some(entry) = self.devices.get_mut(&dev) else { return Ok(Checked::default()) };
            let mut left =
                entry.account.unexplained(entry.hook, &before, &kernel, &after).unwrap_or_default();
            for (noted, note) in notes {
                let class = (note.class as usize).min(class::COUNT - 1);
                // The net holds also what ended without being counted; marking that was harmless, counting it would not be.
                let sectors = left[class].min(note.bytes >> 9);
                left[class] -= sectors;
                entry.reaped[class] += sectors;
                before.late[class] += sectors;
                after.late[class] += sectors;
                self.hauled.push(Hauled { noted, dev, class, sectors });
            }
        }
        let Some(entry) = self.devices.get_mut(&dev) else { return Ok(Checked::default()) };
        let proves = entry.account.proves();
        let fault = entry.account.check(entry.hook, &before, &kernel, &after, net && !bio);
        let exact = proves && entry.account.proves() && quiet;
        Ok(Checked { fault, settled: !net || kernel.idle, exact })
    }

    /// The hook of a device that is tracked as this tracker left it; `None` if someone else changed or detached something.
    pub(super) fn intact(&self, dev: u32) -> Result<Option<u32>, TrackerError> {
        let Some(target) = self.object.target(dev)? else { return Ok(None) };
        if target.ranges[..used(&target)] != self.ranges(dev)[..] || !self.object.attached(target.hook) {
            return Ok(None);
        }
        for slot in self.slots.values().filter(|s| s.record.dev == dev) {
            let number = slot.record.slot;
            if self.epochs.parity(number) != slot.parity {
                return Ok(None);
            }
            for parity in [0, 1] {
                if self.object.bitmap_id(number, parity)? != Some(slot.turn(parity).id()) {
                    return Ok(None);
                }
            }
        }
        Ok(Some(target.hook))
    }

    /// Marks what the net holds of a device that is at rest: changes whose completion no program was shown. Answers the notes
    /// that are not counted yet.
    fn haul(
        &mut self,
        dev: u32,
        bio: bool,
        until_ns: u64,
        each: &mut impl FnMut(DiskId, usize, u64),
    ) -> Result<Vec<(Noted, Issued)>, TrackerError> {
        let mut notes = self.object.unseen(dev, bio, until_ns)?;
        for (_, note) in &notes {
            for slot in self.slots.values().filter(|s| s.record.dev == dev) {
                let mut tell = |index, bits| each(slot.record.disk, index, bits);
                // Of a request with several ranges the note has only the first: which were discarded nobody knows any more.
                let (from, count) =
                    if note.scattered == 0 { (note.sector, note.bytes >> 9) } else { (0, u64::MAX) };
                slot.mark_sectors(from, count, &mut tell);
            }
        }
        notes.retain(|(noted, _)| self.hauled.iter().all(|hauled| hauled.noted != *noted));
        Ok(notes)
    }
}
