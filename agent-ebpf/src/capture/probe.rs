//! Reads a page of the agent's own through the way of capture: to find the kernel's memory bases, and to verify them.
//!
//! The agent reads a block with direct I/O into a page whose content it knows. When the bio is queued, the page still
//! holds that content, and the bio points at the page's structure. Nothing is written anywhere.

use crate::{
    kernel::{load, operation},
    maps::{CAPTURE_COUNTERS, PROBE, WALKS, offset},
    walk,
};
use aya_ebpf::{
    helpers::generated::{bpf_get_current_pid_tgid, bpf_get_current_task, bpf_loop, bpf_probe_read_kernel},
    programs::BtfTracePointContext,
};
use core::{ffi::c_void, ptr::read_volatile};
use highwater_abi::stream::{Header, Probe, kind, probe};

const OP_READ: u32 = 0;
const GIB: u64 = 1 << 30;

/// One submission.
///
/// # Safety
/// `ctx` must be of `block_bio_queue`.
#[inline(always)]
pub unsafe fn queue(ctx: &BtfTracePointContext, copy: u32) {
    let Some(cell) = PROBE.get_ptr_mut(0) else { return };
    // SAFETY: an element of a map; user space waits for the read before it looks.
    let probe = unsafe { &mut *cell };
    // SAFETY: a helper without conditions.
    let thread = unsafe { bpf_get_current_pid_tgid() } & 0xffff_ffff;
    if probe.thread == 0 || probe.thread != thread {
        return;
    }
    let bio: u64 = ctx.arg(0);
    // SAFETY: `struct bio *`.
    let flags: u32 = unsafe { load(bio, offset!(bio_opf)) };
    if operation(flags) != OP_READ {
        return;
    }
    // SAFETY: `struct bio *`.
    let (segments, index, sector, bytes): (u64, u32, u64, u32) = unsafe {
        (
            load(bio, offset!(bio_io_vec)),
            load(bio, offset!(bio_idx)),
            load(bio, offset!(bio_sector)),
            load(bio, offset!(bio_size)),
        )
    };
    match probe.what {
        probe::LOCATE => {
            let mut vec = [0u64; 2];
            let at = segments + u64::from(index) * 16;
            // SAFETY: the destination is as long as what is read.
            if unsafe { bpf_probe_read_kernel(vec.as_mut_ptr().cast(), 16, at as *const c_void) } != 0 {
                return;
            }
            probe.page = vec[0];
            probe.bytes = vec[1] & 0xffff_ffff;
            probe.offset = vec[1] >> 32;
            // SAFETY: a helper without conditions.
            probe.task = unsafe { bpf_get_current_task() };
        }
        probe::SEARCH => {
            probe.hits = 0;
            let mut pointer = cell;
            // SAFETY: the pointer outlives the call.
            unsafe {
                bpf_loop(probe.steps as u32, candidate as *mut c_void, (&raw mut pointer).cast(), 0);
            }
        }
        probe::CAPTURE => {
            let Some(element) = WALKS.get_ptr_mut(copy) else { return };
            let header = Header { at: sector << 9, bio: 0, dev: 0, bytes, kind: kind::PROBE, more: 0, flags };
            // SAFETY: `struct bio *`; the element is the probe's own.
            unsafe {
                walk::begin(&mut *element, bio, header, bytes);
                walk::run(element);
            }
            let Some(count) = CAPTURE_COUNTERS.get_ptr_mut(copy) else { return };
            // SAFETY: the loop has written to the walk through its own pointer; the counters are the probe's own.
            unsafe {
                let left = read_volatile(&raw const (*element).left);
                (*count).bios += 1;
                (*count).bytes += u64::from(bytes.wrapping_sub(left));
                (*count).dropped += u64::from(read_volatile(&raw const (*element).dropped));
                (*count).faults += u64::from(read_volatile(&raw const (*element).faults));
            }
        }
        _ => {}
    }
}

/// Whether the page's content is found where it would be if the direct mapping began at this candidate.
unsafe extern "C" fn candidate(index: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `queue` gave it: a pointer to the place of a pointer to a map's element.
    let probe = unsafe { &mut **context.cast::<*mut Probe>() };
    let base = probe.from.wrapping_sub(index.wrapping_mul(GIB));
    let at = base.wrapping_add(probe.frame << 12);
    let mut words = [0u64; 2];
    // SAFETY: the destination is as long as what is read; a bad address is an error, not a fault.
    let read = unsafe { bpf_probe_read_kernel(words.as_mut_ptr().cast(), 16, at as *const c_void) };
    if read == 0 && words == probe.magic {
        probe.hits += 1;
        probe.found = base;
    }
    0
}
