//! Values of eBPF maps of other processes, by the maps' names: to spoil what the kernel's side of a daemon works with.

use anyhow::{Context, Result, bail};
use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

// enum bpf_cmd of linux/bpf.h.
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_GET_NEXT_ID: libc::c_int = 12;
const MAP_GET_FD_BY_ID: libc::c_int = 14;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// `union bpf_attr`, as far as it is used here: every command reads a part of it.
type Attributes = [u64; 4];

fn bpf(command: libc::c_int, attributes: &mut Attributes) -> io::Result<i64> {
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the attributes, and whatever they point to, outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The first `struct bpf_map_info` members up to the name: type, id, sizes of key and value, elements, flags, name.
#[repr(C)]
#[derive(Default)]
struct Info {
    numbers: [u32; 6],
    name: [u8; 16],
}

/// A map with elements of a known layout under keys of four bytes.
pub struct BpfMap(OwnedFd);

impl BpfMap {
    /// The newest one of this name, of any process.
    ///
    /// # Errors
    /// There is none.
    pub fn newest(name: &str) -> Result<Self> {
        let (mut found, mut after) = (None, 0u32);
        loop {
            // start_id, and next_id in the upper half of the same word.
            let mut attributes: Attributes = [u64::from(after), 0, 0, 0];
            if bpf(MAP_GET_NEXT_ID, &mut attributes).is_err() {
                break;
            }
            after = (attributes[0] >> 32) as u32;
            let Ok(fd) = bpf(MAP_GET_FD_BY_ID, &mut [u64::from(after), 0, 0, 0]) else { continue };
            // SAFETY: a descriptor that the kernel just made.
            let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
            let mut info = Info::default();
            let about = u64::from(fd.as_raw_fd() as u32) | (size_of::<Info>() as u64) << 32;
            bpf(OBJ_GET_INFO_BY_FD, &mut [about, (&raw mut info) as u64, 0, 0])?;
            if CStr::from_bytes_until_nul(&info.name).is_ok_and(|n| n.to_bytes() == name.as_bytes()) {
                found = Some(Self(fd));
            }
        }
        found.with_context(|| format!("no map is called {name}"))
    }

    /// Element `key`. `T`: plain data, exactly as long as the map's values.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn get<T: Copy + Default>(&self, key: u32) -> Result<T> {
        let mut value = T::default();
        self.call(MAP_LOOKUP_ELEM, key, (&raw mut value) as u64)?;
        Ok(value)
    }

    /// Replaces element `key`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set<T: Copy>(&self, key: u32, value: T) -> Result<()> {
        self.call(MAP_UPDATE_ELEM, key, (&raw const value) as u64)
    }

    fn call(&self, command: libc::c_int, key: u32, value: u64) -> Result<()> {
        let mut attributes = [u64::from(self.0.as_raw_fd() as u32), (&raw const key) as u64, value, 0];
        if let Err(error) = bpf(command, &mut attributes) {
            bail!("element {key} of a map: {error}");
        }
        Ok(())
    }
}
