//! Submissions: `block_bio_queue(bio *)`. A bio is traced once, split or not, before anything is done with it.
//!
//! **How a copy knows that an earlier one has handled the event.** `HANDLED[hash(bio)] = bio | copy`, one word, written
//! whole. Copy 1 never asks. A later copy leaves if the slot holds this bio with a smaller number, and writes its own number in
//! any case; so what an event leaves behind is taken for handled by no copy of the next event of the same address, unless
//! every copy was skipped in one of the two. Races, migrations and collisions only cause a second record.

use crate::{
    kernel::{OP_DISCARD, OP_DRV_OUT, changes, load, operation, whole_disk},
    maps::{CAPTURE_COUNTERS, HANDLED, WALKS, is_captured, offset},
    walk::{self, put_header},
};
use aya_ebpf::programs::BtfTracePointContext;
use core::ptr::{read_volatile, write_volatile};
use highwater_abi::stream::{Header, kind};

const OP_WRITE: u32 = 1;
const OP_SECURE_ERASE: u32 = 5;
const OP_WRITE_ZEROES: u32 = 9;

/// One submission, seen by one copy (from 1).
///
/// # Safety
/// `ctx` must be of `block_bio_queue`.
#[inline(always)]
pub unsafe fn queue(ctx: &BtfTracePointContext, copy: u32) {
    let bio: u64 = ctx.arg(0);
    // SAFETY: `struct bio *`.
    let flags: u32 = unsafe { load(bio, offset!(bio_opf)) };
    let op = operation(flags);
    if !changes(op) || op >= OP_DRV_OUT {
        return;
    }
    let Some(element) = WALKS.get_ptr_mut(copy) else { return };
    // SAFETY: per-CPU and this copy's own; it does not run twice at once on a CPU (the kernel's own guard).
    let walk = unsafe { &mut *element };
    let key = walk::number(walk, bio);
    let Some(slot) = slot(key) else { return };
    if copy > 1 {
        // SAFETY: an element of an array map.
        let held = unsafe { read_volatile(slot) };
        if held & !7 == key && held & 7 < u64::from(copy) {
            // SAFETY: as above.
            unsafe { write_volatile(slot, key | u64::from(copy)) };
            return;
        }
    }
    // SAFETY: `struct bio *`.
    let dev = unsafe { whole_disk(load(load(bio, offset!(bio_bdev)), offset!(bdev_disk))) };
    if !is_captured(dev) {
        return;
    }
    let Some(count) = CAPTURE_COUNTERS.get_ptr_mut(copy) else { return };
    // SAFETY: as for the walk.
    let count = unsafe { &mut *count };
    // SAFETY: `struct bio *`.
    let (sector, bytes): (u64, u32) =
        unsafe { (load(bio, offset!(bio_sector)), load(bio, offset!(bio_size))) };
    // Its payload is encrypted further down: what is captured would not be what the device gets.
    // SAFETY: `struct bio *`.
    if offset!(bio_crypt) != 0 && bytes != 0 && unsafe { load::<u64>(bio, offset!(bio_crypt)) } != 0 {
        count.unsupported += 1;
    }
    let header = Header { at: sector << 9, bio, dev, bytes, kind: kind_of(op, bytes), more: 0, flags };
    count.bios += 1;
    if header.kind == kind::WRITE {
        // SAFETY: `struct bio *`; the element is this copy's own.
        unsafe {
            walk::begin(walk, bio, header, bytes);
            walk::run(element);
        }
        // SAFETY: the loop has written to it through its own pointer.
        let (left, dropped, faults) = unsafe {
            (
                read_volatile(&raw const (*element).left),
                read_volatile(&raw const (*element).dropped),
                read_volatile(&raw const (*element).faults),
            )
        };
        count.bytes += u64::from(bytes.wrapping_sub(left));
        count.dropped += u64::from(dropped);
        // Whatever else ended it early.
        count.faults += u64::from(faults) + u64::from(left != 0 && dropped == 0 && faults == 0);
    } else if header.kind == 0 {
        count.unsupported += 1;
    } else if !put_header(header) {
        count.dropped += 1;
    }
    // The other copies of this event run after this one in the same task.
    // SAFETY: an element of an array map.
    unsafe { write_volatile(slot, key | u64::from(copy)) };
}

#[inline(always)]
fn slot(key: u64) -> Option<*mut u64> {
    HANDLED.get_ptr_mut(((key >> 3).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 52) as u32)
}

/// 0: it changes what its bio does not tell (zone append and reset).
#[inline(always)]
fn kind_of(op: u32, bytes: u32) -> u16 {
    match op {
        OP_WRITE if bytes == 0 => kind::FLUSH,
        OP_WRITE => kind::WRITE,
        OP_DISCARD | OP_SECURE_ERASE => kind::DISCARD,
        OP_WRITE_ZEROES => kind::ZEROES,
        _ => 0,
    }
}
