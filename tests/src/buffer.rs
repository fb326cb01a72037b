//! Memory for O_DIRECT, and files opened with it where the file system allows.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Alignment that every block device accepts.
pub const ALIGNMENT: usize = 4096;

/// Bytes whose address is aligned for O_DIRECT. The length is as asked for.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// Zeroed bytes.
    pub fn zeroed(length: usize) -> Self {
        let memory = vec![0; length + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Aligned { memory, start, length }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Opens for direct access; plainly where the file system refuses that (tmpfs before 6.6), as it has no cache
/// besides the file.
pub fn open_direct(path: &Path, write: bool) -> io::Result<File> {
    let options = |flags| {
        let mut options = OpenOptions::new();
        options.read(true).write(write).custom_flags(flags).clone()
    };
    match options(libc::O_DIRECT).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => options(0).open(path),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_whatever_their_length() {
        for length in [512, 4096, 12_345] {
            let mut buffer = Aligned::zeroed(length);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(buffer.len(), length);
            buffer[length - 1] = 1;
        }
    }
}
