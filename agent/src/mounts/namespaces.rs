//! `/proc/*/mountinfo` of every mount namespace, merged.
//!
//! Processes are told apart by namespace *and* root directory: the mountinfo of a process shows only what lies below its
//! root, so one chrooted daemon must not stand for the whole namespace.

use super::MountsError;
use crate::device::{DevNumber, sysfs};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

/// Far above any real machine's; bounds what a hostile container can make the agent read.
const MOUNTINFO_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Processes of one namespace that are tried, should the first vanish.
const PIDS_PER_NAMESPACE: usize = 4;

/// A line of a mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub id: u64,
    pub dev: DevNumber,
    /// From the agent's point of view.
    pub path: PathBuf,
    pub fs_type: String,
    pub source: String,
    pub super_options: String,
}

/// All mounts of all namespaces, the agent's own first.
pub(super) fn mounts() -> Result<Vec<Mount>, MountsError> {
    let own = Path::new("/proc/self");
    let mut all = parse(&read_mountinfo(own)?, Path::new("/"));
    let own_key = view_key(own);
    let mut views: BTreeMap<(PathBuf, PathBuf), Vec<PathBuf>> = BTreeMap::new();
    let entries =
        fs::read_dir("/proc").map_err(|source| MountsError::Read { path: "/proc".into(), source })?;
    for entry in entries.flatten() {
        if !entry.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let process = entry.path();
        // A process that vanished, or a zombie.
        let Some(key) = view_key(&process) else { continue };
        if Some(&key) != own_key.as_ref() {
            let pids = views.entry(key).or_default();
            if pids.len() < PIDS_PER_NAMESPACE {
                pids.push(process);
            }
        }
    }
    for pids in views.values() {
        if let Some((process, text)) =
            pids.iter().find_map(|process| Some((process, read_mountinfo(process).ok()?)))
        {
            all.extend(parse(&text, &process.join("root")));
        }
    }
    Ok(all)
}

fn view_key(process: &Path) -> Option<(PathBuf, PathBuf)> {
    Some((fs::read_link(process.join("ns/mnt")).ok()?, fs::read_link(process.join("root")).ok()?))
}

fn read_mountinfo(process: &Path) -> Result<Vec<u8>, MountsError> {
    let path = process.join("mountinfo");
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MOUNTINFO_BYTES_MAX).read_to_end(&mut text))
        .map_err(|source| MountsError::Read { path, source })?;
    Ok(text)
}

pub(super) fn parse(text: &[u8], root: &Path) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(|line| parse_line(line, root)).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8], root: &Path) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = text(fields.next()?).parse().ok()?;
    let dev = sysfs::parse_number(&text(fields.nth(1)?))?;
    let inner = unescape(fields.nth(1)?);
    // Optional fields end with a dash.
    fields.find(|field| *field == b"-")?;
    let fs_type = text(fields.next()?);
    let source = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let super_options = text(fields.next().unwrap_or_default());
    let below = inner.strip_prefix(b"/").unwrap_or(&inner);
    let path = if below.is_empty() { root.to_owned() } else { root.join(OsStr::from_bytes(below)) };
    Some(Mount { id, dev, path, fs_type, source, super_options })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

/// Space, tab, newline and backslash stand as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\')
            .then(|| std::str::from_utf8(tail.get(..3)?).ok().and_then(|o| u8::from_str_radix(o, 8).ok()))
            .flatten();
        if let Some(byte) = octal {
            plain.push(byte);
            rest = &tail[3..];
        } else {
            plain.push(*first);
            rest = tail;
        }
    }
    std::ffi::OsString::from_vec(plain).into_vec()
}

/// The mount an open file belongs to, and the file's type (`S_IFMT`). Asks no server and no disk.
pub(super) fn mount_id(file: &File) -> io::Result<(u64, u32)> {
    let mut stat = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path is a NUL-terminated constant and the result is written to a `struct statx` that we own.
    let rc = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            flags,
            libc::STATX_MNT_ID | libc::STATX_TYPE,
            stat.as_mut_ptr(),
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before the call, and all fields are plain integers.
    let stat = unsafe { stat.assume_init() };
    if stat.stx_mask & libc::STATX_MNT_ID == 0 {
        return Err(io::Error::other("the kernel does not tell mount numbers (before 5.8)"));
    }
    Ok((stat.stx_mnt_id, u32::from(stat.stx_mode) & libc::S_IFMT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_lines_with_and_without_optional_fields() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402\134x rw,noatime master:1 shared:2 - ext3 /dev/ro\011ot rw,errors=continue";
        let mount = parse_line(line, Path::new("/proc/7/root")).expect("well-formed");
        assert_eq!(mount.path, Path::new(r"/proc/7/root/mnt 2\x"));
        assert_eq!((mount.id, mount.dev, mount.source.as_str()), (36, (98, 0), "/dev/ro\tot"));
        let bare = parse_line(b"27 1 254:0 / / rw - ext4 /dev/vda rw", Path::new("/")).expect("well-formed");
        assert_eq!((bare.path.as_path(), bare.fs_type.as_str()), (Path::new("/"), "ext4"));
        for broken in [&b""[..], b"x", b"1 2 3:4 / /", b"1 2 3:4 / / rw -", b"1 2 3:4 / / rw - ext4"] {
            assert_eq!(parse_line(broken, Path::new("/")), None);
        }
    }
}
