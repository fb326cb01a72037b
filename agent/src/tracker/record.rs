//! The tracker's record: what is tracked, kept in the run directory (a tmpfs) beside the pinned programs and with the same
//! life: both are gone after a reboot. A record without pins, pins without a record, or a record of another boot or layout
//! mean that tracking was off, and the disks are suspect.
//!
//! Written by rename, so a crash leaves the old or the new one. A record that is older than the pins only makes the
//! proof's window longer and the comparison's base older: both err on the safe side.

use super::{
    TrackerError,
    account::{Account, Fault},
    object::Noted,
    proof::Prover,
};
use highwater_abi::class;
use highwater_delta::DiskId;
use serde::{Deserialize, Serialize};
use std::{fs, io, path::Path};

/// One tracked disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its identity.
    pub disk: DiskId,
    /// Key of its bitmap.
    pub slot: u32,
    /// `dev_t` of the whole device, kernel encoding.
    pub dev: u32,
    /// First sector on the whole device.
    pub start: u64,
    /// Its sectors.
    pub sectors: u64,
    /// Sectors per bit, as a shift.
    pub shift: u32,
}

/// One tracked whole device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its `dev_t`, kernel encoding.
    pub dev: u32,
    /// One of `highwater_abi::hook`.
    pub hook: u32,
    /// Its element of the counters.
    pub counter: u32,
    /// Tells a device from a later one with the same number; absent where the kernel has none.
    pub diskseq: Option<u64>,
    /// Comparison with the kernel's counts.
    pub account: Account,
    /// Sectors by class that only the net found, when nothing was in flight.
    pub reaped: [u64; class::COUNT],
    /// Every copy was skipped at some time since the counts last agreed.
    pub unproved: bool,
    /// The kernel's and the tracker's sectors by class when tracking began: figures are told from here on.
    pub began: [[u64; class::COUNT]; 2],
}

/// A note of the net that is marked and counted, and is to be taken away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hauled {
    /// Which.
    pub noted: Noted,
    /// The device, one of `highwater_abi::class`, and the sectors that were counted for it.
    pub dev: u32,
    /// See `dev`.
    pub class: usize,
    /// See `dev`.
    pub sectors: u64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `highwater_abi::ABI_VERSION`.
    pub abi: u32,
    /// The boot it belongs to.
    pub boot_id: String,
    /// One a hook.
    pub provers: Vec<Prover>,
    /// Tracked devices.
    pub devices: Vec<DeviceRecord>,
    /// Tracked disks.
    pub disks: Vec<DiskRecord>,
    /// Faults that were found and that nobody has noted yet. They lie here because the counts are compared from a new base
    /// once a fault was found: it is not found twice.
    pub faults: Vec<(DiskId, Fault)>,
    /// Counted, and perhaps still in the net: only in a record whose writer died before the next one.
    #[serde(default)]
    pub hauled: Vec<Hauled>,
}

impl Record {
    /// Reads it; `None` if there is none or it cannot be understood.
    #[must_use]
    pub fn load(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes it. Not synced: it lies in memory.
    ///
    /// # Errors
    /// [`TrackerError::Record`].
    pub fn save(&self, path: &Path) -> Result<(), TrackerError> {
        let fail = |cause: io::Error| TrackerError::Record { path: path.to_owned(), cause };
        let bytes = serde_json::to_vec(self).map_err(|e| fail(e.into()))?;
        let next = path.with_extension("new");
        fs::write(&next, bytes).map_err(fail)?;
        fs::rename(&next, path).map_err(fail)
    }
}

/// The running boot's id.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
