//! Completions, so that the reader knows which writes are in flight: `block_rq_complete(request *, blk_status_t, unsigned int
//! bytes)` and, for bio-based devices, `block_bio_complete(request_queue *, bio *)`.
//!
//! One copy each: a completion that is not shown makes the reader take a write to be in flight for too long, which costs a
//! block read again, and loses nothing.

use crate::{
    kernel::{OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{CAPTURE_COUNTERS, CAPTURED, offset},
    walk::put_header,
};
use aya_ebpf::programs::BtfTracePointContext;
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
    put(
        copy,
        Header {
            at: sector << 9,
            bio,
            dev,
            bytes,
            kind: kind::COMPLETE,
            more: 0,
            flags: u32::from(status) | op << 8,
        },
    );
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
    // SAFETY: only asked whether it is there.
    if unsafe { CAPTURED.get(header.dev) }.is_none() || put_header(header) {
        return;
    }
    // No room for this: there was none for what is submitted now either, most likely. Told all the same.
    if let Some(count) = CAPTURE_COUNTERS.get_ptr_mut(copy) {
        // SAFETY: per-CPU. The two programs share it and can interrupt each other; a count that is lost so is one of several.
        unsafe { (*count).dropped += 1 };
    }
}
