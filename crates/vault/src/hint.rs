//! Hints to the kernel about what was written to a file or device, and is not read again soon: write it out now, and let its memory go.
//!
//! What makes anything durable is a sync, afterwards as ever. Left to itself the kernel begins to write out late, and whoever syncs
//! then waits for all of it.
//!
//! **Errors** of the disk that are seen here are told once to each open file (`lib/errseq.c`): a later sync of the same one does not tell
//! them again, that of another does.

use std::{fs::File, io, ops::Range, os::fd::AsRawFd};

/// Begins to write out a part of a file. Does not wait for the disk, unless its queue is full.
pub(crate) fn begin(file: &File, part: &Range<u64>) -> io::Result<()> {
    sync(file, part, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until a part is written out, and gives its memory back.
pub(crate) fn give_back(file: &File, part: &Range<u64>) -> io::Result<()> {
    const FINISH: libc::c_uint =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    if part.is_empty() {
        // As a length, 0 would mean up to the end.
        return Ok(());
    }
    sync(file, part, FINISH)?;
    let (start, length) = (part.start as libc::off_t, (part.end - part.start) as libc::off_t);
    // SAFETY: an open descriptor and numbers.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), start, length, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => unless_unknown(io::Error::from_raw_os_error(error)),
    }
}

/// Where there are no such hints, it goes without.
fn unless_unknown(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ESPIPE | libc::EINVAL | libc::EPERM) => Ok(()),
        _ => Err(error),
    }
}

fn sync(file: &File, range: &Range<u64>, how: libc::c_uint) -> io::Result<()> {
    let (start, length) = (range.start as libc::off_t, (range.end - range.start) as libc::off_t);
    // SAFETY: an open descriptor and numbers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), start, length, how) } {
        0 => Ok(()),
        _ => unless_unknown(io::Error::last_os_error()),
    }
}
