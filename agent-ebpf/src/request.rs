//! Request-based devices: `block_rq_complete(request *, blk_status_t, unsigned int bytes)`. It fires for whole, partial and
//! batched completions, before the request's sector is moved on and before waiters are woken.
//!
//! **The net.** A kernel can keep tracing programs from running in some contexts without counting a miss (seen on a
//! hardened kernel: nothing that interrupts a protected process is shown). A completion in such a context is lost to every
//! copy. So `block_rq_issue`, which runs in another context, notes each change in [`ISSUED`]; a completion that is seen takes
//! the note away. A note that is still there when its request is used again stands for a completion that was not
//! shown: its range is marked then, late, but after the change. User space does the same for notes that are left when
//! nothing is in flight. (A note is "taken away" by marking it as seen.)
//!
//! **Discards of several ranges.** One request can discard as many ranges as its device takes at once (NVMe: 256), merged from bios
//! that need not lie side by side; its sector is the first one's, its length the sum (`ranges`).
//!
//! With the net, a copy that finds its event noted as shown to a copy before has nothing left to do: that one marked it. So
//! each event is counted once, and the copies after the first cost little.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{ISSUED, TARGETS, counters, net, offset},
    mark::mark,
    ranges,
};
use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::BtfTracePointContext};
use aya_log_ebpf::{debug, warn};
use highwater_abi::{Counters, Issued, Target, class, hook};

/// The tracked device of a request. The request's own `part` can be null; its queue's disk is there for every I/O to a disk.
///
/// # Safety
/// `request` must be a `struct request *`.
#[inline(always)]
unsafe fn request_target(request: u64) -> Option<(u32, &'static Target)> {
    // SAFETY: a queue without a disk reads as device 0, which is never a target. Entries are only replaced by user space, and
    // stay readable for the program's run.
    let (dev, target) = unsafe {
        let queue: u64 = load(request, offset!(request_queue));
        let dev = whole_disk(load(queue, offset!(queue_disk)));
        (dev, TARGETS.get(dev)?)
    };
    (target.hook == hook::REQUEST).then_some((dev, target))
}

/// One completion, seen by one copy.
///
/// # Safety
/// `ctx` must be of `block_rq_complete`.
#[inline(always)]
pub unsafe fn complete(ctx: &BtfTracePointContext, copy: u32) {
    let (request, error, bytes): (u64, u8, u32) =
        (ctx.arg(0), ctx.arg::<u64>(1) as u8, ctx.arg::<u64>(2) as u32);
    // SAFETY: `struct request *`.
    let op = operation(unsafe { load::<u32>(request, offset!(request_cmd_flags)) });
    if !changes(op) {
        return;
    }
    // SAFETY: `struct request *`.
    let sector: u64 = unsafe { load(request, offset!(request_sector)) };
    // SAFETY: passed on.
    if copy > 0 && bytes != 0 && net() && unsafe { shown_before(request, sector) } {
        return;
    }
    // SAFETY: `struct request *`.
    let Some((dev, target)) = (unsafe { request_target(request) }) else { return };
    let Some(count) = counters(target.counter, copy) else { return };
    if op >= OP_DRV_OUT {
        if op == OP_DRV_OUT {
            count.passthrough += 1;
            debug!(ctx, "passthrough to device {}", dev);
        }
        return;
    }
    if bytes == 0 {
        // A flush (nothing changed), or a zone's reset, whose range is not told.
        if op > 9 {
            count.unmarked += 1;
        }
        return;
    }
    let sectors = (u64::from(bytes) + 511) >> 9;
    let marked = if op == OP_DISCARD {
        // SAFETY: passed on.
        unsafe { ranges::mark_discard(target, request, sector, sectors) }
    } else {
        // SAFETY: passed on.
        unsafe { mark(target, sector, sectors) }
    };
    if !marked {
        count.unmarked += 1;
        warn!(ctx, "device {}: no bitmap for sector {}", dev, sector);
    }
    let class = if op == OP_DISCARD { class::DISCARD } else { class::WRITE };
    if net() {
        // SAFETY: passed on.
        if !unsafe { settle(request, dev, target, count, class, sector, bytes) } {
            return;
        }
        count.first_sectors[class] += u64::from(bytes) >> 9;
    }
    count.events[class] += 1;
    count.sectors[class] += u64::from(bytes) >> 9;
    if error != 0 {
        count.failed += 1;
    }
}

/// Whether a copy before this one was shown this completion, and so has marked it.
///
/// # Safety
/// `request` must be a `struct request *`.
#[inline(always)]
unsafe fn shown_before(request: u64, sector: u64) -> bool {
    let Some(note) = ISSUED.get_ptr(request) else { return false };
    // SAFETY: `struct request *`, and an element of a map.
    unsafe {
        let started_ns: u64 = load(request, offset!(request_start_time));
        // Without start times (accounting switched off) a note can't be told from one that an earlier request left.
        started_ns != 0 && (*note).started_ns == started_ns && (*note).shown == sector + 1
    }
}

/// Writes a note, in place where its request has one.
#[inline(always)]
fn note_down(place: Option<*mut Issued>, request: u64, note: Issued) -> bool {
    match place {
        // SAFETY: an element of a map; one request is issued and completed by one CPU after the other.
        Some(place) => unsafe {
            *place = note;
            true
        },
        None => ISSUED.insert(request, note, 0).is_ok(),
    }
}

/// Notes that a completion was seen, and answers whether by this copy first. The copies are shown one completion one after the
/// other, and the completions of one request never at once.
///
/// # Safety
/// `request` must be a `struct request *`.
#[inline(always)]
unsafe fn settle(
    request: u64,
    dev: u32,
    target: &Target,
    count: &mut Counters,
    class: usize,
    sector: u64,
    bytes: u32,
) -> bool {
    // SAFETY: `struct request *`.
    let (length, started_ns) = unsafe {
        (load::<u32>(request, offset!(request_data_len)), load::<u64>(request, offset!(request_start_time)))
    };
    let whole = length == bytes;
    match ISSUED.get_ptr_mut(request) {
        // SAFETY: an element of a map.
        Some(note) if unsafe { (*note).started_ns == started_ns && (*note).dev == dev } => {
            // SAFETY: as above; stores of one word each.
            unsafe {
                let first = (*note).shown != sector + 1;
                (*note).shown = sector + 1;
                if whole {
                    (*note).seen = 1;
                }
                first
            }
        }
        // Its issue was not shown (or what is here is older). If this cannot be kept, the kernel will seem to count more
        // than was seen: a false alarm, never a silent loss.
        old => {
            // SAFETY: an element of a map, copied before it is replaced.
            if let Some(old) = old.map(|old| unsafe { *old })
                && old.seen == 0
                && old.dev == dev
            {
                // SAFETY: passed on.
                if !unsafe { mark_note(target, &old) } {
                    count.unmarked += 1;
                }
                let class = if old.class == class::DISCARD as u32 { class::DISCARD } else { class::WRITE };
                count.first_sectors[class] += old.bytes >> 9;
            }
            let note = Issued {
                sector,
                bytes: u64::from(bytes),
                started_ns,
                // SAFETY: a helper without conditions.
                issued_ns: unsafe { bpf_ktime_get_ns() },
                shown: sector + 1,
                dev,
                class: class as u32,
                seen: 1,
                // It is over: nobody marks by this note any more.
                scattered: 0,
            };
            note_down(old, request, note)
        }
    }
}

/// Marks what a note tells, late. False: not all of it is known, or a bitmap was too small.
///
/// # Safety
/// As for [`mark`].
#[inline(always)]
unsafe fn mark_note(target: &Target, note: &Issued) -> bool {
    // SAFETY: passed on.
    note.scattered == 0 && unsafe { mark(target, note.sector, (note.bytes + 511) >> 9) }
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
    // SAFETY: `struct request *`.
    let Some((dev, target)) = (unsafe { request_target(request) }) else { return };
    let Some(count) = counters(target.counter, copy) else { return };
    // SAFETY: `struct request *`.
    let note = unsafe {
        Issued {
            sector: load(request, offset!(request_sector)),
            bytes: u64::from(load::<u32>(request, offset!(request_data_len))),
            started_ns: load(request, offset!(request_start_time)),
            issued_ns: bpf_ktime_get_ns(),
            shown: 0,
            dev,
            class: if op == OP_DISCARD { class::DISCARD as u32 } else { class::WRITE as u32 },
            seen: 0,
            scattered: (op == OP_DISCARD && ranges::is_scattered(request)).into(),
        }
    };
    let place = ISSUED.get_ptr_mut(request);
    // SAFETY: an element of a map, copied before it is replaced.
    if let Some(old) = place.map(|old| unsafe { *old }) {
        // The same start: issued again after a requeue, not ended yet.
        if old.seen == 0 && old.started_ns != note.started_ns && old.dev == dev {
            // SAFETY: passed on.
            if !unsafe { mark_note(target, &old) } {
                count.unmarked += 1;
            }
            let class = if old.class == class::DISCARD as u32 { class::DISCARD } else { class::WRITE };
            count.late_sectors[class] += old.bytes >> 9;
        }
    }
    if note.bytes != 0 {
        note_down(place, request, note);
    }
}
