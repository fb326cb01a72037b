//! What lies on the protected disks: the mounted filesystems, in the order they must be frozen, and the swap areas.
//!
//! A filesystem lies on a disk if any of its devices is the disk, one of its partitions, a device stacked on those (LVM, md,
//! crypt: `holders` in `/sys`), or a loop device whose file lies on such a filesystem, to any depth. Mounts of all mount
//! namespaces count. Filesystems without a block device of their own (overlay, tmpfs, network) don't.
//!
//! **Order.** The top of a stack comes first: while a filesystem is frozen, nothing above it can be written out, so freezing
//! from the bottom would hang.
//!
//! **Limits.** Not seen: filesystems detached by `umount -l` and still in use; namespaces kept only by an open file;
//! external ext4 journals; loop files that are reached through an overlay. So after a freeze the caller still verifies with
//! the tracker that no write came while it read.

mod dm;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod namespaces;
mod stack;
mod swap;

pub use stack::{DiskSurvey, Survey, survey};
pub use swap::SectorRange;

use crate::{
    device::{BlockDevice, DevNumber},
    error::Coded,
};
use nix::fcntl::OFlag;
use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Why the filesystems of a disk cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// `/proc` or `/sys` cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// None of a filesystem's mount points opens it.
    #[error("cannot reach the {fs_type} filesystem mounted on {mount_point}")]
    Unreachable {
        /// Where it is mounted.
        mount_point: PathBuf,
        /// Its type.
        fs_type: String,
        /// Why the last try failed.
        #[source]
        source: io::Error,
    },
}

impl Coded for MountsError {
    fn code(&self) -> u16 {
        match self {
            Self::Read { .. } => 1420,
            Self::Unreachable { .. } => 1421,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::Read { .. } => {
                "Check that /proc and /sys are mounted and that the agent runs as root.".into()
            }
            Self::Unreachable { .. } => {
                "Unmount what covers the mount point, or bind-mount the filesystem where it is visible."
                    .into()
            }
        }
    }
}

/// A mounted filesystem on a protected disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// A path that opens it from here: its mount point, or one below `/proc/PID/root`.
    pub mount_point: PathBuf,
    /// All places where it is mounted that may be tried, the best first; `mount_point` is the first of them.
    pub places: Vec<Place>,
    /// `ext4`, `xfs`, `btrfs`, …
    pub fs_type: String,
    /// Its device number in `/proc/*/mountinfo`: unique for each mounted filesystem, anonymous for btrfs.
    pub dev: DevNumber,
    /// The block devices its data lies on.
    pub devices: Vec<DevNumber>,
    /// Whether the whole filesystem (not only a mount of it) is read-only.
    pub read_only: bool,
    /// How many filesystems and stacked devices are below it on the protected disks; the deepest freezes first.
    pub depth: u32,
}

/// One mount of a filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The path from here.
    pub path: PathBuf,
    /// The mount's number: another mount may have been put over the path.
    pub mount_id: u64,
}

impl Filesystem {
    /// Opens a directory (or file) of this very filesystem, without triggering automounts, waiting for pipes or being fooled by
    /// what is mounted over it.
    ///
    /// # Errors
    /// None of its mounts can be reached.
    pub fn open(&self) -> Result<File, MountsError> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for place in &self.places {
            match place.open() {
                Ok(file) => return Ok(file),
                Err(error) => last = error,
            }
        }
        Err(MountsError::Unreachable {
            mount_point: self.mount_point.clone(),
            fs_type: self.fs_type.clone(),
            source: last,
        })
    }
}

impl Place {
    fn open(&self) -> io::Result<File> {
        let anchor = File::options()
            .read(true)
            .custom_flags((OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits())
            .open(&self.path)?;
        let (mount_id, kind) = namespaces::mount_id(&anchor)?;
        if mount_id != self.mount_id {
            return Err(io::Error::other("another filesystem is mounted over it"));
        }
        // A bind-mounted device or pipe: its ioctls go to the device, not to the filesystem.
        if kind != libc::S_IFDIR && kind != libc::S_IFREG {
            return Err(io::Error::other("the mount point is neither a directory nor a file"));
        }
        use std::os::fd::AsRawFd;
        File::options()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits())
            .open(Path::new("/proc/self/fd").join(anchor.as_raw_fd().to_string()))
    }
}

/// Whether a device is a swap area as a whole.
#[must_use]
pub fn is_swap(device: &BlockDevice) -> bool {
    let mounted = namespaces::mounts().is_ok_and(|all| all.iter().any(|m| m.dev == device.dev));
    swap::area_bytes(device.dev, mounted).is_some()
}

/// Whether a filesystem on a device is mounted with DAX. Where the device is capable of it, a filesystem may use DAX per
/// file without saying so in its options, unless it says `dax=never`.
#[must_use]
pub fn dax_in_use(device: &BlockDevice, capable: bool) -> bool {
    let (Ok(mounts), Ok(found)) = (namespaces::mounts(), survey(std::slice::from_ref(device))) else {
        return false;
    };
    mounts.iter().filter(|mount| found.filesystems.iter().any(|fs| fs.dev == mount.dev)).any(|mount| {
        let has = |wanted: &str| mount.super_options.split(',').any(|option| option == wanted);
        has("dax") || has("dax=always") || (capable && !has("dax=never"))
    })
}
