//! Block devices: what a path stands for, by what a disk is known again, and what cannot be protected.
//!
//! A device is read from `/sys`, never guessed from its name. [`inspect`] accepts any path (device node, `by-id` link, LV,
//! partition, loop); [`StableIdentity`] outlives reboots and renames, and [`find`] brings it back to a device;
//! [`admit()`] names what tracking cannot see. Nothing here writes, and nothing waits for a device's I/O except the one
//! read of a partition table or an md superblock that identities need.

mod admit;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod identity;
mod node;
mod stat;
mod superblock;
pub mod sysfs;

pub use admit::admit;
pub use identity::{StableIdentity, find};
pub use stat::{DiskStat, inflight, iostats_on, stat};

use crate::error::Coded;
use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// A device number as user space writes it.
pub type DevNumber = (u32, u32);

/// Through which tracepoints a device's writes are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// `block_rq_complete`: the device has a request queue.
    Request,
    /// `block_bio_queue` and `block_bio_complete`: bios go to the driver directly.
    Bio,
}

/// A block device as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// A device node that opens it.
    pub path: PathBuf,
    /// Its device number.
    pub dev: DevNumber,
    /// Its device number as the kernel has it: `major << 20 | minor`.
    pub kernel_dev: u32,
    /// Its size.
    pub size_bytes: u64,
    /// The smallest unit the device reads; 512 or 4096.
    pub logical_block_bytes: u32,
    /// The whole disk it is, or is a partition of.
    pub whole: DevNumber,
    /// Where it starts on the whole disk; 0 if it is the whole.
    pub start_sector: u64,
    /// Grows with each new disk that takes a device number; the whole disk's.
    pub diskseq: Option<u64>,
    /// How its writes are seen.
    pub hook: Hook,
    /// The kernel's name (`sda1`), or the name of a device-mapper device (`vg0-data`).
    pub name: String,
    /// Whether the kernel refuses writes to it.
    pub read_only: bool,
}

impl BlockDevice {
    /// The whole disk's number as the kernel has it.
    #[must_use]
    pub fn whole_kernel_dev(&self) -> u32 {
        kernel_dev(self.whole)
    }
    /// Whether the device of its number is still this one, where it was and as large.
    #[must_use]
    pub fn is_still(&self) -> bool {
        describe(self.dev, PathBuf::new()).is_ok_and(|now| {
            (now.diskseq, now.size_bytes, now.start_sector, now.whole)
                == (self.diskseq, self.size_bytes, self.start_sector, self.whole)
        })
    }
    /// Whether it is a partition.
    #[must_use]
    pub fn is_partition(&self) -> bool {
        self.dev != self.whole
    }
    /// Its size in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.size_bytes / 512
    }
}

/// `major << 20 | minor`: the kernel's own encoding, which differs from the one of `stat(2)`.
#[must_use]
pub const fn kernel_dev(dev: DevNumber) -> u32 {
    dev.0 << 20 | dev.1
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The path cannot be looked at.
    #[error("cannot open {path}")]
    Path {
        /// What was given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else than a block device.
    #[error("{0} is not a block device")]
    NotABlockDevice(PathBuf),
    /// No medium, or a loop device without a file.
    #[error("{0} has size 0")]
    Empty(PathBuf),
    /// `/sys` does not tell what is needed.
    #[error("cannot read {attribute} of device {major}:{minor} in /sys")]
    Sysfs {
        /// Its number.
        major: u32,
        /// Its number.
        minor: u32,
        /// What was asked for.
        attribute: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Tracking cannot see all of its writes.
    #[error("{path} cannot be protected: {reason}")]
    Unsupported {
        /// The device.
        path: PathBuf,
        /// Why.
        reason: &'static str,
        /// What to do instead.
        action: &'static str,
    },
    /// Nothing to know it again by.
    #[error("{0} has nothing stable to be known by: no serial number, WWN, UUID or backing file")]
    NoIdentity(PathBuf),
    /// Two devices claim one identity.
    #[error("{first} and {second} have the same identity ({identity})")]
    Ambiguous {
        /// One.
        first: PathBuf,
        /// Another.
        second: PathBuf,
        /// What both say of themselves.
        identity: String,
    },
    /// There is a device, and no node in `/dev` for it.
    #[error("device {major}:{minor} ({name}) has no node in /dev")]
    NoNode {
        /// Its number.
        major: u32,
        /// Its number.
        minor: u32,
        /// The kernel's name.
        name: String,
    },
}

impl Coded for DeviceError {
    fn code(&self) -> u16 {
        match self {
            Self::Path { .. } => 1405,
            Self::NotABlockDevice(_) => 1406,
            Self::Empty(_) => 1407,
            Self::Sysfs { .. } => 1408,
            Self::Unsupported { .. } => 1409,
            Self::NoIdentity(_) => 1410,
            Self::Ambiguous { .. } => 1411,
            Self::NoNode { .. } => 1412,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::Path { .. } => "Check the path; `lsblk` lists the block devices.".into(),
            Self::NotABlockDevice(_) => "Name a disk, partition, logical volume or loop device.".into(),
            Self::Empty(_) => "Attach the medium or the backing file first.".into(),
            Self::Sysfs { .. } => "Check that /sys is mounted and that the device is still there.".into(),
            Self::Unsupported { action, .. } => (*action).into(),
            Self::NoIdentity(_) => {
                "Give the virtual disk a serial number in its hypervisor, or protect its partitions.".into()
            }
            Self::Ambiguous { .. } => {
                "Detach one of them: a clone or a second path must not be taken for the disk.".into()
            }
            Self::NoNode { name, .. } => format!("Run `udevadm trigger`, or create /dev/{name} with mknod."),
        }
    }
}

/// The device behind a path, links followed.
///
/// # Errors
/// Not a block device, size 0, or `/sys` has no account of it.
pub fn inspect(path: &Path) -> Result<BlockDevice, DeviceError> {
    let real = fs::canonicalize(path).map_err(|source| DeviceError::Path { path: path.into(), source })?;
    let meta = fs::metadata(&real).map_err(|source| DeviceError::Path { path: path.into(), source })?;
    if !meta.file_type().is_block_device() {
        return Err(DeviceError::NotABlockDevice(path.into()));
    }
    let device = describe(sysfs::split(meta.rdev()), real)?;
    if device.size_bytes == 0 {
        return Err(DeviceError::Empty(path.into()));
    }
    Ok(device)
}

/// The device with this number.
///
/// # Errors
/// As [`inspect`]; also if there is no node in `/dev` that opens it.
pub fn inspect_number(dev: DevNumber) -> Result<BlockDevice, DeviceError> {
    let path = node::find(dev)?;
    let device = describe(dev, path)?;
    if device.size_bytes == 0 {
        return Err(DeviceError::Empty(device.path));
    }
    Ok(device)
}

fn describe(dev: DevNumber, path: PathBuf) -> Result<BlockDevice, DeviceError> {
    let fail = |attribute: &str, source| DeviceError::Sysfs {
        major: dev.0,
        minor: dev.1,
        attribute: attribute.into(),
        source,
    };
    let dir = sysfs::dir(dev).map_err(|e| fail("its directory", e))?;
    let whole_dir = sysfs::whole_dir(&dir).map_err(|e| fail("partition", e))?;
    let whole = sysfs::number(&whole_dir).map_err(|e| fail("dev", e))?;
    let sectors = sysfs::read_u64(&dir, "size").map_err(|e| fail("size", e))?;
    let logical = sysfs::read_u64(&whole_dir, "queue/logical_block_size").map_err(|e| fail("queue", e))?;
    let start_sector =
        if dev == whole { 0 } else { sysfs::read_u64(&dir, "start").map_err(|e| fail("start", e))? };
    let by_request = sysfs::has(&whole_dir, "mq").map_err(|e| fail("mq", e))?;
    let diskseq = sysfs::asked(sysfs::read_u64(&whole_dir, "diskseq")).map_err(|e| fail("diskseq", e))?;
    Ok(BlockDevice {
        path,
        dev,
        kernel_dev: kernel_dev(dev),
        size_bytes: sectors.saturating_mul(512),
        logical_block_bytes: u32::try_from(logical).unwrap_or(u32::MAX),
        whole,
        start_sector,
        diskseq,
        hook: if by_request { Hook::Request } else { Hook::Bio },
        name: sysfs::read(&dir, "dm/name").unwrap_or_else(|_| sysfs::name(&dir)),
        read_only: sysfs::read_u64(&dir, "ro").unwrap_or(0) != 0,
    })
}
