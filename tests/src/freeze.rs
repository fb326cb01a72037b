//! Freezing a file system for the time of a copy, and making sure that nothing stays frozen.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};

mod ioctl {
    nix::ioctl_readwrite! {
        /// linux/fs.h: `FIFREEZE`, `_IOWR('X', 119, int)`. The argument is not read.
        fifreeze, b'X', 119, libc::c_int
    }
    nix::ioctl_readwrite! {
        /// linux/fs.h: `FITHAW`, `_IOWR('X', 120, int)`. The argument is not read.
        fithaw, b'X', 120, libc::c_int
    }
}

/// A frozen file system; thawed when dropped.
pub struct Freeze {
    dir: File,
}

impl Freeze {
    /// Freezes the file system mounted at the directory. Fails if it is frozen already.
    pub fn new(mount_point: &Path) -> Result<Self> {
        let dir =
            File::open(mount_point).with_context(|| format!("cannot open {}", mount_point.display()))?;
        let mut unused = 0;
        // SAFETY: the file descriptor is open, and the argument points to an int that outlives the call.
        unsafe { ioctl::fifreeze(dir.as_raw_fd(), &mut unused) }
            .with_context(|| format!("cannot freeze {}", mount_point.display()))?;
        Ok(Freeze { dir })
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        thaw(&self.dir);
    }
}

/// Whether the file system is frozen now. One that is not is frozen for a moment to find out: an agent that freezes it
/// just then is refused.
pub fn is_frozen(mount_point: &Path) -> Result<bool> {
    match Freeze::new(mount_point) {
        Ok(_) => Ok(false),
        Err(error) if error.downcast_ref::<nix::Error>() == Some(&nix::Error::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Thaws whatever froze it, if anything did.
pub(crate) fn thaw_if_frozen(mount_point: &Path) {
    if let Ok(dir) = File::open(mount_point) {
        thaw(&dir);
    }
}

fn thaw(dir: &File) {
    let mut unused = 0;
    // SAFETY: as for freezing. EINVAL tells that it is not frozen, which is what is wanted.
    let _ = unsafe { ioctl::fithaw(dir.as_raw_fd(), &mut unused) };
}
