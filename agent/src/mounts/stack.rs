//! Walks upward from the protected disks: partitions, stacked devices, filesystems, loop files, filesystems on those, …

use super::{
    Filesystem, MountsError, Place, dm, namespaces,
    namespaces::Mount,
    swap::{self, SectorRange},
};
use crate::device::{BlockDevice, DevNumber, identity::LoopInfo, identity::ask_loop, sysfs};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

/// Stacks do not go deeper; a cycle (which the kernel forbids) would end here too.
const DEPTH_MAX: u32 = 64;

/// What lies on the protected disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The mounted filesystems of all the disks together, in freeze order.
    pub filesystems: Vec<Filesystem>,
    /// One for each disk, in the order asked.
    pub disks: Vec<DiskSurvey>,
}

/// What lies on one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskSurvey {
    /// Swap areas without their header pages, relative to the start of the protected device, sorted.
    pub swap: Vec<SectorRange>,
    /// Whether a mounted filesystem lies on it. If not, no freeze can make a point of it consistent.
    pub has_filesystem: bool,
}

/// Finds everything mounted on these disks. Reads `/proc` and `/sys` and a few headers of partitions; it must not be called
/// while something is frozen.
///
/// # Errors
/// `/proc` or `/sys` cannot be read. Processes and devices that vanish meanwhile are no errors.
pub fn survey(disks: &[BlockDevice]) -> Result<Survey, MountsError> {
    let mounts = Mounted::read()?;
    let loops = loops()?;
    let mut together = Walk::new(&mounts, &loops);
    let mut surveys = Vec::new();
    for disk in disks {
        together.device(disk.dev, 0).map_err(unasked)?;
        let mut alone = Walk::new(&mounts, &loops);
        alone.device(disk.dev, 0).map_err(unasked)?;
        surveys.push(DiskSurvey {
            swap: swap_areas(disk, &mounts, alone.devices.keys().copied()),
            has_filesystem: !alone.filesystems.is_empty(),
        });
    }
    Ok(Survey { filesystems: together.finish(), disks: surveys })
}

/// The mounted filesystems with a block device, by their number in mountinfo.
struct Mounted {
    filesystems: BTreeMap<DevNumber, Entry>,
}

struct Entry {
    filesystem: Filesystem,
    /// `st_dev` of files on it: its own number, and for btrfs those of the mounted subvolumes.
    file_devs: BTreeSet<DevNumber>,
}

impl Mounted {
    fn read() -> Result<Self, MountsError> {
        let mut filesystems: BTreeMap<DevNumber, Entry> = BTreeMap::new();
        let btrfs = btrfs_devices().map_err(unasked)?;
        for mount in namespaces::mounts()? {
            let known = filesystems.contains_key(&mount.dev);
            if !known {
                let devices = devices_of(&mount, &btrfs);
                if devices.is_empty() {
                    continue;
                }
                filesystems.insert(mount.dev, Entry::new(&mount, devices));
            }
            if let Some(entry) = filesystems.get_mut(&mount.dev) {
                entry.add(&mount);
            }
        }
        Ok(Self { filesystems })
    }
}

impl Entry {
    fn new(mount: &Mount, devices: Vec<DevNumber>) -> Self {
        let read_only = mount.super_options.split(',').next() == Some("ro");
        Self {
            filesystem: Filesystem {
                mount_point: mount.path.clone(),
                places: Vec::new(),
                fs_type: mount.fs_type.clone(),
                dev: mount.dev,
                devices,
                read_only,
                depth: 0,
            },
            file_devs: BTreeSet::from([mount.dev]),
        }
    }

    fn add(&mut self, mount: &Mount) {
        self.filesystem.places.push(Place { path: mount.path.clone(), mount_id: mount.id });
        if mount.fs_type == "btrfs"
            && let Ok(meta) = fs::symlink_metadata(&mount.path)
        {
            self.file_devs.insert(sysfs::split(meta.dev()));
        }
    }
}

/// The block devices of a mounted filesystem; none for those that have no block device of their own.
fn devices_of(mount: &Mount, btrfs: &[(String, Vec<DevNumber>)]) -> Vec<DevNumber> {
    let mut devices = BTreeSet::new();
    if mount.dev.0 != 0 && sysfs::dir(mount.dev).is_ok() {
        devices.insert(mount.dev);
    } else if mount.fs_type == "btrfs" {
        let fsid = btrfs_fsid(mount);
        let source = block_number(Path::new(&mount.source));
        for (uuid, members) in btrfs {
            let by_source = fsid.is_none() && source.is_some_and(|dev| members.contains(&dev));
            if fsid.as_ref() == Some(uuid) || by_source {
                devices.extend(members);
            }
        }
        devices.extend(source.filter(|_| devices.is_empty()));
    } else if mount.dev.0 == 0 {
        // bcachefs and whatever else names its devices as its source. A fuse mount may claim a device too (fuseblk has a
        // number of its own): harmless, it lies there.
        devices.extend(mount.source.split(':').filter_map(|source| block_number(Path::new(source))));
    }
    if devices.is_empty() {
        return Vec::new();
    }
    for option in mount.super_options.split(',') {
        let path = option.strip_prefix("logdev=").or_else(|| option.strip_prefix("rtdev="));
        devices.extend(path.and_then(|path| block_number(Path::new(path))));
    }
    devices.into_iter().collect()
}

fn block_number(path: &Path) -> Option<DevNumber> {
    if !path.is_absolute() {
        return None;
    }
    let meta = fs::metadata(path).ok()?;
    (meta.mode() & libc::S_IFMT == libc::S_IFBLK).then(|| sysfs::split(meta.rdev()))
}

/// Every btrfs filesystem the kernel has open, with its devices.
fn btrfs_devices() -> io::Result<Vec<(String, Vec<DevNumber>)>> {
    let Some(entries) = sysfs::asked(fs::read_dir("/sys/fs/btrfs"))? else { return Ok(vec![]) };
    let mut all = Vec::new();
    for entry in entries {
        let Some(entry) = sysfs::asked(entry)? else { continue };
        let uuid = entry.file_name().to_string_lossy().into_owned();
        let devices = sysfs::linked(&entry.path(), "devices")?;
        if !devices.is_empty() {
            all.push((uuid, devices));
        }
    }
    Ok(all)
}

/// Asks the filesystem itself: the mount source may be a stale name.
fn btrfs_fsid(mount: &Mount) -> Option<String> {
    /// `struct btrfs_ioctl_fs_info_args`
    #[repr(C)]
    struct FsInfo {
        max_id: u64,
        num_devices: u64,
        fsid: [u8; 16],
        rest: [u8; 992],
    }
    const BTRFS_IOC_FS_INFO: libc::Ioctl = 0x8400_941f;
    let file = Place { path: mount.path.clone(), mount_id: mount.id }.open().ok()?;
    let mut info = FsInfo { max_id: 0, num_devices: 0, fsid: [0; 16], rest: [0; 992] };
    // SAFETY: the ioctl reads and writes one 1024-byte `btrfs_ioctl_fs_info_args`, which `FsInfo` mirrors.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), BTRFS_IOC_FS_INFO, &raw mut info) };
    let id = info.fsid.map(|byte| format!("{byte:02x}")).concat();
    (rc == 0).then(|| format!("{}-{}-{}-{}-{}", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]))
}

/// All loop devices with a file.
fn loops() -> Result<Vec<(DevNumber, LoopInfo, PathBuf)>, MountsError> {
    let mut loops = vec![];
    for (dev, dir) in sysfs::all().map_err(unasked)? {
        let Some(file) = sysfs::some(&dir, "loop/backing_file").map_err(unasked)? else { continue };
        let Some(info) = ask_loop(dev).map_err(unasked)? else { continue };
        loops.push((dev, info, PathBuf::from(file)));
    }
    Ok(loops)
}

/// Nothing is known of what lies above a device: a point made without it might not freeze all.
fn unasked(source: io::Error) -> MountsError {
    MountsError::Read { path: "/sys/class/block".into(), source }
}

struct Walk<'a> {
    mounts: &'a Mounted,
    loops: &'a [(DevNumber, LoopInfo, PathBuf)],
    /// The greatest depth at which each was met.
    devices: BTreeMap<DevNumber, u32>,
    filesystems: BTreeMap<DevNumber, u32>,
}

impl<'a> Walk<'a> {
    fn new(mounts: &'a Mounted, loops: &'a [(DevNumber, LoopInfo, PathBuf)]) -> Self {
        Self { mounts, loops, devices: BTreeMap::new(), filesystems: BTreeMap::new() }
    }

    fn device(&mut self, dev: DevNumber, depth: u32) -> io::Result<()> {
        if depth > DEPTH_MAX || self.devices.get(&dev).is_some_and(|known| *known >= depth) {
            return Ok(());
        }
        self.devices.insert(dev, depth);
        // Vanished meanwhile: nothing on it.
        let Some(dir) = sysfs::asked(sysfs::dir(dev))? else { return Ok(()) };
        for part in sysfs::partitions(&dir)? {
            self.device(part, depth)?;
        }
        for holder in sysfs::linked(&dir, "holders")? {
            self.device(holder, depth + 1)?;
        }
        for (above, info, _) in self.loops {
            if info.block_device == Some(dev) {
                self.device(*above, depth + 1)?;
            }
        }
        let mounts = self.mounts;
        for (key, entry) in &mounts.filesystems {
            if entry.filesystem.devices.contains(&dev) {
                self.filesystem(*key, entry, depth)?;
            }
        }
        Ok(())
    }

    fn filesystem(&mut self, key: DevNumber, entry: &Entry, depth: u32) -> io::Result<()> {
        if self.filesystems.get(&key).is_some_and(|known| *known >= depth) {
            return Ok(());
        }
        self.filesystems.insert(key, depth);
        for (above, info, path) in self.loops {
            if info.block_device.is_none() && entry.holds(info, path) {
                self.device(*above, depth + 1)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Vec<Filesystem> {
        let entry = |(key, depth): (&DevNumber, &u32)| {
            let mut filesystem = self.mounts.filesystems.get(key)?.filesystem.clone();
            filesystem.depth = *depth;
            Some(filesystem)
        };
        let mut all: Vec<Filesystem> = self.filesystems.iter().filter_map(entry).collect();
        all.sort_by(|a, b| b.depth.cmp(&a.depth).then_with(|| a.dev.cmp(&b.dev)));
        all
    }
}

impl Entry {
    /// Whether a loop device's file lies on this filesystem.
    fn holds(&self, info: &LoopInfo, path: &Path) -> bool {
        if self.file_devs.contains(&info.filesystem) {
            return true;
        }
        // A btrfs subvolume that is not mounted itself has a number that mountinfo does not show.
        self.filesystem.fs_type == "btrfs"
            && fs::metadata(path)
                .is_ok_and(|m| sysfs::split(m.dev()) == info.filesystem && m.ino() == info.inode)
            && fs::File::open(path)
                .and_then(|file| namespaces::mount_id(&file))
                .is_ok_and(|(id, _)| self.filesystem.places.iter().any(|place| place.mount_id == id))
    }
}

/// Swap areas on partitions of the disk and on the logical volumes (`stacked`) above it.
fn swap_areas(
    disk: &BlockDevice,
    mounts: &Mounted,
    stacked: impl Iterator<Item = DevNumber>,
) -> Vec<SectorRange> {
    let mut areas = Vec::new();
    for dev in stacked.filter(|dev| *dev != disk.dev) {
        let mounted = mounts.filesystems.values().any(|entry| entry.filesystem.devices.contains(&dev));
        let Some(bytes) = swap::area_bytes(dev, mounted) else { continue };
        let sectors = bytes.start / 512..bytes.end / 512;
        let is_dm = sysfs::dir(dev).is_ok_and(|dir| dir.join("dm").is_dir());
        let pieces = if is_dm { dm::resolve(dev, sectors).unwrap_or_default() } else { vec![(dev, sectors)] };
        for (below, range) in pieces {
            if let Some(offset) = offset_on(disk, below) {
                areas.push(SectorRange { start: offset + range.start, end: offset + range.end });
            }
        }
    }
    areas.sort_by_key(|area| area.start);
    areas
}

/// Where a device starts on the disk, if it is the disk or one of its partitions.
fn offset_on(disk: &BlockDevice, dev: DevNumber) -> Option<u64> {
    if dev == disk.dev {
        return Some(0);
    }
    let dir = sysfs::dir(dev).ok()?;
    let whole = sysfs::number(&sysfs::whole_dir(&dir).ok()?).ok()?;
    (whole == disk.dev && whole != dev).then(|| sysfs::read_u64(&dir, "start").ok())?
}
