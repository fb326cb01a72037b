//! The three calls that freezing is made of.

use std::{fs::File, io, os::fd::AsRawFd, os::fd::RawFd};

/// `_IOWR('X', 119, int)`
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
/// `_IOWR('X', 120, int)`
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;

/// Writes out a filesystem.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    // SAFETY: a system call on a descriptor that lives.
    if unsafe { libc::syncfs(file.as_raw_fd()) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Freezes a filesystem; returns when all is written out and nothing more can be.
pub(crate) fn freeze(file: &File) -> io::Result<()> {
    // SAFETY: the argument of FIFREEZE is ignored.
    if unsafe { libc::ioctl(file.as_raw_fd(), FIFREEZE, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Thaws a filesystem. `EINVAL`: it is not frozen (or a freeze has not ended yet).
pub(crate) fn thaw(file: &File) -> io::Result<()> {
    thaw_fd(file.as_raw_fd()).map_err(io::Error::from_raw_os_error)
}

/// The same without allocation; the error is the `errno`.
pub(crate) fn thaw_fd(fd: RawFd) -> Result<(), i32> {
    // SAFETY: the argument of FITHAW is ignored; a bad descriptor is an error.
    if unsafe { libc::ioctl(fd, FITHAW, 0) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
}
