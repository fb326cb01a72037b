//! What is read of the kernel's structures, and what its operation codes mean (include/linux/blk_types.h).

use crate::maps::offset;
use core::ptr::read_volatile;

/// Reads a member of a structure behind a pointer that the verifier knows by its BTF type.
///
/// # Safety
/// `base` must be such a pointer; a bad address reads as 0 (the kernel patches these loads).
#[inline(always)]
pub unsafe fn load<T: Copy>(base: u64, offset: u32) -> T {
    // SAFETY: see above.
    unsafe { read_volatile((base as *const u8).add(offset as usize).cast::<T>()) }
}

/// REQ_OP_DISCARD.
pub const OP_DISCARD: u32 = 3;
/// REQ_OP_DRV_OUT: passthrough with data towards the device.
pub const OP_DRV_OUT: u32 = 35;

/// The operation within `cmd_flags` or `bi_opf`.
#[inline(always)]
pub fn operation(flags: u32) -> u32 {
    flags & 0xff
}

/// Whether an operation changes the device. All that do have odd numbers: write 1, discard 3, secure erase 5, zone
/// append 7, write zeroes 9, zone open/close/reset 11 to 17, passthrough out 35; so does the kernel's `op_is_write`.
#[inline(always)]
pub fn changes(operation: u32) -> bool {
    operation & 1 == 1
}

/// `dev_t` of the whole disk that a `gendisk` stands for.
///
/// # Safety
/// `disk` must be a `struct gendisk *` known to the verifier.
#[inline(always)]
pub unsafe fn whole_disk(disk: u64) -> u32 {
    // SAFETY: passed on.
    unsafe {
        let part0: u64 = load(disk, offset!(disk_part0));
        load(part0, offset!(bdev_dev))
    }
}
