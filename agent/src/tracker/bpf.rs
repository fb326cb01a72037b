//! The few bpf(2) calls that aya does not offer for programs taken over from their pins.

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_info};
use std::{
    ffi::CString,
    io,
    mem::zeroed,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Most elements asked for in one call.
const ELEMENTS_MAX: usize = 1 << 16;

/// `bpf_prog_info.recursion_misses`: how often the kernel did not run a program since it was loaded.
pub fn recursion_misses(program: &OwnedFd) -> io::Result<u64> {
    // SAFETY: both are plain data for which zeros are valid.
    let (mut info, mut attr): (bpf_prog_info, bpf_attr) = unsafe { (zeroed(), zeroed()) };
    attr.info.bpf_fd = program.as_raw_fd() as u32;
    attr.info.info_len = size_of::<bpf_prog_info>() as u32;
    attr.info.info = &raw mut info as u64;
    // SAFETY: the kernel writes at most `info_len` bytes to `info`, which outlives the call.
    unsafe { call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info.recursion_misses)
}

/// Attaches a loaded `tp_btf` program; it knows its tracepoint. Closing what is answered detaches it, unless it is pinned.
pub fn attach(program: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: plain data for which zeros are valid.
    let mut attr: bpf_attr = unsafe { zeroed() };
    attr.raw_tracepoint.prog_fd = program.as_raw_fd() as u32;
    // SAFETY: no memory is passed: the name is null.
    let fd = unsafe { call(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr) }?;
    // SAFETY: a descriptor that the kernel just made.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Pins a map, program or link.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: plain data for which zeros are valid.
    let mut attr: bpf_attr = unsafe { zeroed() };
    // SAFETY: the union's member for this command; its fields are integers.
    let pin = unsafe { &mut attr.__bindgen_anon_4 };
    pin.bpf_fd = object.as_fd().as_raw_fd() as u32;
    pin.pathname = path.as_ptr() as u64;
    // SAFETY: the path outlives the call.
    unsafe { call(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// All elements of a hash map with keys of 8 bytes, read in few calls. What is added or removed meanwhile is in it or not.
///
/// `V` must be plain data of exactly the map's value size, for which any bytes are valid.
pub fn elements<V: aya::Pod>(map: &OwnedFd) -> io::Result<Vec<(u64, V)>> {
    let mut all = vec![];
    let mut room = 1024;
    let mut at: Option<u64> = None;
    loop {
        let mut keys = vec![0u64; room];
        // SAFETY: plain data for which zeros are valid.
        let mut values: Vec<V> = vec![unsafe { zeroed() }; room];
        let mut next = 0u64;
        // SAFETY: plain data for which zeros are valid.
        let mut attr: bpf_attr = unsafe { zeroed() };
        attr.batch.map_fd = map.as_raw_fd() as u32;
        attr.batch.in_batch = at.as_ref().map_or(0, |at| &raw const *at as u64);
        attr.batch.out_batch = &raw mut next as u64;
        attr.batch.keys = keys.as_mut_ptr() as u64;
        attr.batch.values = values.as_mut_ptr() as u64;
        attr.batch.count = room as u32;
        // SAFETY: the kernel writes at most `count` keys and values and one place (4 bytes); all outlive the call.
        let result = unsafe { call(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) };
        // SAFETY: written by the kernel, or as it was set.
        let count = (unsafe { attr.batch.count } as usize).min(room);
        let mut take = |all: &mut Vec<(u64, V)>| all.extend(keys.drain(..count).zip(values.drain(..count)));
        match result.map_err(|e| (e.raw_os_error(), e)) {
            Ok(_) => take(&mut all),
            Err((Some(libc::ENOENT), _)) => {
                take(&mut all);
                return Ok(all);
            }
            // One bucket alone holds more.
            Err((Some(libc::ENOSPC), _)) if room < ELEMENTS_MAX => {
                room *= 2;
                continue;
            }
            Err((_, error)) => return Err(error),
        }
        at = Some(next);
    }
}

/// # Safety
/// What the command reads and writes through the attribute must be valid.
unsafe fn call(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: the attribute's own size is passed; the rest is the caller's word.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, &raw mut *attr, size_of::<bpf_attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
