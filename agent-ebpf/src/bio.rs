//! Bio-based devices: `block_bio_queue(bio *)` keeps the range, because a bio has lost it by the time of
//! `block_bio_complete(request_queue *, bio *)`. A bio is traced once at submission, split or not, and the traced bio
//! completes after all its parts, so its range covers them.
//!
//! As with requests (see `request`), an entry whose completion no program was shown is marked when its bio's address is
//! used again, or by user space when nothing is in flight.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{INFLIGHT, TARGETS, copies, counters, offset},
    mark::mark,
};
use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::BtfTracePointContext};
use aya_log_ebpf::warn;
use highwater_abi::{Issued, Target, class, hook};

#[inline(always)]
unsafe fn bio_target(bio: u64) -> Option<(u32, &'static Target)> {
    // SAFETY: `struct bio *`; entries stay readable for the program's run.
    let (dev, target) = unsafe {
        let bdev: u64 = load(bio, offset!(bio_bdev));
        let dev = whole_disk(load(bdev, offset!(bdev_disk)));
        (dev, TARGETS.get(dev)?)
    };
    (target.hook == hook::BIO).then_some((dev, target))
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
    let Some((dev, target)) = (unsafe { bio_target(bio) }) else { return };
    let Some(count) = counters(target.counter, copy) else { return };
    // SAFETY: `struct bio *`.
    let (sector, bytes): (u64, u32) =
        unsafe { (load(bio, offset!(bio_sector)), load(bio, offset!(bio_size))) };
    if bytes == 0 {
        if op > 9 {
            count.unmarked += 1;
        }
        return;
    }
    let class = if op == OP_DISCARD { class::DISCARD } else { class::WRITE };
    let mut first = true;
    // SAFETY: copied before it is replaced.
    if let Some(old) = (unsafe { INFLIGHT.get(bio) }).copied() {
        // The copies of one event come one after the other: the same range again is this bio, noted by a copy before.
        let same = old.dev == dev && old.sector == sector && old.bytes == u64::from(bytes);
        first = old.seen != 0 || !same;
        // SAFETY: passed on.
        if old.seen == 0
            && old.dev == dev
            && !same
            && !unsafe { mark(target, old.sector, (old.bytes + 511) >> 9) }
        {
            count.unmarked += 1;
        }
    }
    let note = Issued {
        sector,
        bytes: u64::from(bytes),
        started_ns: 0,
        // SAFETY: a helper without conditions.
        issued_ns: unsafe { bpf_ktime_get_ns() },
        shown: 0,
        dev,
        class: class as u32,
        seen: 0,
        scattered: 0,
    };
    if INFLIGHT.insert(bio, note, 0).is_err() {
        count.inflight_full += 1;
        warn!(ctx, "too many writes in flight");
    } else if first {
        count.first_sectors[class] += u64::from(bytes) >> 9;
    }
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
    let Some((_, target)) = (unsafe { bio_target(bio) }) else { return };
    let Some(count) = counters(target.counter, copy) else { return };
    let Some(note) = INFLIGHT.get_ptr_mut(bio) else {
        count.orphans += 1;
        return;
    };
    // SAFETY: an element of a map; copied before it is removed.
    let range = unsafe {
        (*note).seen = 1;
        *note
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
