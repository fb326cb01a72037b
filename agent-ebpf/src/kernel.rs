//! What is read of the kernel's structures, and what its operation codes mean (include/linux/blk_types.h).

use crate::maps::offset;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use core::{ffi::c_void, ptr::read_volatile};

/// Reads a member of a structure behind a pointer that the verifier knows by its BTF type.
///
/// # Safety
/// `base` must be such a pointer; a bad address reads as 0 (the kernel patches these loads).
#[inline(always)]
pub unsafe fn load<T: Copy>(base: u64, offset: u32) -> T {
    // SAFETY: see above.
    unsafe { read_volatile((base as *const u8).add(offset as usize).cast::<T>()) }
}

/// Reads a member of a structure at an address that the verifier does not know the type of. What could not be read is the type's
/// default, and `failed` 1.
///
/// # Safety
/// None to speak of: a bad address is an error.
#[inline(always)]
pub unsafe fn peek<T: Copy + Default>(base: u64, offset: u32, failed: &mut u64) -> T {
    let mut value = T::default();
    let from = (base + u64::from(offset)) as *const c_void;
    // SAFETY: the destination is as long as what is read; a bad address is an error, not a fault.
    if unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, from) } != 0 {
        *failed = 1;
    }
    value
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
