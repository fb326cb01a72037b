//! Small readers of `/sys`. Attributes are short; each read is bounded.

use super::DevNumber;
use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

/// No attribute used here comes near it.
const ATTRIBUTE_BYTES_MAX: u64 = 8192;

/// An attribute's text, trimmed.
///
/// # Errors
/// As of the file system; also if it is no UTF-8.
pub fn read(dir: &Path, attribute: &str) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(dir.join(attribute))?.take(ATTRIBUTE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

/// An attribute's text, unless it is missing or empty.
#[must_use]
pub fn read_some(dir: &Path, attribute: &str) -> Option<String> {
    read(dir, attribute).ok().filter(|text| !text.is_empty())
}

/// A number.
///
/// # Errors
/// As [`read`]; also if it is no number.
pub fn read_u64(dir: &Path, attribute: &str) -> io::Result<u64> {
    read(dir, attribute)?.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// The directory of a block device, links resolved.
///
/// # Errors
/// If the kernel knows no such block device.
pub fn dir(dev: DevNumber) -> io::Result<PathBuf> {
    fs::canonicalize(format!("/sys/dev/block/{}:{}", dev.0, dev.1))
}

/// Whether the kernel has a block device of this number now.
#[must_use]
pub fn is_there(dev: DevNumber) -> bool {
    Path::new(&format!("/sys/dev/block/{}:{}", dev.0, dev.1)).exists()
}

/// The directory of the whole disk of a device.
#[must_use]
pub fn whole_dir(dir: &Path) -> PathBuf {
    match dir.parent() {
        Some(parent) if dir.join("partition").exists() => parent.to_owned(),
        _ => dir.to_owned(),
    }
}

/// The device number in a directory of `/sys`.
///
/// # Errors
/// If it has none.
pub fn number(dir: &Path) -> io::Result<DevNumber> {
    parse_number(&read(dir, "dev")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// `8:1`
#[must_use]
pub fn parse_number(text: &str) -> Option<DevNumber> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The kernel's name of the device with this directory. `cciss!c0d0` stands for `cciss/c0d0`.
#[must_use]
pub fn name(dir: &Path) -> String {
    dir.file_name().map(|name| name.to_string_lossy().replace('!', "/")).unwrap_or_default()
}

/// User space's encoding of a device number, taken apart.
#[must_use]
pub fn split(rdev: u64) -> DevNumber {
    (libc::major(rdev), libc::minor(rdev))
}

/// The devices in a directory of links to devices (`holders`, `slaves`).
#[must_use]
pub fn linked(dir: &Path, sub: &str) -> Vec<DevNumber> {
    let Ok(entries) = fs::read_dir(dir.join(sub)) else { return Vec::new() };
    entries.flatten().filter_map(|entry| number(&entry.path()).ok()).collect()
}

/// The partitions of a whole disk.
#[must_use]
pub fn partitions(whole_dir: &Path) -> Vec<DevNumber> {
    let Ok(entries) = fs::read_dir(whole_dir) else { return Vec::new() };
    let dirs = entries.flatten().map(|entry| entry.path());
    dirs.filter(|dir| dir.join("partition").exists()).filter_map(|dir| number(&dir).ok()).collect()
}

/// Every block device, whole disks and partitions, with its directory.
///
/// # Errors
/// If `/sys` is not there.
pub fn all() -> io::Result<Vec<(DevNumber, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/block")? {
        let Ok(dir) = fs::canonicalize(entry?.path()) else { continue };
        if let Ok(dev) = number(&dir) {
            found.push((dev, dir));
        }
    }
    found.sort_unstable();
    Ok(found)
}
