//! Where files may be recovered to: not into the system's own directories of devices, and knowingly into memory.

use crate::{Result, VaultError};
use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// What a directory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On what stays.
    Disk,
    /// In memory: it takes the machine's, and is gone at its next start.
    Memory,
}

/// Looks at where a directory is or would be made. A mistyped device would become a file, in memory, of the device's size:
/// nothing but devices belongs on the filesystem of `/dev`.
pub fn directory_place(dir: &Path) -> Result<Place> {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    // The part that exists, wherever links lead.
    let there = absolute.ancestors().find_map(|part| part.canonicalize().ok());
    let there = there.unwrap_or_else(|| "/".into());
    let device = fs::metadata(&there).map_or(0, |meta| meta.dev());
    // Another file system mounted there (/dev/shm) is what it is; in a container /dev itself may be of any type.
    if there.starts_with("/dev") && fs::metadata("/dev").is_ok_and(|dev| dev.dev() == device) {
        return Err(VaultError::target(
            dir,
            "there is no such block device, and files do not belong among devices",
        ));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    match filesystem(&mounts, device) {
        Some("devtmpfs") => Err(VaultError::target(dir, "it is on a devtmpfs, which is for devices")),
        Some("tmpfs" | "ramfs") => Ok(Place::Memory),
        _ => Ok(Place::Disk),
    }
}

/// The type of the filesystem with a device number, by the text of `mountinfo`.
fn filesystem(mounts: &str, device: u64) -> Option<&str> {
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        (mount.split(' ').nth(2)? == number).then(|| filesystem.split(' ').next())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_devices_are_refused_and_memory_is_told() {
        for dir in ["/dev", "/dev/nope", "/dev/nope/deeper", "/dev/../dev/nope", "/tmp/../dev/nope"] {
            let error = directory_place(Path::new(dir)).unwrap_err();
            assert_eq!(error.code(), 1217, "{dir}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev", &link).unwrap();
        assert_eq!(directory_place(&link.join("nope")).unwrap_err().code(), 1217);
        directory_place(&dir.path().join("not/there")).unwrap();
        let mounts = "21 1 0:5 / /x rw - devtmpfs udev rw\n22 1 0:20 / /y rw shared:1 - tmpfs tmpfs rw\n";
        assert_eq!(filesystem(mounts, libc::makedev(0, 5)), Some("devtmpfs"));
        assert_eq!(filesystem(mounts, libc::makedev(0, 20)), Some("tmpfs"));
        assert_eq!(filesystem(mounts, libc::makedev(8, 1)), None);
    }
}
