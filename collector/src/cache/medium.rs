//! What spools are made of: files without names.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How names end that files have for a moment.
const SUFFIX: &str = ".spool";
/// Numbers for these names.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Where files come from.
pub trait Medium: Send + Sync {
    /// An empty file; gone, and its space with it, when it is dropped.
    fn create(&self) -> io::Result<Box<dyn Backing>>;
}

/// One file. Blocks while the disk works.
pub trait Backing: Send + Sync {
    /// Writes some of the bytes; answers how many.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Reads some bytes; none behind the end.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Waits until the disk has what was written.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of a local file system.
pub struct Directory(PathBuf);

impl Directory {
    /// Makes it, for its owner only, if it is missing; removes names that a crash left. Other collectors may use it too: none of their
    /// files has a name for longer than it takes to open it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().ends_with(SUFFIX) && entry.file_type()?.is_file() {
                remove(&entry.path())?;
            }
        }
        let directory = Self(dir.to_owned());
        // Whoever cannot write there is to hear of it now.
        directory.create()?;
        Ok(directory)
    }
}

/// Another collector may have been faster.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Medium for Directory {
    fn create(&self) -> io::Result<Box<dyn Backing>> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.0.join(format!("{}-{number}{SUFFIX}", std::process::id()));
        // Of an earlier process with the same number, should one have died just here.
        remove(&path)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        remove(&path)?;
        Ok(Box::new(file))
    }
}

impl Backing for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, bytes, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_have_no_names_and_what_a_crash_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/cache");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("7-1.spool"), b"left").unwrap();
        fs::write(path.join("mine"), b"kept").unwrap();
        let directory = Directory::open(&path).unwrap();
        let file = directory.create().unwrap();
        assert_eq!(file.write_at(b"bytes", 3).unwrap(), 5);
        let mut back = [9; 10];
        assert_eq!(file.read_at(&mut back, 0).unwrap(), 8);
        assert_eq!(&back[..8], b"\0\0\0bytes");
        file.sync().unwrap();
        let names: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["mine"]);
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(directory.create().err().unwrap().kind(), io::ErrorKind::NotFound);
        // Made anew, for its owner only.
        Directory::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(path.join("file"), b"").unwrap();
        assert!(Directory::open(&path.join("file")).is_err());
    }
}
