//! Completions, so that the reader knows which writes are in flight: `block_rq_complete(request *, blk_status_t, unsigned int
//! bytes)` and, for bio-based devices, `block_bio_complete(request_queue *, bio *)`.
//!
//! One copy each: a completion that is not shown makes the reader take a write to be in flight for too long, which costs a
//! block read again: the tracker's bits are marked by programs of their own.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, peek, whole_disk},
    maps::{CAPTURE_COUNTERS, is_captured, offset},
    walk::put_header,
};
use aya_ebpf::{helpers::generated::bpf_loop, programs::BtfTracePointContext};
use core::ffi::c_void;
use highwater_abi::stream::{Header, kind};

/// A completed range of a request.
///
/// # Safety
/// `ctx` must be of `block_rq_complete`.
#[inline(always)]
pub unsafe fn request(ctx: &BtfTracePointContext, copy: u32) {
    let (request, status, bytes): (u64, u8, u32) =
        (ctx.arg(0), ctx.arg::<u64>(1) as u8, ctx.arg::<u64>(2) as u32);
    // SAFETY: `struct request *`.
    let op = operation(unsafe { load::<u32>(request, offset!(request_cmd_flags)) });
    if !changes(op) || op >= OP_DRV_OUT || bytes == 0 {
        return;
    }
    // SAFETY: `struct request *`; a queue without a disk reads as device 0, which is never captured.
    let dev = unsafe { whole_disk(load(load(request, offset!(request_queue)), offset!(queue_disk))) };
    // SAFETY: `struct request *`.
    let (sector, bio): (u64, u64) =
        unsafe { (load(request, offset!(request_sector)), load(request, offset!(request_bio))) };
    let header = Header {
        at: sector << 9,
        bio,
        dev,
        bytes,
        kind: kind::COMPLETE,
        more: 0,
        flags: u32::from(status) | op << 8,
    };
    // SAFETY: `struct bio *`; no bio reads as no bytes.
    if op == OP_DISCARD && unsafe { load::<u32>(bio, offset!(bio_size)) } != bytes {
        let mut ranges = Ranges { header, bio, left: bytes, copy };
        // SAFETY: the context outlives the call.
        unsafe {
            bpf_loop(BIOS_MAX, discarded as *mut c_void, (&raw mut ranges).cast(), 0);
        }
        return;
    }
    put(copy, header);
}

/// More than any request has.
const BIOS_MAX: u32 = 1 << 16;

/// A walk over the ranges of a discard, one a bio, which need not lie side by side.
struct Ranges {
    header: Header,
    bio: u64,
    /// Bytes that have completed and are not told yet.
    left: u32,
    copy: u32,
}

unsafe extern "C" fn discarded(_: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `request` gave it.
    let walk = unsafe { &mut *context.cast::<Ranges>() };
    if walk.left == 0 || walk.bio == 0 {
        return 1;
    }
    let mut failed = 0;
    // SAFETY: `struct bio *`.
    let (sector, bytes, next): (u64, u32, u64) = unsafe {
        (
            peek(walk.bio, offset!(bio_sector), &mut failed),
            peek(walk.bio, offset!(bio_size), &mut failed),
            peek(walk.bio, offset!(bio_next), &mut failed),
        )
    };
    if failed != 0 || bytes == 0 {
        // What is not told seems to be in flight for a while.
        return 1;
    }
    let done = if bytes < walk.left { bytes } else { walk.left };
    put(walk.copy, Header { at: sector << 9, bio: walk.bio, bytes: done, ..walk.header });
    walk.left -= done;
    walk.bio = next;
    0
}

/// A completed bio. Its range is gone by now.
///
/// # Safety
/// `ctx` must be of `block_bio_complete`.
#[inline(always)]
pub unsafe fn bio(ctx: &BtfTracePointContext, copy: u32) {
    let bio: u64 = ctx.arg(1);
    // SAFETY: `struct bio *`.
    let op = operation(unsafe { load::<u32>(bio, offset!(bio_opf)) });
    if !changes(op) || op >= OP_DRV_OUT {
        return;
    }
    // SAFETY: `struct bio *`.
    let (dev, status) = unsafe {
        let bdev: u64 = load(bio, offset!(bio_bdev));
        (whole_disk(load(bdev, offset!(bdev_disk))), load::<u8>(bio, offset!(bio_status)))
    };
    put(
        copy,
        Header {
            at: 0,
            bio,
            dev,
            bytes: 0,
            kind: kind::COMPLETE,
            more: 0,
            flags: u32::from(status) | op << 8,
        },
    );
}

#[inline(always)]
fn put(copy: u32, header: Header) {
    if !is_captured(header.dev) || put_header(header) {
        return;
    }
    // No room for this: there was none for what is submitted now either, most likely. Told all the same.
    if let Some(count) = CAPTURE_COUNTERS.get_ptr_mut(copy) {
        // SAFETY: per-CPU. The two programs share it and can interrupt each other; a count that is lost so is one of several.
        unsafe { (*count).dropped += 1 };
    }
}
