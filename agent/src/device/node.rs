//! From a device number to a node in `/dev` that opens it.

use super::{DevNumber, DeviceError, sysfs};
use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Directories below `/dev` that are looked through.
const DEPTH_MAX: usize = 4;

/// # Errors
/// There is none, or it could not be found out ([`DeviceError::Sysfs`]).
pub(super) fn find(dev: DevNumber) -> Result<PathBuf, DeviceError> {
    let fail =
        |source| DeviceError::Sysfs { major: dev.0, minor: dev.1, attribute: "its node".into(), source };
    let dir = sysfs::asked(sysfs::dir(dev)).map_err(fail)?;
    let name = dir.map(|dir| sysfs::name(&dir)).unwrap_or_default();
    let direct = Path::new("/dev").join(&name);
    if opens(&direct, dev).map_err(fail)? {
        return Ok(direct);
    }
    let found = search(Path::new("/dev"), dev, DEPTH_MAX).map_err(fail)?;
    found.ok_or(DeviceError::NoNode { major: dev.0, minor: dev.1, name })
}

/// The device, opened for reading; `None` if it cannot be, for a reason of its own.
///
/// # Errors
/// As [`sysfs::asked`].
pub(super) fn open(dev: DevNumber) -> io::Result<Option<fs::File>> {
    match find(dev) {
        Ok(node) => sysfs::asked(fs::File::open(node)),
        Err(DeviceError::Sysfs { source, .. }) => Err(source),
        Err(_) => Ok(None),
    }
}

fn opens(path: &Path, dev: DevNumber) -> io::Result<bool> {
    let meta = sysfs::asked(fs::symlink_metadata(path))?;
    Ok(meta.is_some_and(|meta| meta.file_type().is_block_device() && sysfs::split(meta.rdev()) == dev))
}

fn search(dir: &Path, dev: DevNumber, depth: usize) -> io::Result<Option<PathBuf>> {
    let mut below = Vec::new();
    let Some(entries) = sysfs::asked(fs::read_dir(dir))? else { return Ok(None) };
    for entry in entries {
        let Some(entry) = sysfs::asked(entry)? else { continue };
        let Some(kind) = sysfs::asked(entry.file_type())? else { continue };
        if kind.is_block_device() && opens(&entry.path(), dev)? {
            return Ok(Some(entry.path()));
        }
        if kind.is_dir() {
            below.push(entry.path());
        }
    }
    for dir in below.iter().filter(|_| depth > 0) {
        if let Some(found) = search(dir, dev, depth - 1)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
