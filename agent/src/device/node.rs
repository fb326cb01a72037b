//! From a device number to a node in `/dev` that opens it.

use super::{DevNumber, DeviceError, sysfs};
use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Directories below `/dev` that are looked through.
const DEPTH_MAX: usize = 4;

pub(super) fn find(dev: DevNumber) -> Result<PathBuf, DeviceError> {
    let name = sysfs::dir(dev).map(|dir| sysfs::name(&dir)).unwrap_or_default();
    let direct = Path::new("/dev").join(&name);
    if opens(&direct, dev) {
        return Ok(direct);
    }
    search(Path::new("/dev"), dev, DEPTH_MAX).ok_or(DeviceError::NoNode { major: dev.0, minor: dev.1, name })
}

fn opens(path: &Path, dev: DevNumber) -> bool {
    fs::symlink_metadata(path)
        .is_ok_and(|meta| meta.file_type().is_block_device() && sysfs::split(meta.rdev()) == dev)
}

fn search(dir: &Path, dev: DevNumber, depth: usize) -> Option<PathBuf> {
    let mut below = Vec::new();
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_block_device() && opens(&entry.path(), dev) {
            return Some(entry.path());
        }
        if kind.is_dir() {
            below.push(entry.path());
        }
    }
    below.iter().filter(|_| depth > 0).find_map(|dir| search(dir, dev, depth - 1))
}
