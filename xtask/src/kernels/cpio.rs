//! Writes initramfs archives in cpio's `newc` form. Several may be appended to each other; later files win.
//!
//! All files belong to root. Only directories, files and symbolic links exist; the guest makes its devices.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive being written. [`Archive::finish`] must be called, or the kernel refuses it.
pub struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Archive { out, inode: 1 }
    }

    /// Adds a directory; those above it must have been added.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY | 0o755, &[])
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | (mode & 0o7777), content)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &Path) -> io::Result<()> {
        self.entry(name, LINK | 0o777, target.as_os_str().as_bytes())
    }

    /// Adds everything below a directory of the host, in the order of names.
    pub fn tree(&mut self, dir: &Path, prefix: &str) -> io::Result<()> {
        let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let file_name = entry.file_name();
            let name = file_name.to_str().ok_or_else(|| io::Error::other("a file's name is not UTF-8"))?;
            let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.directory(&name)?;
                self.tree(&entry.path(), &name)?;
            } else if kind.is_symlink() {
                self.link(&name, &fs::read_link(entry.path())?)?;
            } else {
                self.file(&name, entry.metadata()?.permissions().mode(), &fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }

    /// Ends the archive and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).map_err(|_| io::Error::other("a file of 4 GiB or more"))?;
        let name_length = u32::try_from(name.len() + 1).map_err(|_| io::Error::other("a name too long"))?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, nlink, mtime, size, device (2), device of a special file (2), name size, check
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_length, 0];
        self.inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..written.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").unwrap();
        archive.file("bin/x", 0o755, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // 110 bytes of header and "bin\0" make 114, padded to 116.
        assert_eq!(&bytes[116..122], b"070701");
        let trailer = bytes.windows(10).position(|window| window == b"TRAILER!!!").unwrap();
        assert_eq!((trailer - 110) % 4, 0);
    }
}
