//! How long the kernel's own statistics say that eBPF programs run: those that are pinned, and those that this process holds.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// Statistics are on while this lives; they cost each program some 60 ns.
pub struct Statistics(String);

impl Statistics {
    /// Switches them on.
    pub fn on() -> Result<Self> {
        let before = fs::read_to_string(SWITCH)?;
        fs::write(SWITCH, "1")?;
        Ok(Statistics(before))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.0.trim());
    }
}

/// What one program did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ran {
    /// In it, nanoseconds.
    pub time_ns: u64,
    /// Runs.
    pub count: u64,
}

/// Of every program pinned in the agent's directory, by name.
pub fn read(bpf_dir: &Path) -> Result<BTreeMap<String, Ran>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(bpf_dir.join("programs"))? {
        let entry = entry?;
        let fd = open(&entry.path()).with_context(|| entry.path().display().to_string())?;
        all.insert(entry.file_name().to_string_lossy().into_owned(), ran(fd.as_raw_fd())?);
    }
    Ok(all)
}

/// Of every program that this process holds open and whose name begins so, by name (the kernel keeps 15 characters of it).
pub fn held(prefix: &str) -> Result<BTreeMap<String, Ran>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // The descriptor of this listing itself is gone by the time it is looked at.
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        if link != Path::new("anon_inode:bpf-prog") {
            continue;
        }
        let fd: RawFd = entry.file_name().to_string_lossy().parse()?;
        let name = name(fd)?;
        if name.starts_with(prefix) {
            all.insert(name, ran(fd)?);
        }
    }
    Ok(all)
}

fn ran(fd: RawFd) -> Result<Ran> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let of = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("no {name} in fdinfo"))
    };
    Ok(Ran { time_ns: of("run_time_ns")?, count: of("run_cnt")? })
}

/// `bpf_prog_info.name`: fdinfo does not tell it.
fn name(fd: RawFd) -> Result<String> {
    #[repr(C)]
    struct InfoAttributes {
        fd: u32,
        length: u32,
        info: u64,
    }
    const NAME_AT: usize = 64;
    const NAME_BYTES: usize = 16;
    // Of the structure only the part up to the name is asked for. The pointers in it are null: nothing is written to them.
    let mut info = [0u64; (NAME_AT + NAME_BYTES) / 8];
    let attributes = InfoAttributes {
        fd: u32::try_from(fd)?,
        length: size_of_val(&info) as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which is that long and outlives the call, as the attributes do.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET_INFO_BY_FD,
            &raw const attributes,
            size_of::<InfoAttributes>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error().into());
    }
    let bytes: Vec<u8> = info[NAME_AT / 8..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned())
}

fn open(path: &Path) -> Result<OwnedFd> {
    #[repr(C)]
    struct ObjectAttributes {
        pathname: u64,
        fd: u32,
        flags: u32,
    }
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let attributes = ObjectAttributes { pathname: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attributes and the path they point to outlive the call, and the size is theirs.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<ObjectAttributes>())
    };
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: a descriptor that the kernel just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}
