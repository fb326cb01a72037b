//! Request-based devices: `block_rq_complete(request *, blk_status_t, unsigned int bytes)`. It fires for whole, partial and
//! batched completions, before the request's sector is moved on and before waiters are woken.
//!
//! **The net.** A kernel can keep tracing programs from running in some contexts without counting a miss (seen on a
//! hardened kernel: nothing that interrupts a protected process is shown). A completion in such a context is lost to every
//! copy. So `block_rq_issue`, which runs in another context, notes each change in [`ISSUED`]; a completion that is seen takes
//! the note away. A note that is still there when its request is used again stands for a completion that was not
//! shown: its range is marked then, late, but after the change. User space does the same for notes that are left when
//! nothing is in flight.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{ISSUED, TARGETS, copies, counters, net, offset},
    mark::mark,
};
use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::BtfTracePointContext};
use aya_log_ebpf::{debug, warn};
use highwater_abi::{Issued, class, hook};

/// One completion, seen by one copy.
///
/// # Safety
/// `ctx` must be of `block_rq_complete`.
#[inline(always)]
pub unsafe fn complete(ctx: &BtfTracePointContext, copy: u32) {
    let (request, error, bytes): (u64, u8, u32) = (ctx.arg(0), ctx.arg::<u64>(1) as u8, ctx.arg::<u64>(2) as u32);
    // SAFETY: `struct request *`.
    let op = operation(unsafe { load::<u32>(request, offset!(request_cmd_flags)) });
    if !changes(op) {
        return;
    }
    // The request's own `part` can be null; its queue's disk is there for every I/O to a disk.
    // SAFETY: as above; a queue without a disk reads as device 0, which is never a target.
    let dev = unsafe {
        let queue: u64 = load(request, offset!(request_queue));
        whole_disk(load(queue, offset!(queue_disk)))
    };
    // SAFETY: entries are only replaced by user space, and stay readable for the program's run.
    let Some(target) = (unsafe { TARGETS.get(dev) }) else { return };
    if target.hook != hook::REQUEST {
        return;
    }
    let Some(count) = counters(target.counter, copy) else { return };
    if op >= OP_DRV_OUT {
        if op == OP_DRV_OUT {
            count.passthrough += 1;
            debug!(ctx, "passthrough to device {}", dev);
        }
        return;
    }
    if error != 0 {
        count.failed += 1;
    }
    if bytes == 0 {
        // A flush (nothing changed), or a zone's reset, whose range is not told.
        if op > 9 {
            count.unmarked += 1;
        }
        return;
    }
    let sectors = (u64::from(bytes) + 511) >> 9;
    // SAFETY: `struct request *`.
    let sector: u64 = unsafe { load(request, offset!(request_sector)) };
    // SAFETY: passed on.
    if !unsafe { mark(target, sector, sectors) } {
        count.unmarked += 1;
        warn!(ctx, "device {}: no bitmap for sector {}", dev, sector);
    }
    let class = if op == OP_DISCARD { class::DISCARD } else { class::WRITE };
    count.events[class] += 1;
    count.sectors[class] += u64::from(bytes) >> 9;
    if net() {
        // SAFETY: `struct request *`.
        let whole = unsafe { load::<u32>(request, offset!(request_data_len)) } == bytes;
        if whole && let Some(note) = ISSUED.get_ptr_mut(request) {
            // SAFETY: an element of a map; a store of one word.
            unsafe { (*note).seen = 1 };
            if copy + 1 >= copies() {
                let _ = ISSUED.remove(request);
            }
        }
    }
}

/// One issue.
///
/// # Safety
/// `ctx` must be of `block_rq_issue(request *)`.
#[inline(always)]
pub unsafe fn issue(ctx: &BtfTracePointContext, copy: u32) {
    let request: u64 = ctx.arg(0);
    // SAFETY: `struct request *`.
    let op = operation(unsafe { load::<u32>(request, offset!(request_cmd_flags)) });
    if !changes(op) || op >= OP_DRV_OUT {
        return;
    }
    // SAFETY: as in `complete`.
    let dev = unsafe {
        let queue: u64 = load(request, offset!(request_queue));
        whole_disk(load(queue, offset!(queue_disk)))
    };
    // SAFETY: as in `complete`.
    let Some(target) = (unsafe { TARGETS.get(dev) }) else { return };
    if target.hook != hook::REQUEST {
        return;
    }
    let Some(count) = counters(target.counter, copy) else { return };
    // SAFETY: `struct request *`.
    let note = unsafe {
        Issued {
            sector: load(request, offset!(request_sector)),
            bytes: u64::from(load::<u32>(request, offset!(request_data_len))),
            started_ns: load(request, offset!(request_start_time)),
            issued_ns: bpf_ktime_get_ns(),
            dev,
            class: if op == OP_DISCARD { class::DISCARD as u32 } else { class::WRITE as u32 },
            seen: 0,
            reserved: 0,
        }
    };
    // SAFETY: copied before it is replaced.
    if let Some(old) = (unsafe { ISSUED.get(request) }).copied() {
        // The same start: issued again after a requeue, not ended yet.
        if old.seen == 0 && old.started_ns != note.started_ns && old.dev == dev {
            // SAFETY: passed on.
            if !unsafe { mark(target, old.sector, (old.bytes + 511) >> 9) } {
                count.unmarked += 1;
            }
            let class = if old.class == class::DISCARD as u32 { class::DISCARD } else { class::WRITE };
            count.late_sectors[class] += old.bytes >> 9;
        }
    }
    if note.bytes != 0 {
        let _ = ISSUED.insert(request, note, 0);
    }
}
