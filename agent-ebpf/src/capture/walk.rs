//! From a bio's segments to records: the one way on which payload reaches the stream.

use crate::{
    kernel::load,
    maps::{BASES, STREAM, Walk, offset},
};
use aya_ebpf::helpers::generated::{
    bpf_loop, bpf_probe_read_kernel, bpf_ringbuf_reserve, bpf_ringbuf_submit,
};
use core::{
    ffi::c_void,
    ptr::{addr_of, read_volatile},
};
use highwater_abi::stream::{HEADER_BYTES, Header};

/// Readers poll: a wake-up for each record would cost as much as the record.
const NO_WAKEUP: u64 = 1;
/// More segments than any bio has: each is at least a byte of at most 4 GiB, but the kernel's bound is far lower.
const STEPS_MAX: u32 = 1 << 20;

/// Prepares a walk over what a bio has left to do.
///
/// # Safety
/// `bio` must be a `struct bio *`.
#[inline(always)]
pub unsafe fn begin(walk: &mut Walk, bio: u64, header: Header, left: u32) {
    // SAFETY: passed on.
    unsafe {
        walk.segments = load(bio, offset!(bio_io_vec));
        walk.index = load(bio, offset!(bio_idx));
        walk.done = load(bio, offset!(bio_done));
    }
    walk.header = header;
    walk.left = left;
    walk.dropped = 0;
    walk.faults = 0;
}

/// Copies all of it. What went wrong is counted in the walk, and `left` is not 0 then.
///
/// # Safety
/// `walk` must be an element of `WALKS` that nobody else uses meanwhile.
#[inline(always)]
pub unsafe fn run(walk: *mut Walk) {
    let mut pointer = walk;
    // SAFETY: the pointer outlives the call.
    unsafe {
        bpf_loop(STEPS_MAX, segment as *mut c_void, (&raw mut pointer).cast(), 0);
    }
}

/// Puts a record without payload into the stream; false if there was no room.
#[inline(always)]
pub fn put_header(header: Header) -> bool {
    // SAFETY: reserved with the size that is written, and submitted at once.
    unsafe {
        let place = bpf_ringbuf_reserve(addr_of!(STREAM) as *mut c_void, HEADER_BYTES as u64, 0);
        if place.is_null() {
            return false;
        }
        place.cast::<Header>().write(header);
        bpf_ringbuf_submit(place, NO_WAKEUP);
    }
    true
}

/// One record from one segment.
unsafe extern "C" fn segment(_: u64, context: *mut c_void) -> i64 {
    // SAFETY: bpf_loop hands over what `run` gave it: a pointer to the place of a pointer to a map's element.
    let walk = unsafe { &mut **context.cast::<*mut Walk>() };
    if walk.left == 0 {
        return 1;
    }
    // struct bio_vec { struct page *bv_page; unsigned int bv_len, bv_offset; }, unchanged since it exists.
    let mut vec = [0u64; 2];
    let at = walk.segments + u64::from(walk.index) * 16;
    // SAFETY: the destination is as long as what is read; a bad address is an error, not a fault.
    if unsafe { bpf_probe_read_kernel(vec.as_mut_ptr().cast(), 16, at as *const c_void) } != 0 {
        walk.faults += 1;
        return 1;
    }
    let (length, offset) = (vec[1] as u32, (vec[1] >> 32) as u32);
    let mut room = length.wrapping_sub(walk.done);
    if length <= walk.done {
        // An empty segment would never end.
        walk.faults += 1;
        return 1;
    }
    if room > walk.left {
        room = walk.left;
    }
    let page_struct_bytes = u64::from(offset!(page_struct_bytes));
    // A division by what the compiler can't prove to be non-zero would bring a panic into the program.
    if page_struct_bytes == 0 {
        return 1;
    }
    let Some(bases) = BASES.get(0) else { return 1 };
    if bases.direct == 0 || vec[0] < bases.pages {
        walk.faults += 1;
        return 1;
    }
    let content = bases.direct
        + (((vec[0] - bases.pages) / page_struct_bytes) << 12)
        + u64::from(offset)
        + u64::from(walk.done);
    let taken = if room >= 65536 {
        put::<65536>(walk, content, 65536)
    } else if room >= 16384 {
        put::<16384>(walk, content, 16384)
    } else if room >= 4096 {
        put::<4096>(walk, content, 4096)
    } else if room <= 512 {
        put::<512>(walk, content, room)
    } else if room <= 1024 {
        put::<1024>(walk, content, room)
    } else if room <= 2048 {
        put::<2048>(walk, content, room)
    } else {
        put::<4096>(walk, content, room & 4095)
    };
    if taken == 0 {
        return 1;
    }
    walk.left -= taken;
    walk.header.at += u64::from(taken);
    walk.done += taken;
    if walk.done >= length {
        walk.done = 0;
        walk.index += 1;
    }
    (walk.left == 0).into()
}

/// Copies `bytes` (at most `N`) from the kernel's memory into a record. Answers how many: all or none.
#[inline(always)]
fn put<const N: usize>(walk: &mut Walk, content: u64, bytes: u32) -> u32 {
    // SAFETY: reserved with room for `N` bytes, of which at most as many are written; submitted in any case.
    unsafe {
        let place = bpf_ringbuf_reserve(addr_of!(STREAM) as *mut c_void, (N + HEADER_BYTES) as u64, 0);
        if place.is_null() {
            walk.dropped += 1;
            return 0;
        }
        let header = place.cast::<Header>();
        header.write(walk.header);
        (*header).bytes = bytes;
        (*header).more = (walk.left > bytes).into();
        let payload = place.cast::<u8>().add(HEADER_BYTES).cast::<c_void>();
        let read = bpf_probe_read_kernel(payload, bytes, content as *const c_void);
        if read != 0 {
            // Readers pass over it; the count says that the stream is broken.
            (*header).kind = 0;
            walk.faults += 1;
        }
        bpf_ringbuf_submit(place, NO_WAKEUP);
        if read == 0 { bytes } else { 0 }
    }
}

/// A pointer as a number: see [`Walk::key`].
#[inline(always)]
pub fn number(walk: &mut Walk, pointer: u64) -> u64 {
    // SAFETY: a member of a map's element; volatile, so that it really goes through memory.
    unsafe {
        core::ptr::write_volatile(&raw mut walk.key, pointer);
        read_volatile(&raw const walk.key)
    }
}
