//! Secret files: mode 0600, replaced as a whole, durable when the call returns. Whoever reads a file in order to replace it
//! holds the lock of its directory meanwhile.

use crate::WireError;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use zeroize::Zeroizing;

/// Most bytes of a file that is read here.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// Writes a file that only its owner may read: beside it under another name, fsynced, renamed, the directory fsynced. A
/// crash leaves the old file or the new one. The new one belongs to whom the old one did, if this user may say so.
pub fn write_secret(path: &Path, content: &[u8]) -> Result<(), WireError> {
    let failed = |source| WireError::File { path: path.to_owned(), source };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name =
        path.file_name().ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?.to_owned();
    name.push(".new");
    let new = dir.join(name);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    // A leftover of a crash may have been made by somebody else's rules: never write into it.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(failed)?;
    if let Ok(old) = fs::symlink_metadata(path) {
        // Root, who renews what a daemon uses, must not take it away from it. Nobody else can, or needs to.
        match fchown(&file, Some(old.uid()), Some(old.gid())) {
            Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => return Err(failed(error)),
            _ => {}
        }
    }
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&new, path).map_err(failed)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// Waits until nobody else holds the lock of a directory, and holds it until the answer is dropped.
pub fn lock_dir(dir: &Path) -> Result<File, WireError> {
    let locked = File::open(dir).and_then(|file| file.lock().map(|()| file));
    locked.map_err(|source| WireError::File { path: dir.to_owned(), source })
}

/// Reads a file of bounded size as text.
pub fn read_secret(path: &Path) -> Result<Zeroizing<String>, WireError> {
    let failed = |source| WireError::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mut text = Zeroizing::new(String::new());
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_is_replaced_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/key.pem");
        write_secret(&path, b"one").unwrap();
        fs::write(path.with_file_name("key.pem.new"), b"left by a crash").unwrap();
        write_secret(&path, b"two").unwrap();
        assert_eq!(read_secret(&path).unwrap().as_str(), "two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        // Only root can give files away.
        if fs::metadata(&path).unwrap().uid() == 0 {
            std::os::unix::fs::chown(&path, Some(65534), Some(65533)).unwrap();
            write_secret(&path, b"three").unwrap();
            let meta = fs::metadata(&path).unwrap();
            assert_eq!((meta.uid(), meta.gid(), meta.permissions().mode() & 0o777), (65534, 65533, 0o600));
        }
    }
}
