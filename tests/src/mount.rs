//! A file system made and mounted for one test.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::TempDir;

use crate::command;
use crate::device::{report, retry};
use crate::freeze;

/// The file systems tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4, without lazy initialization, whose background writes would blur tests.
    Ext4,
    /// xfs
    Xfs,
    /// btrfs
    Btrfs,
}

impl FileSystem {
    /// All of them.
    pub const ALL: [FileSystem; 3] = [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs];

    /// The smallest device mkfs accepts with room for a test.
    pub fn size_bytes_min(self) -> u64 {
        match self {
            FileSystem::Ext4 => 64 << 20,
            FileSystem::Xfs => 320 << 20,
            FileSystem::Btrfs => 128 << 20,
        }
    }

    /// The name that mount knows.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
            FileSystem::Btrfs => "btrfs",
        }
    }

    /// Makes the file system on a device.
    pub fn make(self, device: &Path) -> Result<()> {
        let device = device.to_string_lossy();
        match self {
            FileSystem::Ext4 => {
                let lazy = "lazy_itable_init=0,lazy_journal_init=0";
                command::run("mkfs.ext4", &["-q", "-F", "-E", lazy, &device])
            }
            FileSystem::Xfs => command::run("mkfs.xfs", &["-q", "-f", &device]),
            FileSystem::Btrfs => command::run("mkfs.btrfs", &["-q", "-f", &device]),
        }
        .map(drop)
    }

    /// Mounts a copy once, so that it replays its journal as after a power cut, and checks it. This changes the copy.
    pub fn replay_and_check(self, device: &Path) -> Result<()> {
        drop(Mounted::existing(self, device, "")?);
        let device = device.to_string_lossy();
        match self {
            FileSystem::Ext4 => command::run("e2fsck", &["-f", "-n", &device]),
            FileSystem::Xfs => command::run("xfs_repair", &["-n", &device]),
            FileSystem::Btrfs => command::run("btrfs", &["check", "--readonly", &device]),
        }
        .map(drop)
    }
}

/// A mounted file system. Dropped: thawed if a test left it frozen, and unmounted.
pub struct Mounted {
    dir: TempDir,
    device: PathBuf,
}

impl Mounted {
    /// Makes a file system on the device and mounts it.
    pub fn make(kind: FileSystem, device: &Path) -> Result<Self> {
        kind.make(device)?;
        Self::existing(kind, device, "")
    }

    /// Mounts what is there, a device or an image in a file; options are mount's, like `ro,norecovery`.
    pub fn existing(kind: FileSystem, device: &Path, options: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hwtest-mnt-").tempdir_in("/var/tmp")?;
        // A copy has the UUID of its original, which may be mounted.
        let options = match (kind, options) {
            (FileSystem::Xfs, "") => "nouuid".to_owned(),
            (FileSystem::Xfs, more) => format!("nouuid,{more}"),
            // It discards free space in the background, also while frozen: no two reads of the device would be equal.
            (FileSystem::Btrfs, "") => "nodiscard".to_owned(),
            (FileSystem::Btrfs, more) => format!("nodiscard,{more}"),
            (_, "") => "defaults".to_owned(),
            (_, more) => more.to_owned(),
        };
        let options = if device.is_file() { format!("loop,{options}") } else { options };
        if kind == FileSystem::Btrfs {
            // It remembers what lay on devices whose numbers come back, and then refuses ("File exists") what lies there now.
            command::run("btrfs", &["device", "scan", "--forget"])?;
        }
        let (device_name, dir_name) = (device.to_string_lossy(), dir.path().to_string_lossy());
        command::run("mount", &["-t", kind.name(), "-o", &options, &device_name, &dir_name])?;
        Ok(Mounted { device: device.to_path_buf(), dir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The device it lies on.
    pub fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        freeze::thaw_if_frozen(self.dir.path());
        let dir = self.dir.path().to_string_lossy().into_owned();
        report(retry(|| command::run("umount", &[&dir]).map(drop)));
    }
}
