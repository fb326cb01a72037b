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

/// What was asked for, or `None` if the kernel has no such thing.
///
/// # Errors
/// It could not be asked at all, for want of memory or descriptors: that says nothing about what there is.
pub fn asked<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    const NOT_ASKED: [i32; 6] =
        [libc::ENOMEM, libc::ENOBUFS, libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::EINTR];
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.kind() == io::ErrorKind::OutOfMemory => Err(error),
        Err(error) if error.raw_os_error().is_some_and(|number| NOT_ASKED.contains(&number)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Whether there is a file or directory of this name.
///
/// # Errors
/// As [`asked`].
pub fn has(dir: &Path, name: &str) -> io::Result<bool> {
    Ok(asked(fs::metadata(dir.join(name)))?.is_some())
}

/// An attribute's text, unless it is missing or empty.
///
/// # Errors
/// As [`asked`].
pub fn some(dir: &Path, attribute: &str) -> io::Result<Option<String>> {
    Ok(asked(read(dir, attribute))?.filter(|text| !text.is_empty()))
}

/// The same, where it does not matter why.
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
///
/// # Errors
/// As [`asked`].
pub fn whole_dir(dir: &Path) -> io::Result<PathBuf> {
    let partition = has(dir, "partition")?;
    let whole = dir.parent().filter(|_| partition).unwrap_or(dir);
    Ok(whole.to_owned())
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
///
/// # Errors
/// As [`asked`].
pub fn linked(dir: &Path, sub: &str) -> io::Result<Vec<DevNumber>> {
    let Some(entries) = asked(fs::read_dir(dir.join(sub)))? else { return Ok(vec![]) };
    let mut found = vec![];
    for entry in entries {
        let Some(entry) = asked(entry)? else { continue };
        found.extend(asked(number(&entry.path()))?);
    }
    Ok(found)
}

/// The partitions of a whole disk.
///
/// # Errors
/// As [`asked`].
pub fn partitions(whole_dir: &Path) -> io::Result<Vec<DevNumber>> {
    let Some(entries) = asked(fs::read_dir(whole_dir))? else { return Ok(vec![]) };
    let mut found = vec![];
    for entry in entries {
        let Some(entry) = asked(entry)? else { continue };
        if has(&entry.path(), "partition")? {
            found.extend(asked(number(&entry.path()))?);
        }
    }
    Ok(found)
}

/// Every block device, whole disks and partitions, with its directory.
///
/// # Errors
/// If `/sys` is not there; as [`asked`].
pub fn all() -> io::Result<Vec<(DevNumber, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/block")? {
        let Some(dir) = asked(fs::canonicalize(entry?.path()))? else { continue };
        if let Some(dev) = asked(number(&dir))? {
            found.push((dev, dir));
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_asked_is_not_absent() {
        let os = |number| Err::<(), _>(io::Error::from_raw_os_error(number));
        assert!(asked(os(libc::ENOMEM)).is_err());
        assert!(asked(os(libc::ENOENT)).unwrap().is_none());
        assert!(asked(os(libc::ENODEV)).unwrap().is_none());
        assert!(asked(Ok(())).unwrap().is_some());
        let sys = Path::new("/sys");
        assert!(has(sys, "class").unwrap() && !has(sys, "nothing of this name").unwrap());
        assert_eq!(some(sys, "nothing of this name").unwrap(), None);
    }
}
