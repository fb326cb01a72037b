//! Which disks are tracked: beginning and ending, and what the programs are told of it.

use super::{
    Fault, Tracker, TrackerError,
    account::Account,
    quiet,
    record::{DeviceRecord, DiskRecord},
    slot::Slot,
};
use crate::device::{BlockDevice, Hook};
use highwater_abi::{BLOCK_SHIFT_SECTORS, RANGES_MAX, Range, SLOTS_MAX, TARGETS_MAX, Target, class, hook};
use highwater_delta::DiskId;

impl Tracker {
    /// Begins to track a disk. From the return on, every change is marked; what was changed before must be read
    /// by the caller ([`Tracker::mark_all`]). Other disks of the same device are not touched. On bio-based devices writes already under way are not seen: the caller waits
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
        let known = self.devices.get(&dev).filter(|known| known.diskseq == device.diskseq).cloned();
        // What is known of a device that other disks lie on holds on: a new base would hide what went unseen since the last.
        let goes_on = known.is_some() && self.intact(dev)?.is_some();
        let mut entry = match known {
            Some(known) => known,
            None => DeviceRecord {
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
            let kernel = quiet::kernel_count(dev, false);
            // A device that cannot be asked is told of by its counts alone.
            entry.began = [kernel.map_or([0; class::COUNT], |count| count.sectors), counted];
        }
        if self.ranges(dev).len() >= RANGES_MAX {
            return Err(TrackerError::TooMany("partitions of one device"));
        }
        let record = DiskRecord { disk, slot, dev, start: device.start_sector, sectors, shift };
        let words = usize::try_from(sectors.div_ceil(1 << shift).div_ceil(64))
            .map_err(|_| TrackerError::TooLarge(sectors))?;
        if !goes_on {
            entry.account = Account::default();
            // What went unseen of the disks that are here already will not show any more.
            let others = self.slots.values().filter(|s| s.record.dev == dev).map(|s| s.record.disk);
            let tampered: Vec<_> = others.map(|disk| (disk, Fault::Tampered)).collect();
            self.faults.extend(tampered);
        }
        let parity = self.epochs.parity(slot);
        let attached = self.object.attach(entry.hook);
        let made = attached.and_then(|()| Slot::create(&self.options.bpf_dir, record, words, parity));
        let made = made.and_then(|made| {
            for parity in [0, 1] {
                self.object.set_bitmap(slot, parity, made.turn(parity).map_data())?;
            }
            self.slots.insert(disk, made);
            self.devices.insert(dev, entry);
            self.set_target(dev)?;
            if !goes_on {
                self.find_base(dev)?;
            }
            self.save()
        });
        if made.is_err() && self.unprotect(disk).is_err() {
            self.detach_unused();
        }
        made
    }

    /// Ends the tracking of a disk and forgets its bits.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`], or the kernel refuses.
    pub fn unprotect(&mut self, disk: DiskId) -> Result<(), TrackerError> {
        let slot = self.slots.remove(&disk).ok_or(TrackerError::Unknown(disk))?;
        self.faults.retain(|(of, _)| *of != disk);
        let dev = slot.record.dev;
        self.set_target(dev)?;
        if self.ranges(dev).is_empty() {
            self.devices.remove(&dev);
        }
        self.detach_unused();
        slot.remove(&self.options.bpf_dir);
        self.save()
    }

    /// A program costs something with every I/O of the machine, whoever's it is.
    fn detach_unused(&self) {
        for hook in [hook::REQUEST, hook::BIO] {
            if self.devices.values().all(|d| d.hook != hook) {
                self.object.detach(hook);
            }
        }
    }

    /// What is tracked, with the device it was found on and its `diskseq`.
    pub fn disks(&self) -> impl Iterator<Item = (&DiskRecord, Option<u64>)> {
        self.slots.values().map(|s| {
            let seq = self.devices.get(&s.record.dev).and_then(|d| d.diskseq);
            (&s.record, seq)
        })
    }

    fn free_counter(&self) -> Result<u32, TrackerError> {
        (0..TARGETS_MAX)
            .find(|c| self.devices.values().all(|d| d.counter != *c))
            .ok_or(TrackerError::TooMany("devices"))
    }

    /// What of a device is tracked.
    pub(super) fn ranges(&self, dev: u32) -> Vec<Range> {
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
}

/// The smallest granule that keeps a disk within `bits_max` bits.
fn granularity(sectors: u64, bits_max: u64) -> u32 {
    let mut shift = BLOCK_SHIFT_SECTORS;
    while sectors.div_ceil(1 << shift) > bits_max.max(1) && shift < 31 {
        shift += 1;
    }
    shift
}
