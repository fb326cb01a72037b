//! Dirty tracking: which blocks of the protected disks changed (invariants I2 and I4).
//!
//! For each disk three bitmaps are pinned in the BPF filesystem: two that the kernel's programs write in turn, and
//! *pending*: every bit whose block is not yet known to be stored. [`Tracker::end_epoch`] sends the programs to the other
//! bitmap, waits until nobody writes the old one, and moves its bits to pending; only [`Tracker::stored`] clears them there.
//! A crash at any moment leaves each bit in at least one of the three; [`Tracker::open`] moves whatever lies in the bitmap
//! that is not current to pending, so nothing is lost between two lives of the agent, and the programs go on without one.
//!
//! An epoch is proved by a copy of the programs that was never skipped, or, where each event is counted once whichever copy
//! was shown it, by counts that agree with the kernel's at a quiet moment; until then the device is *unsettled*. An epoch
//! that can't be proved, or whose counts contradict the kernel's, is reported as a [`Fault`]: the bits may be incomplete, and
//! the disk is suspect.
//!
//! The programs of request-based and of bio-based devices are attached only while such a device is tracked.
//!
//! Limits: [`SLOTS_MAX`](highwater_abi::SLOTS_MAX) disks, [`TARGETS_MAX`](highwater_abi::TARGETS_MAX) devices,
//! [`RANGES_MAX`] disks on one device; three bits a granule.

pub mod account;
pub mod barrier;
pub mod bitmap;
pub(crate) mod bpf;
pub mod btf;
mod counts;
mod disks;
mod epoch;
mod error;
pub mod object;
mod pending;
pub mod probe;
pub mod proof;
pub(crate) mod quiet;
pub mod record;
pub mod selfcheck;
mod slot;

pub use account::Fault;
pub use counts::DeviceFigures;
pub use epoch::{Beside, EpochEnd};
pub use error::TrackerError;

use barrier::Barrier;
use highwater_abi::{ABI_VERSION, RANGES_MAX, Target, class};
use highwater_delta::DiskId;
use object::Object;
use probe::Kernel;
use proof::Prover;
use record::{DeviceRecord, DiskRecord, Hauled, Record, boot_id};
use slot::{Epochs, Slot};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
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

/// The tracker of this machine. One owner; calls block for as long as the kernel takes (tens of milliseconds for an epoch).
pub struct Tracker {
    options: Options,
    object: Object,
    epochs: Epochs,
    barrier: Barrier,
    provers: Vec<Prover>,
    devices: BTreeMap<u32, DeviceRecord>,
    slots: BTreeMap<DiskId, Slot>,
    /// Found, and not yet noted by the caller.
    faults: Vec<(DiskId, Fault)>,
    /// The bitmaps of the epoch before still hold bits, and programs may still write them.
    spares_full: bool,
    /// Notes of the net that are marked and counted. They are taken away once that is recorded: a life that ended in between
    /// would leave a change that nobody counted. Until then they count for nothing else.
    hauled: Vec<Hauled>,
}

impl Tracker {
    /// Takes over what is running, or loads it anew.
    ///
    /// # Errors
    /// What the kernel lacks or refuses.
    pub fn open(options: Options) -> Result<(Self, Origin), TrackerError> {
        let kernel = Kernel::probe()?;
        match Self::take_over(&options, &kernel) {
            Ok(tracker) => Ok((tracker, Origin::TakenOver)),
            Err(why) => Ok((Self::fresh(options, &kernel)?, Origin::Fresh(why))),
        }
    }

    fn fresh(options: Options, kernel: &Kernel) -> Result<Self, TrackerError> {
        let _ = fs::remove_file(record_path(&options));
        fs::create_dir_all(&options.run_dir)
            .map_err(|cause| TrackerError::Record { path: options.run_dir.clone(), cause })?;
        let copies = options.copies.unwrap_or(kernel.copies_needed());
        let object = Object::load(&options.bpf_dir, kernel, copies, options.net)?;
        let mut tracker = Self {
            epochs: Epochs::open(&object.epochs_path())?,
            barrier: Barrier::new(kernel.preemptible_tracepoints)?,
            provers: object.misses()?.into_iter().map(Prover::new).collect(),
            object,
            options,
            devices: BTreeMap::new(),
            slots: BTreeMap::new(),
            faults: vec![],
            spares_full: false,
            hauled: vec![],
        };
        tracker.save()?;
        Ok(tracker)
    }

    /// Takes over what is running, or says why it can't be.
    fn take_over(options: &Options, kernel: &Kernel) -> Result<Self, String> {
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
        Self::resume(options, kernel, record).map_err(|e| e.to_string())
    }

    fn resume(options: &Options, kernel: &Kernel, record: Record) -> Result<Self, TrackerError> {
        let object = Object::open(&options.bpf_dir)?;
        let mut tracker = Self {
            options: options.clone(),
            epochs: Epochs::open(&object.epochs_path())?,
            barrier: Barrier::new(kernel.preemptible_tracepoints)?,
            object,
            provers: record.provers,
            devices: record.devices.into_iter().map(|d| (d.dev, d)).collect(),
            slots: BTreeMap::new(),
            faults: record.faults,
            spares_full: true,
            hauled: record.hauled,
        };
        for disk in record.disks {
            let slot = tracker.reopen(disk)?;
            tracker.slots.insert(slot.record.disk, slot);
        }
        // The life before may have ended between sending the programs to the other bitmap and emptying the one before.
        tracker.barrier.wait()?;
        tracker.empty_spares(&mut |_, _, _| ());
        // Where another note is in the place of one that the life before had counted, it can't be told who counted it: its count
        // is given up, which may end in a false alarm. The other way an alarm could be lost.
        tracker.save()?;
        Ok(tracker)
    }

    fn reopen(&self, record: DiskRecord) -> Result<Slot, TrackerError> {
        let (number, disk) = (record.slot, record.disk);
        let slot = Slot::open(&self.options.bpf_dir, record, self.epochs.parity(number))?;
        let target = self.object.target(slot.record.dev)?;
        let tracked = target.is_some_and(|t| {
            t.ranges[..used(&t)].iter().any(|r| r.slot == number) && self.object.attached(t.hook)
        });
        for parity in [0, 1] {
            if !tracked || self.object.bitmap_id(number, parity)? != Some(slot.turn(parity).id()) {
                return Err(TrackerError::Unsupported(format!("running tracking of disk {disk}")));
            }
        }
        Ok(slot)
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
        detach_all(&self.options.bpf_dir, &self.options.run_dir)
    }

    /// Changes of a bio-based device that were submitted before `until_ns` (CLOCK_MONOTONIC), and not seen to complete.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`], or the kernel refuses.
    pub fn submitted_between(
        &self,
        disk: DiskId,
        from_ns: u64,
        until_ns: u64,
    ) -> Result<usize, TrackerError> {
        self.object.unseen_bios(self.slot(disk)?.record.dev, from_ns..until_ns)
    }

    fn slot(&self, disk: DiskId) -> Result<&Slot, TrackerError> {
        self.slots.get(&disk).ok_or(TrackerError::Unknown(disk))
    }

    /// Records how things stand, and takes away what was hauled.
    fn save(&mut self) -> Result<(), TrackerError> {
        self.write()?;
        if self.hauled.is_empty() {
            return Ok(());
        }
        self.forget_hauled()?;
        self.write()
    }

    /// What was used again in the meantime has been counted by the issue program too: once is enough.
    fn forget_hauled(&mut self) -> Result<(), TrackerError> {
        while let Some(hauled) = self.hauled.last() {
            let forgotten = self.object.forget(&hauled.noted)?;
            if let Some(device) = self.devices.get_mut(&hauled.dev).filter(|_| !forgotten) {
                let reaped = &mut device.reaped[hauled.class.min(class::COUNT - 1)];
                *reaped = reaped.saturating_sub(hauled.sectors);
            }
            self.hauled.pop();
        }
        Ok(())
    }

    fn write(&self) -> Result<(), TrackerError> {
        let record = Record {
            abi: ABI_VERSION,
            boot_id: boot_id(),
            provers: self.provers.clone(),
            devices: self.devices.values().cloned().collect(),
            disks: self.slots.values().map(|s| s.record.clone()).collect(),
            faults: self.faults.clone(),
            hauled: self.hauled.clone(),
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

#[cfg(test)]
mod tests;
