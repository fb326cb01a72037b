//! Request-based devices: `block_rq_complete(request *, blk_status_t, unsigned int bytes)`. It fires for whole, partial and
//! batched completions, before the request's sector is moved on and before waiters are woken.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{TARGETS, counters, offset},
    mark::mark,
};
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::{debug, warn};
use highwater_abi::{class, hook};

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
}
