//! Setting bits.

use crate::maps::{BITMAPS, Bitmap};
use aya_ebpf::helpers::generated::bpf_loop;
use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_or},
    ptr::read_volatile,
};
use highwater_abi::{RANGES_MAX, Target};

struct Fill {
    bitmap: *const Bitmap,
    word: u32,
    failed: u32,
}

/// Sets bits of one word; false if the bitmap has no such word.
#[inline(always)]
unsafe fn or_word(bitmap: &Bitmap, word: u64, bits: u64) -> bool {
    let Some(pointer) = bitmap.get_ptr_mut(word as u32) else { return false };
    // SAFETY: an element of an array map. A bit that is set already needs no locked operation: bits are only taken
    // after the map was replaced and all running programs were done with it, so nobody clears beneath us.
    unsafe {
        if read_volatile(pointer) & bits != bits {
            atomic_or::<u64, u64, { AtomicOrdering::Relaxed }>(pointer, bits);
        }
    }
    true
}

unsafe extern "C" fn fill(index: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `mark_range` gave it.
    let fill = unsafe { &mut *context.cast::<Fill>() };
    // SAFETY: the bitmap outlives the program.
    if !unsafe { or_word(&*fill.bitmap, u64::from(fill.word) + index, !0) } {
        fill.failed = 1;
        return 1;
    }
    0
}

/// Marks blocks `first..=last`.
#[inline(always)]
unsafe fn mark_blocks(bitmap: &Bitmap, first: u64, last: u64) -> bool {
    let (word_first, word_last) = (first >> 6, last >> 6);
    let mask_first = !0u64 << (first & 63);
    let mask_last = !0u64 >> (63 - (last & 63));
    // SAFETY: passed on.
    unsafe {
        if word_first == word_last {
            return or_word(bitmap, word_first, mask_first & mask_last);
        }
        let mut ok = or_word(bitmap, word_first, mask_first);
        ok &= or_word(bitmap, word_last, mask_last);
        let between = word_last - word_first - 1;
        if between != 0 {
            let mut context = Fill { bitmap, word: (word_first + 1) as u32, failed: 0 };
            bpf_loop(between as u32, fill as *mut c_void, (&raw mut context).cast(), 0);
            ok &= read_volatile(&context.failed) == 0;
        }
        ok
    }
}

/// Marks `sectors` from `sector` on in every protected range of the device that they touch. False if a bitmap was
/// missing or too small: the caller counts it, and user space distrusts the epoch.
#[inline(always)]
pub unsafe fn mark(target: &Target, sector: u64, sectors: u64) -> bool {
    let mut ok = true;
    let end = sector + sectors;
    for index in 0..RANGES_MAX {
        if index as u32 >= target.ranges_used {
            break;
        }
        let range = &target.ranges[index];
        let from = if sector > range.start { sector } else { range.start };
        let to = if end < range.end { end } else { range.end };
        if from >= to {
            continue;
        }
        let Some(bitmap) = BITMAPS.get(range.slot) else {
            ok = false;
            continue;
        };
        let shift = u64::from(range.shift & 31);
        // SAFETY: passed on.
        ok &= unsafe { mark_blocks(bitmap, (from - range.start) >> shift, (to - 1 - range.start) >> shift) };
    }
    ok
}
