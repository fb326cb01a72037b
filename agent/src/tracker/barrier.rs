//! Waits until every tracepoint handler that is running now is over.
//!
//! Replacing a bitmap waits for running *programs* (the kernel's `maybe_wait_bpf_programs`). Where tracepoints run with
//! preemption off that outlasts whole handlers, all copies of an event included. With preemptible tracepoints (7.0 and
//! later) it does not; unregistering any tracepoint does (`tracepoint_synchronize_unregister`), and closing a
//! disabled perf event on one gets there.

use super::TrackerError;
use std::{
    fs, io,
    os::fd::{FromRawFd, OwnedFd},
};

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const ATTR_DISABLED: u64 = 1;

#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample: [u64; 3],
    flags: u64,
    rest: [u64; 2],
}

/// The event's number, found once.
pub struct Barrier {
    event: u64,
}

impl Barrier {
    /// Finds the tracepoint in tracefs.
    ///
    /// # Errors
    /// [`TrackerError::Unsupported`] if tracefs is not mounted.
    pub fn new() -> Result<Self, TrackerError> {
        for root in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
            if let Ok(text) = fs::read_to_string(format!("{root}/events/block/block_rq_complete/id"))
                && let Ok(event) = text.trim().parse()
            {
                return Ok(Self { event });
            }
        }
        Err(TrackerError::Unsupported("tracefs mounted at /sys/kernel/tracing".into()))
    }

    /// Waits.
    ///
    /// # Errors
    /// [`TrackerError::Kernel`] if the kernel refuses the perf event.
    pub fn wait(&self) -> Result<(), TrackerError> {
        let attr = PerfEventAttr {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<PerfEventAttr>() as u32,
            config: self.event,
            flags: ATTR_DISABLED,
            ..PerfEventAttr::default()
        };
        // SAFETY: the attribute is of the first published size (64 bytes) and outlives the call.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, &raw const attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC)
        };
        if fd < 0 {
            return Err(TrackerError::kernel("wait for running tracepoints", &io::Error::last_os_error()));
        }
        // SAFETY: a descriptor that the kernel just made; closing it does the waiting.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        Ok(())
    }
}
