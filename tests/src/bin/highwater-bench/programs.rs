//! How long the kernel's own statistics say that the tracking programs run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
const BPF_OBJ_GET: libc::c_int = 7;

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
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let of = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("no {name} in fdinfo"))
        };
        let ran = Ran { time_ns: of("run_time_ns")?, count: of("run_cnt")? };
        all.insert(entry.file_name().to_string_lossy().into_owned(), ran);
    }
    Ok(all)
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
