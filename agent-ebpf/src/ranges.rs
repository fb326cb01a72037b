//! The ranges of a request that discards: one a bio, which need not lie side by side (`attempt_merge` and
//! `bio_attempt_discard_merge` of block/blk-merge.c; drivers tell the device a range for each bio).
//!
//! The bios are walked by `bpf_probe_read_kernel`: a loop's body has no pointers that the verifier knows by type. They are whole
//! at both hooks: a completion is told before its bios are ended, an issue before the device has them.

use crate::{
    kernel::{load, peek},
    maps::offset,
    mark::mark,
};
use aya_ebpf::helpers::generated::bpf_loop;
use core::{ffi::c_void, ptr::read_volatile};
use highwater_abi::Target;

/// More than any request has: contiguous bios too are merged, up to the largest discard of the device.
const BIOS_MAX: u32 = 1 << 16;

/// A walk over a request's bios.
struct Walk<'t> {
    /// What is marked; none: it is only looked whether they lie side by side.
    target: Option<&'t Target>,
    /// The next bio.
    bio: u64,
    /// Where the last one ended.
    end: u64,
    /// How many were walked.
    count: u64,
    /// Not 0: they do not lie side by side.
    scattered: u64,
    /// Not 0: one could not be read, or not be marked.
    failed: u64,
}

unsafe extern "C" fn next(_: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `walk` gave it.
    let walk = unsafe { &mut *context.cast::<Walk<'_>>() };
    if walk.bio == 0 {
        return 1;
    }
    // SAFETY: `struct bio *`.
    let (sector, bytes, following): (u64, u32, u64) = unsafe {
        (
            peek(walk.bio, offset!(bio_sector), &mut walk.failed),
            peek(walk.bio, offset!(bio_size), &mut walk.failed),
            peek(walk.bio, offset!(bio_next), &mut walk.failed),
        )
    };
    if walk.failed != 0 {
        return 1;
    }
    if walk.count > 0 && sector != walk.end {
        walk.scattered = 1;
    }
    let sectors = (u64::from(bytes) + 511) >> 9;
    if let Some(target) = walk.target {
        // SAFETY: passed on.
        if !unsafe { mark(target, sector, sectors) } {
            walk.failed = 1;
        }
    }
    walk.end = sector + sectors;
    walk.count += 1;
    walk.bio = following;
    0
}

#[inline(always)]
unsafe fn walk<'t>(target: Option<&'t Target>, request: u64) -> Walk<'t> {
    // SAFETY: `struct request *`.
    let bio = unsafe { load::<u64>(request, offset!(request_bio)) };
    let mut walk = Walk { target, bio, end: 0, count: 0, scattered: 0, failed: 0 };
    // SAFETY: the context outlives the call.
    unsafe {
        bpf_loop(BIOS_MAX, next as *mut c_void, (&raw mut walk).cast(), 0);
    }
    walk
}

/// Marks all ranges that a request discards. False: not all of them could be marked.
///
/// # Safety
/// `request` must be a `struct request *` of a discard; see [`mark`].
#[inline(always)]
pub unsafe fn mark_discard(target: &Target, request: u64, sector: u64, sectors: u64) -> bool {
    // SAFETY: passed on; volatile reads, as the compiler does not know that the callback writes.
    unsafe {
        let walk = walk(Some(target), request);
        if read_volatile(&walk.count) == 0 {
            return mark(target, sector, sectors);
        }
        read_volatile(&walk.failed) == 0 && read_volatile(&walk.bio) == 0
    }
}

/// Whether a request discards ranges that do not lie side by side, or as many as cannot be walked.
///
/// # Safety
/// `request` must be a `struct request *`.
#[inline(always)]
pub unsafe fn is_scattered(request: u64) -> bool {
    // SAFETY: passed on; volatile reads, as above.
    unsafe {
        let walk = walk(None, request);
        read_volatile(&walk.scattered) != 0
            || read_volatile(&walk.failed) != 0
            || read_volatile(&walk.bio) != 0
    }
}
