//! By what a disk is known again after a reboot, a rename or a re-attachment.
//!
//! The strongest property a device has is taken. What `/dev/sdX` number it got is never part of it. A partition is known by its
//! UUID; without one, by its place on a parent that is itself known.

use super::{BlockDevice, DevNumber, DeviceError, inspect_number, superblock, sysfs};
use serde::{Deserialize, Serialize};
use std::{
    fmt, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

/// What a disk is known by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum StableIdentity {
    /// World-wide name (SCSI, NVMe).
    Wwn {
        /// As the device gives it.
        wwn: String,
    },
    /// Serial number and model (virtio, USB, eMMC).
    Serial {
        /// The serial number.
        serial: String,
        /// The model, empty if it has none.
        model: String,
    },
    /// A device-mapper device: `LVM-…`, `CRYPT-…`.
    DeviceMapper {
        /// Its UUID in device-mapper.
        uuid: String,
    },
    /// An md array.
    Md {
        /// Its set's UUID.
        uuid: String,
    },
    /// A loop device: the file behind it.
    Loop {
        /// The file's path when it was attached.
        path: PathBuf,
        /// Its inode: another file at the same path is another disk.
        inode: u64,
        /// Where the device starts in the file.
        offset_bytes: u64,
    },
    /// A RAM disk. Its content does not outlive a reboot.
    Ram {
        /// The kernel's name.
        name: String,
    },
    /// A partition with a UUID (GPT; or MBR signature and number).
    PartitionUuid {
        /// In lower case.
        uuid: String,
        /// The disk it is on, if that is known by anything: two clones of one disk have equal partition UUIDs.
        parent: Option<Box<StableIdentity>>,
    },
    /// A partition without a UUID.
    PartitionPlace {
        /// Its number.
        number: u64,
        /// Where it starts on its disk.
        start_sector: u64,
        /// The disk it is on.
        parent: Box<StableIdentity>,
    },
    /// A virtual disk without any of these: the slot it is plugged into.
    Bus {
        /// The device's path in `/sys`.
        path: String,
    },
}

impl StableIdentity {
    /// What this device will be known by.
    ///
    /// # Errors
    /// It has nothing stable, or it vanished.
    pub fn of(device: &BlockDevice) -> Result<Self, DeviceError> {
        let identity = read(device.dev).map_err(|source| unasked(device.dev, source))?;
        identity.ok_or_else(|| DeviceError::NoIdentity(device.path.clone()))
    }

    /// Whether it names a place rather than the disk in it; operators are told.
    #[must_use]
    pub fn is_weak(&self) -> bool {
        match self {
            Self::Bus { .. } | Self::Ram { .. } => true,
            Self::PartitionPlace { parent, .. } => parent.is_weak(),
            _ => false,
        }
    }
}

impl fmt::Display for StableIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wwn { wwn } => write!(f, "wwn {wwn}"),
            Self::Serial { serial, model } if model.is_empty() => write!(f, "serial {serial}"),
            Self::Serial { serial, model } => write!(f, "serial {serial} ({model})"),
            Self::DeviceMapper { uuid } => write!(f, "device-mapper {uuid}"),
            Self::Md { uuid } => write!(f, "md {uuid}"),
            Self::Loop { path, inode, .. } => write!(f, "file {} (inode {inode})", path.display()),
            Self::Ram { name } => write!(f, "RAM disk {name}"),
            Self::PartitionUuid { uuid, .. } => write!(f, "partition {uuid}"),
            Self::PartitionPlace { number, parent, .. } => write!(f, "partition {number} of {parent}"),
            Self::Bus { path } => write!(f, "slot {path}"),
        }
    }
}

/// The device that has this identity now; `None` if there is none at present.
///
/// # Errors
/// Two devices have it, or the one that has it cannot be opened by any node; or it could not be found out, which is no `None`.
pub fn find(identity: &StableIdentity) -> Result<Option<BlockDevice>, DeviceError> {
    let all = sysfs::all().map_err(|source| DeviceError::Path { path: "/sys/class/block".into(), source })?;
    let mut found: Option<BlockDevice> = None;
    for (dev, dir) in all {
        let is = |dir: &Path| Ok(plausible(identity, dir)? && read(dev)?.as_ref() == Some(identity));
        if !is(&dir).map_err(|source| unasked(dev, source))? {
            continue;
        }
        let device = match inspect_number(dev) {
            Ok(device) => device,
            // Without medium, or gone since the listing: not there.
            Err(DeviceError::Empty(_)) => continue,
            Err(DeviceError::Sysfs { source, .. }) => match sysfs::asked::<()>(Err(source)) {
                Ok(_) => continue,
                Err(source) => return Err(unasked(dev, source)),
            },
            Err(error) => return Err(error),
        };
        if let Some(first) = found {
            return Err(DeviceError::Ambiguous {
                first: first.path,
                second: device.path,
                identity: identity.to_string(),
            });
        }
        found = Some(device);
    }
    Ok(found)
}

fn unasked((major, minor): DevNumber, source: io::Error) -> DeviceError {
    DeviceError::Sysfs { major, minor, attribute: "what it is known by".into(), source }
}

/// Spares reading partition tables of disks that cannot be meant.
fn plausible(identity: &StableIdentity, dir: &Path) -> io::Result<bool> {
    let partition = sysfs::has(dir, "partition")?;
    Ok(match identity {
        StableIdentity::PartitionUuid { .. } => partition,
        StableIdentity::PartitionPlace { start_sector, .. } => {
            partition && sysfs::asked(sysfs::read_u64(dir, "start"))? == Some(*start_sector)
        }
        // Asking a loop device for more would open it.
        StableIdentity::Loop { path, .. } => backing_file(dir)?.as_ref() == Some(path),
        _ => !partition,
    })
}

fn read(dev: DevNumber) -> io::Result<Option<StableIdentity>> {
    let Some(dir) = sysfs::asked(sysfs::dir(dev))? else { return Ok(None) };
    if sysfs::has(&dir, "partition")? { partition(&dir) } else { whole(dev, &dir) }
}

fn partition(dir: &Path) -> io::Result<Option<StableIdentity>> {
    let whole_dir = sysfs::whole_dir(dir)?;
    let Some(whole_dev) = sysfs::asked(sysfs::number(&whole_dir))? else { return Ok(None) };
    let parent = whole(whole_dev, &whole_dir)?;
    let number = sysfs::asked(sysfs::read_u64(dir, "partition"))?;
    let start = sysfs::asked(sysfs::read_u64(dir, "start"))?;
    let (Some(number), Some(start_sector)) = (number, start) else { return Ok(None) };
    let uuid = match uevent_value(dir, "PARTUUID")? {
        Some(uuid) => Some(uuid),
        None => superblock::partition_uuid(whole_dev, number, start_sector)?,
    };
    Ok(match (uuid.map(|uuid| uuid.to_ascii_lowercase()), parent) {
        (Some(uuid), parent) => Some(StableIdentity::PartitionUuid { uuid, parent: parent.map(Box::new) }),
        (None, Some(parent)) => {
            Some(StableIdentity::PartitionPlace { number, start_sector, parent: Box::new(parent) })
        }
        (None, None) => None,
    })
}

fn whole(dev: DevNumber, dir: &Path) -> io::Result<Option<StableIdentity>> {
    let name = sysfs::name(dir);
    if let Some(uuid) = sysfs::some(dir, "dm/uuid")? {
        return Ok(Some(StableIdentity::DeviceMapper { uuid }));
    }
    if sysfs::has(dir, "md")? {
        return Ok(superblock::md_uuid(dir)?.map(|uuid| StableIdentity::Md { uuid }));
    }
    if sysfs::has(dir, "loop")? {
        return loop_identity(dev, dir);
    }
    if name.starts_with("zram") || name.starts_with("ram") {
        return Ok(Some(StableIdentity::Ram { name }));
    }
    for attribute in ["wwid", "device/wwid"] {
        if let Some(wwn) = sysfs::some(dir, attribute)? {
            return Ok(Some(StableIdentity::Wwn { wwn }));
        }
    }
    for attribute in ["serial", "device/serial", "device/cid"] {
        if let Some(serial) = sysfs::some(dir, attribute)? {
            let model = sysfs::some(dir, "device/model")?.unwrap_or_default();
            return Ok(Some(StableIdentity::Serial { serial, model }));
        }
    }
    let path = sysfs::asked(std::fs::canonicalize(dir.join("device")))?;
    Ok(path.map(|path| StableIdentity::Bus { path: path.to_string_lossy().into_owned() }))
}

fn loop_identity(dev: DevNumber, dir: &Path) -> io::Result<Option<StableIdentity>> {
    let (Some(info), Some(path)) = (ask_loop(dev)?, backing_file(dir)?) else { return Ok(None) };
    Ok(Some(StableIdentity::Loop { path, inode: info.inode, offset_bytes: info.offset_bytes }))
}

fn backing_file(dir: &Path) -> io::Result<Option<PathBuf>> {
    let path = sysfs::some(dir, "loop/backing_file")?;
    Ok(path.map(|path| path.strip_suffix(" (deleted)").unwrap_or(&path).into()))
}

/// What a loop device says of the file behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopInfo {
    /// The filesystem the file is on, as `st_dev`.
    pub filesystem: DevNumber,
    /// The file's inode.
    pub inode: u64,
    /// If the "file" is a block device: which.
    pub block_device: Option<DevNumber>,
    /// Where the device starts in the file.
    pub offset_bytes: u64,
}

/// Asks a loop device for its file; `None` if it has none.
///
/// # Errors
/// As [`sysfs::asked`].
pub fn ask_loop(dev: DevNumber) -> io::Result<Option<LoopInfo>> {
    /// `struct loop_info64` of `linux/loop.h`.
    #[repr(C)]
    struct LoopInfo64 {
        device: u64,
        inode: u64,
        rdevice: u64,
        offset: u64,
        size_limit: u64,
        number: u32,
        encrypt_type: u32,
        encrypt_key_size: u32,
        flags: u32,
        file_name: [u8; 64],
        crypt_name: [u8; 64],
        encrypt_key: [u8; 32],
        init: [u64; 2],
    }
    const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
    let Some(file) = super::node::open(dev)? else { return Ok(None) };
    let mut info = std::mem::MaybeUninit::<LoopInfo64>::zeroed();
    // SAFETY: the ioctl writes one `struct loop_info64`, which `LoopInfo64` mirrors, into memory we own.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
    if rc != 0 {
        return sysfs::asked(Err(io::Error::last_os_error()));
    }
    // SAFETY: zeroed before the call, and all fields are plain integers.
    let info = unsafe { info.assume_init() };
    let block_device = (info.rdevice != 0).then(|| sysfs::split(info.rdevice));
    Ok(Some(LoopInfo {
        filesystem: sysfs::split(info.device),
        inode: info.inode,
        block_device,
        offset_bytes: info.offset,
    }))
}

fn uevent_value(dir: &Path, key: &str) -> io::Result<Option<String>> {
    let text = sysfs::some(dir, "uevent")?.unwrap_or_default();
    Ok(text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned)))
}
