//! Bio-based devices: `block_bio_queue(bio *)` keeps the range, because a bio has lost it by the time of
//! `block_bio_complete(request_queue *, bio *)`. A bio is traced once at submission, split or not, and the traced bio
//! completes after all its parts, so its range covers them.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{INFLIGHT, TARGETS, copies, counters, offset},
    mark::mark,
};
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::warn;
use highwater_abi::{Inflight, Target, class, hook};

#[inline(always)]
unsafe fn bio_target(bio: u64) -> Option<&'static Target> {
    // SAFETY: `struct bio *`; entries stay readable for the program's run.
    let target = unsafe {
        let bdev: u64 = load(bio, offset!(bio_bdev));
        TARGETS.get(whole_disk(load(bdev, offset!(bdev_disk))))
    }?;
    (target.hook == hook::BIO).then_some(target)
}

/// One submission, seen by one copy.
///
/// # Safety
/// `ctx` must be of `block_bio_queue`.
#[inline(always)]
pub unsafe fn queue(ctx: &BtfTracePointContext, copy: u32) {
    let bio: u64 = ctx.arg(0);
    // SAFETY: `struct bio *`.
    let op = operation(unsafe { load::<u32>(bio, offset!(bio_opf)) });
    if !changes(op) || op >= OP_DRV_OUT {
        return;
    }
    // SAFETY: passed on.
    let Some(target) = (unsafe { bio_target(bio) }) else { return };
    let Some(count) = counters(target.counter, copy) else { return };
    // SAFETY: `struct bio *`.
    let (sector, bytes): (u64, u32) = unsafe { (load(bio, offset!(bio_sector)), load(bio, offset!(bio_size))) };
    if bytes == 0 {
        if op > 9 {
            count.unmarked += 1;
        }
        return;
    }
    if INFLIGHT.insert(bio, Inflight { sector, bytes: u64::from(bytes) }, 0).is_err() {
        count.inflight_full += 1;
        warn!(ctx, "too many writes in flight");
    }
    let class = if op == OP_DISCARD { class::DISCARD } else { class::WRITE };
    count.queued_sectors[class] += u64::from(bytes) >> 9;
}

/// One completion, seen by one copy.
///
/// # Safety
/// `ctx` must be of `block_bio_complete`.
#[inline(always)]
pub unsafe fn complete(ctx: &BtfTracePointContext, copy: u32) {
    let bio: u64 = ctx.arg(1);
    // SAFETY: `struct bio *`.
    let op = operation(unsafe { load::<u32>(bio, offset!(bio_opf)) });
    if !changes(op) || op >= OP_DRV_OUT {
        return;
    }
    // SAFETY: passed on.
    let Some(target) = (unsafe { bio_target(bio) }) else { return };
    let Some(count) = counters(target.counter, copy) else { return };
    // SAFETY: the entry is copied before it is removed.
    let Some(range) = (unsafe { INFLIGHT.get(bio) }).copied() else {
        count.orphans += 1;
        return;
    };
    // SAFETY: `struct bio *`.
    if unsafe { load::<u8>(bio, offset!(bio_status)) } != 0 {
        count.failed += 1;
    }
    // SAFETY: passed on.
    if !unsafe { mark(target, range.sector, (range.bytes + 511) >> 9) } {
        count.unmarked += 1;
        warn!(ctx, "no bitmap for sector {}", range.sector);
    }
    let class = if op == OP_DISCARD { class::DISCARD } else { class::WRITE };
    count.events[class] += 1;
    count.sectors[class] += range.bytes >> 9;
    // Only the last copy removes: the ones before it must still find the range. If the last one is skipped, the entry
    // stays until the address is used again, and is overwritten then.
    if copy + 1 >= copies() {
        let _ = INFLIGHT.remove(bio);
    }
}
