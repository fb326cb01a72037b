//! Setting bits.

use crate::maps::{BITMAPS, Bitmap, EPOCHS};
use aya_ebpf::helpers::generated::bpf_loop;
use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_or},
    ptr::read_volatile,
};
use highwater_abi::{RANGES_MAX, Target};

/// What the loop over a device's ranges needs.
struct Change<'a> {
    target: &'a Target,
    sector: u64,
    end: u64,
    failed: u64,
}

/// What the loop over a bitmap's words needs.
struct Fill<'a> {
    bitmap: &'a Bitmap,
    first: u64,
    last: u64,
    failed: u64,
}

/// Sets bits of one word; false if the bitmap has no such word.
#[inline(always)]
unsafe fn or_word(bitmap: &Bitmap, word: u64, bits: u64) -> bool {
    let Some(pointer) = bitmap.get_ptr_mut(word as u32) else { return false };
    // SAFETY: an element of an array map. A bit that is set already needs no locked operation: bits are only taken
    // after the epoch was ended and all running programs were done with the bitmap, so nobody clears beneath us.
    unsafe {
        if read_volatile(pointer) & bits != bits {
            atomic_or::<u64, u64, { AtomicOrdering::Relaxed }>(pointer, bits);
        }
    }
    true
}

/// Marks what of blocks `first..=last` lies in one word.
unsafe extern "C" fn fill(index: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `mark_range` gave it.
    let fill = unsafe { &mut *context.cast::<Fill<'_>>() };
    let word = (fill.first >> 6) + index;
    let (mut bits, last_word) = (!0u64, fill.last >> 6);
    if index == 0 {
        bits <<= fill.first & 63;
    }
    if word == last_word {
        bits &= !0u64 >> (63 - (fill.last & 63));
    }
    // SAFETY: the bitmap outlives the program.
    if !unsafe { or_word(fill.bitmap, word, bits) } {
        fill.failed = 1;
        return 1;
    }
    0
}

/// Marks what of the change lies in one protected range.
unsafe extern "C" fn mark_range(index: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `mark` gave it.
    let change = unsafe { &mut *context.cast::<Change<'_>>() };
    let index = index as usize;
    if index >= RANGES_MAX {
        return 1;
    }
    let range = &change.target.ranges[index];
    let from = if change.sector > range.start { change.sector } else { range.start };
    let to = if change.end < range.end { change.end } else { range.end };
    if from >= to {
        return 0;
    }
    let Some(epoch) = EPOCHS.get_ptr(range.slot) else {
        change.failed = 1;
        return 0;
    };
    // SAFETY: an element of an array map; volatile, as user space writes it meanwhile.
    let parity = unsafe { read_volatile(epoch) } as u32 & 1;
    let Some(bitmap) = BITMAPS.get(range.slot * 2 + parity) else {
        change.failed = 1;
        return 0;
    };
    let shift = u64::from(range.shift & 31);
    let mut fill_context = Fill {
        bitmap,
        first: (from - range.start) >> shift,
        last: (to - 1 - range.start) >> shift,
        failed: 0,
    };
    let words = (fill_context.last >> 6) - (fill_context.first >> 6) + 1;
    // SAFETY: the context outlives the call; a volatile read, as the compiler does not know that the callback writes.
    unsafe {
        bpf_loop(words as u32, fill as *mut c_void, (&raw mut fill_context).cast(), 0);
        change.failed |= read_volatile(&fill_context.failed);
    }
    0
}

/// Marks `sectors` from `sector` on in every protected range of the device that they touch. False if a bitmap was
/// missing or too small: the caller counts it, and user space distrusts the epoch.
///
/// Both loops are `bpf_loop`: the verifier looks at their bodies once, instead of once a range and path (58,500
/// instructions for one program, and there are many).
#[inline(always)]
pub unsafe fn mark(target: &Target, sector: u64, sectors: u64) -> bool {
    let mut change = Change { target, sector, end: sector + sectors, failed: 0 };
    // SAFETY: as in `mark_range`.
    unsafe {
        bpf_loop(target.ranges_used, mark_range as *mut c_void, (&raw mut change).cast(), 0);
        read_volatile(&change.failed) == 0
    }
}
