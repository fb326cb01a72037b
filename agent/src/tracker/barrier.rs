//! Waits until every tracing program and completion that is running now is over.
//!
//! Where tracepoints run with preemption off, a grace period of RCU outlasts whole handlers, all copies of an event included
//! (`membarrier`). With preemptible tracepoints (7.0 and later) it does not; unregistering any tracepoint does
//! (`tracepoint_synchronize_unregister`), and closing a disabled perf event on one gets there, if it was the last one on that
//! tracepoint: so one is taken that nobody else is likely to watch, since it only fires while the kernel starts.
//!
//! A grace period also outlasts every completion that had begun in interrupt or softirq context: see `quiet`.

use super::TrackerError;
use std::{
    fs, io,
    os::fd::{FromRawFd, OwnedFd},
};

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const ATTR_DISABLED: u64 = 1;
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

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

/// Tracepoints to close an event on, the least watched one first.
const EVENTS: [&str; 3] = ["initcall/initcall_level", "initcall/initcall_start", "block/block_rq_remap"];

/// How to wait on this kernel.
pub struct Barrier {
    grace_periods: bool,
    /// The number of a tracepoint's event, where tracepoints must be waited for too, or instead.
    event: Option<u64>,
}

impl Barrier {
    /// Finds out how. `preemptible`: tracepoints are.
    ///
    /// # Errors
    /// [`TrackerError::Unsupported`] if tracefs is needed and not mounted.
    pub fn new(preemptible: bool) -> Result<Self, TrackerError> {
        // Kernels with nohz_full CPUs refuse it.
        let grace_periods = grace_period();
        let event = if preemptible || !grace_periods { Some(event()?) } else { None };
        Ok(Self { grace_periods, event })
    }

    /// Waits: some milliseconds to some tens of them.
    ///
    /// # Errors
    /// [`TrackerError::Kernel`] if the kernel refuses: nothing has been waited for.
    pub fn wait(&self) -> Result<(), TrackerError> {
        let refused = || TrackerError::kernel("wait for running tracepoints", &io::Error::last_os_error());
        if let Some(event) = self.event {
            let attr = PerfEventAttr {
                kind: PERF_TYPE_TRACEPOINT,
                size: size_of::<PerfEventAttr>() as u32,
                config: event,
                flags: ATTR_DISABLED,
                ..PerfEventAttr::default()
            };
            // SAFETY: the attribute is of the first published size (64 bytes) and outlives the call.
            let fd = unsafe {
                libc::syscall(libc::SYS_perf_event_open, &raw const attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC)
            };
            if fd < 0 {
                return Err(refused());
            }
            // SAFETY: a descriptor that the kernel just made; closing it does the waiting.
            drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        }
        if self.grace_periods && !grace_period() {
            return Err(refused());
        }
        Ok(())
    }
}

fn grace_period() -> bool {
    // SAFETY: no memory is passed.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 }
}

fn event() -> Result<u64, TrackerError> {
    for root in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
        for name in EVENTS {
            if let Ok(text) = fs::read_to_string(format!("{root}/events/{name}/id"))
                && let Ok(event) = text.trim().parse()
            {
                return Ok(event);
            }
        }
    }
    Err(TrackerError::Unsupported("tracefs mounted at /sys/kernel/tracing".into()))
}
