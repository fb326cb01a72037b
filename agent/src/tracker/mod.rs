//! Dirty tracking: which blocks of the protected disks changed (invariants I2 and I4).
//!
//! For each disk three bitmaps are pinned in the BPF filesystem: two that the kernel's programs write in turn, and
//! *pending*: every bit whose block is not yet known to be stored. [`Tracker::end_epoch`] replaces the current bitmap,
//! waits until nobody writes the old one, and moves its bits to pending; only [`Tracker::stored`] clears them there.
//! A crash at any moment leaves each bit in at least one of the three; [`Tracker::open`] moves whatever lies in the bitmap
//! that is not current to pending, so nothing is lost between two lives of the agent, and the programs go on without one.
//!
//! An epoch is proved by a copy of the programs that was never skipped, or, where each event is counted once whichever copy
//! was shown it, by counts that agree with the kernel's at a quiet moment; until then the device is *unsettled*. An epoch
//! that can't be proved, or whose counts contradict the kernel's, is reported as a [`Fault`]: the bits may be incomplete, and
//! the disk is suspect.
//!
//! Limits: [`SLOTS_MAX`] disks, [`TARGETS_MAX`] devices, [`RANGES_MAX`] disks on one device; three bits a granule.

pub mod account;
pub mod barrier;
pub mod bitmap;
pub mod btf;
mod error;
pub mod object;
pub mod probe;
pub mod proof;
mod quiet;
pub mod record;
pub mod selfcheck;

pub use account::Fault;
pub use error::TrackerError;

use crate::device::{BlockDevice, Hook};
use account::{Account, Sample, quiet};
use barrier::Barrier;
use bitmap::Bitmap;
use highwater_abi::{
    ABI_VERSION, BLOCK_SHIFT_SECTORS, Counters, RANGES_MAX, Range, SLOTS_MAX, TARGETS_MAX, Target, class,
    hook,
};
use highwater_delta::DiskId;
use object::Object;
use probe::Kernel;
use proof::{Prover, Verdict};
use quiet::kernel_count;
use record::{DeviceRecord, DiskRecord, Record, boot_id};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Instant,
};

/// Where the tracker keeps itself, and its limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// A directory of the BPF filesystem that is the agent's alone.
    pub bpf_dir: PathBuf,
    /// A directory in memory (`/run/highwater`).
    pub run_dir: PathBuf,
    /// Copies of each program; `None`: what the kernel needs.
    pub copies: Option<usize>,
    /// Whether issues are noted as a net beneath the completion programs.
    pub net: bool,
    /// Most bits of one bitmap: beyond that the granularity grows.
    pub bits_max: u64,
}

/// How tracking began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The programs were running already, and nothing was missed in between.
    TakenOver,
    /// They were loaded anew, for this reason: whatever was protected before is suspect.
    Fresh(String),
}

/// One disk's bitmaps.
struct Slot {
    record: DiskRecord,
    current: Bitmap,
    spare: Bitmap,
    pending: Bitmap,
}

/// The tracker of this machine. One owner; calls block for as long as the kernel takes (tens of milliseconds for an epoch).
pub struct Tracker {
    options: Options,
    object: Object,
    barrier: Option<Barrier>,
    provers: Vec<Prover>,
    devices: BTreeMap<u32, DeviceRecord>,
    slots: BTreeMap<DiskId, Slot>,
}

/// What the end of an epoch found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochEnd {
    /// Disks whose bits can't be trusted.
    pub faults: Vec<(DiskId, Fault)>,
    /// Disks with something in flight: a completion that was not shown may be found only later. A state read after this
    /// epoch is no point of them.
    pub unsettled: Vec<DiskId>,
}

/// What the comparison of a device's counts with the kernel's found.
#[derive(Debug, Default)]
struct Checked {
    fault: Option<Fault>,
    /// Nothing was in flight that could still be found.
    settled: bool,
    /// The counts agree at a quiet moment with a base from an earlier one: everything in between was seen, whichever copies
    /// were skipped.
    exact: bool,
}

impl Checked {
    fn fault(fault: Fault) -> Self {
        Self { fault: Some(fault), settled: true, exact: false }
    }
}

/// Figures of one device for status and metrics.
#[derive(Clone, Debug, Default)]
pub struct DeviceFigures {
    /// Greatest counters over the copies.
    pub counters: Counters,
    /// Sectors by class that the kernel counted since tracking began.
    pub kernel: [u64; class::COUNT],
    /// Sectors (within `counters.sectors`) that only the net found.
    pub late: u64,
    /// Misses of each copy of all hooks.
    pub misses: u64,
    /// Whether the comparison with the kernel's counts has a base.
    pub compared: bool,
}

impl Tracker {
    /// Takes over what is running, or loads it anew.
    ///
    /// # Errors
    /// What the kernel lacks or refuses.
    pub fn open(options: Options) -> Result<(Self, Origin), TrackerError> {
        let kernel = Kernel::probe()?;
        let barrier = if kernel.preemptible_tracepoints { Some(Barrier::new()?) } else { None };
        let why = match Self::take_over(&options) {
            Ok((object, record)) => match Self::resume(&options, object, barrier, record) {
                Ok(tracker) => return Ok((tracker, Origin::TakenOver)),
                Err((back, why)) => return Self::fresh(options, &kernel, back, why),
            },
            Err(why) => why,
        };
        Self::fresh(options, &kernel, barrier, why)
    }

    fn fresh(
        options: Options,
        kernel: &Kernel,
        barrier: Option<Barrier>,
        why: String,
    ) -> Result<(Self, Origin), TrackerError> {
        let record = record_path(&options);
        let _ = fs::remove_file(&record);
        fs::create_dir_all(&options.run_dir)
            .map_err(|cause| TrackerError::Record { path: options.run_dir.clone(), cause })?;
        let object = Object::load(
            &options.bpf_dir,
            kernel,
            options.copies.unwrap_or(kernel.copies_needed()),
            options.net,
        )?;
        let provers = object.misses()?.into_iter().map(Prover::new).collect();
        let tracker =
            Self { options, object, barrier, provers, devices: BTreeMap::new(), slots: BTreeMap::new() };
        tracker.save()?;
        Ok((tracker, Origin::Fresh(why)))
    }

    fn take_over(options: &Options) -> Result<(Object, Record), String> {
        let record = Record::load(&record_path(options)).ok_or("no tracking was recorded on this boot")?;
        if record.abi != ABI_VERSION {
            return Err(format!(
                "the running programs are of layout {}, this agent's of {ABI_VERSION}",
                record.abi
            ));
        }
        if record.boot_id != boot_id() {
            return Err("the machine was rebooted".into());
        }
        let object = Object::open(&options.bpf_dir).map_err(|e| e.to_string())?;
        Ok((object, record))
    }

    fn resume(
        options: &Options,
        object: Object,
        barrier: Option<Barrier>,
        record: Record,
    ) -> Result<Self, (Option<Barrier>, String)> {
        let mut tracker = Self {
            options: options.clone(),
            object,
            barrier,
            provers: record.provers,
            devices: record.devices.into_iter().map(|d| (d.dev, d)).collect(),
            slots: BTreeMap::new(),
        };
        for disk in record.disks {
            match tracker.reopen(disk) {
                Ok(slot) => {
                    tracker.slots.insert(slot.record.disk, slot);
                }
                Err(error) => return Err((tracker.barrier, error.to_string())),
            }
        }
        Ok(tracker)
    }

    fn reopen(&self, record: DiskRecord) -> Result<Slot, TrackerError> {
        let open = |which| Bitmap::open(&object::bits_path(&self.options.bpf_dir, record.slot, which));
        let (a, b, pending) = (open("a")?, open("b")?, open("pending")?);
        let target = self.object.target(record.dev)?;
        let id = self.object.bitmap_id(record.slot)?;
        let tracked = target.is_some_and(|t| t.ranges[..used(&t)].iter().any(|r| r.slot == record.slot));
        if !tracked || (id != Some(a.id()) && id != Some(b.id())) {
            return Err(TrackerError::Unsupported(format!("running tracking of disk {}", record.disk)));
        }
        let (current, spare) = if id == Some(a.id()) { (a, b) } else { (b, a) };
        // The life before ended between replacing a bitmap and emptying it.
        union(&spare, &pending, |_, _| ());
        Ok(Slot { record, current, spare, pending })
    }

    /// Begins to track a disk. From the return on, every change is marked; what was changed before must be read
    /// by the caller ([`Tracker::mark_all`]). On bio-based devices writes already under way are not seen: the caller waits
    /// for them before it reads.
    ///
    /// # Errors
    /// Limits reached, or the kernel refuses; nothing is tracked then.
    pub fn protect(&mut self, disk: DiskId, device: &BlockDevice) -> Result<(), TrackerError> {
        if self.slots.contains_key(&disk) {
            self.unprotect(disk)?;
        }
        let dev = device.whole_kernel_dev();
        let sectors = device.sectors();
        let shift = granularity(sectors, self.options.bits_max);
        let slot = (0..SLOTS_MAX)
            .find(|s| self.slots.values().all(|slot| slot.record.slot != *s))
            .ok_or(TrackerError::TooMany("disks"))?;
        let mut entry = match self.devices.get(&dev) {
            Some(known) if known.diskseq == device.diskseq => known.clone(),
            _ => DeviceRecord {
                dev,
                hook: if device.hook == Hook::Bio { hook::BIO } else { hook::REQUEST },
                counter: self.free_counter()?,
                diskseq: device.diskseq,
                account: Account::default(),
                reaped: [0; class::COUNT],
                unproved: false,
                began: Default::default(),
            },
        };
        if !self.devices.contains_key(&dev) {
            // A counter may have served another device before.
            let counted = self.counted(entry.counter, entry.hook)?;
            let counted = std::array::from_fn(|class| counted.sectors[class] + counted.late_sectors[class]);
            entry.began = [kernel_count(dev, false).unwrap_or_default().sectors, counted];
        }
        if self.ranges(dev).len() >= RANGES_MAX {
            return Err(TrackerError::TooMany("partitions of one device"));
        }
        let record = DiskRecord { disk, slot, dev, start: device.start_sector, sectors, shift };
        let words = usize::try_from(sectors.div_ceil(1 << shift).div_ceil(64))
            .map_err(|_| TrackerError::TooLarge(sectors))?;
        let create = |which| {
            let path = object::bits_path(&self.options.bpf_dir, slot, which);
            let _ = fs::remove_file(&path);
            Bitmap::create(words, &path)
        };
        let (current, spare, pending) = (create("a")?, create("b")?, create("pending")?);
        self.object.set_bitmap(slot, current.map_data())?;
        self.slots.insert(disk, Slot { record, current, spare, pending });
        entry.account = Account::default();
        self.devices.insert(dev, entry);
        // The comparison with the kernel finds its base here, if the device is at rest.
        let result =
            self.set_target(dev).and_then(|()| self.check(dev, &mut |_, _, _| ())).and_then(|_| self.save());
        if result.is_err() {
            let _ = self.unprotect(disk);
        }
        result
    }

    /// Ends the tracking of a disk and forgets its bits.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`], or the kernel refuses.
    pub fn unprotect(&mut self, disk: DiskId) -> Result<(), TrackerError> {
        let slot = self.slots.remove(&disk).ok_or(TrackerError::Unknown(disk))?;
        let dev = slot.record.dev;
        self.set_target(dev)?;
        if self.ranges(dev).is_empty() {
            self.devices.remove(&dev);
        }
        for which in ["a", "b", "pending"] {
            let _ = fs::remove_file(object::bits_path(&self.options.bpf_dir, slot.record.slot, which));
        }
        self.save()
    }

    /// Ends the epoch of every disk at once. Bits found are in pending afterwards, and told to `each` (disk, index of the
    /// 64-bit word, bits). Answers which can't be trusted.
    ///
    /// # Errors
    /// The kernel refused something: no bit is lost, the epoch is to be ended again.
    pub fn end_epoch(&mut self, mut each: impl FnMut(DiskId, usize, u64)) -> Result<EpochEnd, TrackerError> {
        let began = Instant::now();
        let before = self.object.misses()?;
        for slot in self.slots.values_mut() {
            self.object.set_bitmap(slot.record.slot, slot.spare.map_data())?;
            std::mem::swap(&mut slot.current, &mut slot.spare);
        }
        if let Some(barrier) = &self.barrier {
            barrier.wait()?;
        }
        let replaced_us = began.elapsed().as_micros();
        let after = self.object.misses()?;
        let proved: Vec<bool> = (self.provers.iter_mut().zip(before).zip(&after))
            .map(|((prover, before), after)| matches!(prover.end(before, after), Verdict::Proved(_)))
            .collect();
        for slot in self.slots.values() {
            union(&slot.spare, &slot.pending, |index, bits| each(slot.record.disk, index, bits));
        }
        let mut end = EpochEnd::default();
        let devices: Vec<u32> = self.devices.keys().copied().collect();
        for dev in devices {
            let proved = self.hooks_of(dev).iter().all(|h| proved.get(*h) == Some(&true));
            let (fault, settled) = self.verdict(dev, proved, &mut each)?;
            let disks = || self.slots.values().filter(|s| s.record.dev == dev).map(|s| s.record.disk);
            if !settled {
                end.unsettled.extend(disks());
            }
            if let Some(fault) = fault {
                end.faults.extend(disks().map(|disk| (disk, fault.clone())));
            }
        }
        let checked_us = began.elapsed().as_micros() - replaced_us;
        self.save()?;
        let total_us = began.elapsed().as_micros();
        tracing::debug!(total_us, replaced_us, checked_us, "epoch ended");
        Ok(end)
    }

    /// Whether a device's epoch can be trusted. Where every copy was skipped at some time, that is no loss yet: each event may
    /// have been shown to another copy. The counts tell, at the next quiet moment; until then the device is unsettled.
    fn verdict(
        &mut self,
        dev: u32,
        proved: bool,
        each: &mut impl FnMut(DiskId, usize, u64),
    ) -> Result<(Option<Fault>, bool), TrackerError> {
        let counts_tell = |device: &DeviceRecord| self.counts_once(device.hook) && device.account.proves();
        if !proved && !self.devices.get(&dev).is_some_and(counts_tell) {
            return Ok((Some(Fault::SkippedEvents), true));
        }
        let checked = self.check(dev, each)?;
        let Some(device) = self.devices.get_mut(&dev) else { return Ok((checked.fault, checked.settled)) };
        device.unproved |= !proved;
        if device.unproved && checked.fault.is_none() && !checked.exact && !device.account.proves() {
            // The kernel turned out not to count everything: it cannot speak for what is unproved.
            device.unproved = false;
            return Ok((Some(Fault::SkippedEvents), true));
        }
        device.unproved &= checked.fault.is_none() && !checked.exact;
        Ok((checked.fault, checked.settled && !device.unproved))
    }

    /// Compares the counts of a device with the kernel's, and empties the net.
    fn check(
        &mut self,
        dev: u32,
        each: &mut impl FnMut(DiskId, usize, u64),
    ) -> Result<Checked, TrackerError> {
        let Some(target) = self.object.target(dev)? else { return Ok(Checked::fault(Fault::Tampered)) };
        if target.ranges[..used(&target)] != self.ranges(dev)[..] {
            return Ok(Checked::fault(Fault::Tampered));
        }
        for slot in self.slots.values().filter(|s| s.record.dev == dev) {
            if self.object.bitmap_id(slot.record.slot)? != Some(slot.current.id()) {
                return Ok(Checked::fault(Fault::Tampered));
            }
        }
        let bio = target.hook == hook::BIO;
        let net = bio || self.object.net();
        let mut before = self.sample(dev)?;
        let now_ns = quiet::monotonic_ns();
        let Some(kernel) = kernel_count(dev, true) else {
            return Ok(Checked { fault: None, settled: !net, exact: false });
        };
        let mut after = self.sample(dev)?;
        if net && kernel.idle {
            let Some(entry) = self.devices.get(&dev) else { return Ok(Checked::default()) };
            let unexplained = entry.account.unexplained(entry.hook, &before, &kernel, &after);
            let found = self.haul(dev, bio, now_ns, each)?;
            // The net holds also what ended without being counted; marking that was harmless, counting it would not be.
            let Some(entry) = self.devices.get_mut(&dev) else { return Ok(Checked::default()) };
            for class in 0..class::COUNT {
                // What is compared of a bio-based device is counted at submission, which the net has seen by definition.
                let sectors = if bio { 0 } else { unexplained.map_or(0, |u| u[class].min(found[class])) };
                entry.reaped[class] += sectors;
                before.late[class] += sectors;
                after.late[class] += sectors;
            }
        }
        let Some(entry) = self.devices.get_mut(&dev) else { return Ok(Checked::default()) };
        let proves = entry.account.proves();
        let fault = entry.account.check(entry.hook, &before, &kernel, &after, net && !bio);
        let exact = proves && entry.account.proves() && quiet(&before, &kernel, &after);
        Ok(Checked { fault, settled: !net || kernel.idle, exact })
    }

    /// Marks what the net holds of a device that is at rest: changes whose completion no program was shown. Answers their
    /// sectors by class.
    fn haul(
        &mut self,
        dev: u32,
        bio: bool,
        until_ns: u64,
        each: &mut impl FnMut(DiskId, usize, u64),
    ) -> Result<[u64; class::COUNT], TrackerError> {
        let mut sectors = [0; class::COUNT];
        for note in self.object.reap(dev, bio, until_ns)? {
            let count = note.bytes >> 9;
            sectors[(note.class as usize).min(class::COUNT - 1)] += count;
            for slot in self.slots.values().filter(|s| s.record.dev == dev) {
                let (start, end) = (slot.record.start, slot.record.start + slot.record.sectors);
                let (from, to) = (note.sector.max(start), (note.sector + count).min(end));
                if from < to {
                    let granules =
                        (from - start) >> slot.record.shift..=(to - 1 - start) >> slot.record.shift;
                    for granule in granules {
                        let (index, bit) = ((granule / 64) as usize, 1u64 << (granule % 64));
                        slot.pending.words()[index].fetch_or(bit, Ordering::AcqRel);
                        each(slot.record.disk, index, bit);
                    }
                }
            }
        }
        Ok(sectors)
    }

    /// Counters and misses, for the comparison. Where each event is counted once, whichever copy was shown it first, that is
    /// one copy that is never skipped.
    fn sample(&self, dev: u32) -> Result<Sample, TrackerError> {
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
    fn counts_once(&self, hook: u32) -> bool {
        hook == hook::BIO || self.object.net()
    }

    /// Misses of a device's hooks, one a copy.
    fn misses_of(&self, dev: u32) -> Result<Vec<u64>, TrackerError> {
        let (misses, hooks) = (self.object.misses()?, self.hooks_of(dev));
        let of = |copy: usize| hooks.iter().map(|h| misses[*h].0.get(copy).copied().unwrap_or(0)).sum();
        Ok((0..self.object.copies()).map(of).collect())
    }

    /// Marks every granule of a disk as pending: nothing of it is known to be stored.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn mark_all(&self, disk: DiskId) -> Result<(), TrackerError> {
        let slot = self.slot(disk)?;
        let granules = slot.record.sectors.div_ceil(1 << slot.record.shift);
        for (index, word) in slot.pending.words().iter().enumerate() {
            let left = granules.saturating_sub(index as u64 * 64);
            let bits = if left >= 64 { !0 } else { (1u64 << left) - 1 };
            word.fetch_or(bits, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Marks granules as pending, as if they had been written.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn mark(&self, disk: DiskId, words: &[u64]) -> Result<(), TrackerError> {
        for (word, bits) in self.slot(disk)?.pending.words().iter().zip(words) {
            word.fetch_or(*bits, Ordering::AcqRel);
        }
        Ok(())
    }

    /// The pending words of a disk, as they are now.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn pending(&self, disk: DiskId) -> Result<Vec<u64>, TrackerError> {
        Ok(self.slot(disk)?.pending.words().iter().map(|w| w.load(Ordering::Acquire)).collect())
    }

    /// Forgets granules: they are stored. `words` holds the bits to clear; the caller leaves out what was marked again
    /// since it was read.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn stored(&self, disk: DiskId, words: &[u64]) -> Result<(), TrackerError> {
        for (word, bits) in self.slot(disk)?.pending.words().iter().zip(words) {
            if *bits != 0 {
                word.fetch_and(!bits, Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// Sectors per bit of a disk, as a shift above the 4 KiB block.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn blocks_shift(&self, disk: DiskId) -> Result<u32, TrackerError> {
        Ok(self.slot(disk)?.record.shift - BLOCK_SHIFT_SECTORS)
    }

    /// What is tracked, with the device it was found on and its `diskseq`.
    pub fn disks(&self) -> impl Iterator<Item = (&DiskRecord, Option<u64>)> {
        self.slots.values().map(|s| {
            let seq = self.devices.get(&s.record.dev).and_then(|d| d.diskseq);
            (&s.record, seq)
        })
    }

    /// Bits set in a disk's current bitmap: what will have to be sent next.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn dirty_now(&self, disk: DiskId) -> Result<u64, TrackerError> {
        Ok(self.slot(disk)?.current.count())
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
        if let Some(entry) = self.devices.get(&dev) {
            figures.compared = entry.account.armed();
            figures.counters = self.counted(entry.counter, entry.hook)?;
            let kernel = kernel_count(dev, false).unwrap_or_default().sectors;
            for (class, kernel) in kernel.into_iter().enumerate() {
                // Tracking can begin while others write to the device: only the base tells exactly what was before.
                figures.kernel[class] = match entry.account.since_base(kernel, class) {
                    Some(count) => count.saturating_sub(entry.began[1][class]),
                    None => kernel.saturating_sub(entry.began[0][class]),
                };
                let sectors = &mut figures.counters.sectors[class];
                *sectors = (*sectors + sample.late[class]).saturating_sub(entry.began[1][class]);
                figures.late += sample.late[class];
            }
        }
        Ok(figures)
    }

    /// The counters of the copy that saw most; the sectors of all copies together where each event is counted once.
    fn counted(&self, counter: u32, hook: u32) -> Result<Counters, TrackerError> {
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
            }
            most.unmarked = old.unmarked.max(counters.unmarked);
            most.inflight_full = old.inflight_full.max(counters.inflight_full);
            most.passthrough = old.passthrough.max(counters.passthrough);
        }
        if self.counts_once(hook) {
            (most.sectors, most.queued_sectors, most.first_sectors) = (once, once, once);
        }
        Ok(most)
    }

    /// How many copies of each program run.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.object.copies()
    }

    /// Detaches everything and removes all pins and records: nothing is tracked any more.
    ///
    /// # Errors
    /// The pins could not be removed.
    pub fn detach(self) -> Result<(), TrackerError> {
        let _ = fs::remove_file(record_path(&self.options));
        object::remove(&self.options.bpf_dir)
    }

    fn slot(&self, disk: DiskId) -> Result<&Slot, TrackerError> {
        self.slots.get(&disk).ok_or(TrackerError::Unknown(disk))
    }

    fn free_counter(&self) -> Result<u32, TrackerError> {
        (0..TARGETS_MAX)
            .find(|c| self.devices.values().all(|d| d.counter != *c))
            .ok_or(TrackerError::TooMany("devices"))
    }

    fn ranges(&self, dev: u32) -> Vec<Range> {
        (self.slots.values().filter(|s| s.record.dev == dev))
            .map(|s| Range {
                start: s.record.start,
                end: s.record.start + s.record.sectors,
                slot: s.record.slot,
                shift: s.record.shift,
            })
            .collect()
    }

    fn set_target(&mut self, dev: u32) -> Result<(), TrackerError> {
        let ranges = self.ranges(dev);
        let Some(entry) = self.devices.get(&dev).filter(|_| !ranges.is_empty()) else {
            return self.object.remove_target(dev);
        };
        let mut target = Target {
            hook: entry.hook,
            counter: entry.counter,
            ranges_used: ranges.len() as u32,
            ..Target::default()
        };
        target.ranges[..ranges.len()].copy_from_slice(&ranges);
        self.object.set_target(dev, &target)
    }

    fn hooks_of(&self, dev: u32) -> &'static [usize] {
        let bio = self.devices.get(&dev).is_some_and(|d| d.hook == hook::BIO);
        if bio { &[1, 2] } else { &[0] }
    }

    fn save(&self) -> Result<(), TrackerError> {
        let record = Record {
            abi: ABI_VERSION,
            boot_id: boot_id(),
            provers: self.provers.clone(),
            devices: self.devices.values().cloned().collect(),
            disks: self.slots.values().map(|s| s.record.clone()).collect(),
        };
        record.save(&record_path(&self.options))
    }
}

fn record_path(options: &Options) -> PathBuf {
    options.run_dir.join("tracker.json")
}

/// Removes whatever a dead agent left pinned and recorded, without taking it over.
///
/// # Errors
/// The pins could not be removed.
pub fn detach_all(bpf_dir: &Path, run_dir: &Path) -> Result<(), TrackerError> {
    let _ = fs::remove_file(run_dir.join("tracker.json"));
    object::remove(bpf_dir)
}

fn used(target: &Target) -> usize {
    (target.ranges_used as usize).min(RANGES_MAX)
}

fn union(from: &Bitmap, into: &Bitmap, mut each: impl FnMut(usize, u64)) {
    let words = into.words();
    from.drain(|index, bits| {
        words[index].fetch_or(bits, Ordering::AcqRel);
        each(index, bits);
    });
}

/// The smallest granule that keeps a disk within `bits_max` bits.
fn granularity(sectors: u64, bits_max: u64) -> u32 {
    let mut shift = BLOCK_SHIFT_SECTORS;
    while sectors.div_ceil(1 << shift) > bits_max.max(1) && shift < 31 {
        shift += 1;
    }
    shift
}

#[cfg(test)]
mod tests;
