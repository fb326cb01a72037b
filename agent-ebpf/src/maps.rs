//! Maps and load-time constants. Names are part of the contract with user space (`agent/src/tracker/object.rs`).

use aya_ebpf::{
    btf_maps::{Array, ArrayOfMaps, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use core::ptr::{addr_of, read_volatile};
use highwater_abi::{
    COPIES_MAX, Counters, INFLIGHT_MAX, ISSUED_MAX, Issued, Offsets, SLOTS_MAX, TARGETS_MAX, Target,
};

const F_MMAPABLE: usize = 0x400;
// Lets inner maps differ in size from the template.
const F_INNER_MAP: usize = 0x1000;

/// A bitmap: one bit a block, in 64-bit words.
pub type Bitmap = Array<u64, 64, { F_MMAPABLE | F_INNER_MAP }>;

/// Each slot's two bitmaps, at `slot * 2` and the place after.
#[btf_map]
pub static BITMAPS: ArrayOfMaps<Bitmap, { SLOTS_MAX as usize * 2 }> = ArrayOfMaps::new();

/// Slot → its epoch, whose parity tells which of its bitmaps is marked. User space ends an epoch by writing here, and waits
/// then for the programs that have read it before.
#[btf_map]
pub static EPOCHS: Array<u64, { SLOTS_MAX as usize }, F_MMAPABLE> = Array::new();

/// `dev_t` of a whole device → what is protected on it.
#[btf_map]
pub static TARGETS: HashMap<u32, Target, { TARGETS_MAX as usize }> = HashMap::new();

/// Counters of each tracked device and copy.
#[btf_map]
pub static COUNTERS: PerCpuArray<Counters, { TARGETS_MAX as usize * COPIES_MAX }> = PerCpuArray::new();

/// Bio address → range, between submission and completion on bio-based devices.
#[btf_map]
pub static INFLIGHT: HashMap<u64, Issued, { INFLIGHT_MAX as usize }> = HashMap::new();

/// Request address → what was issued with it last. A note is written where it lies: adding and removing one for each write
/// was measured to cost more than all the rest.
#[btf_map]
pub static ISSUED: LruHashMap<u64, Issued, { ISSUED_MAX as usize }> = LruHashMap::new();

/// Member offsets; see [`Offsets`].
#[unsafe(no_mangle)]
pub static OFFSETS: Offsets = Offsets {
    request_queue: 0,
    request_sector: 0,
    request_cmd_flags: 0,
    request_data_len: 0,
    request_start_time: 0,
    request_bio: 0,
    queue_disk: 0,
    disk_part0: 0,
    bdev_dev: 0,
    bdev_disk: 0,
    bio_next: 0,
    bio_bdev: 0,
    bio_opf: 0,
    bio_sector: 0,
    bio_size: 0,
    bio_status: 0,
};

/// How many copies are attached; the last one removes entries from [`INFLIGHT`].
#[unsafe(no_mangle)]
pub static COPIES: u32 = 1;

/// Whether the issue program is attached.
#[unsafe(no_mangle)]
pub static NET: u32 = 0;

/// The offsets as user space set them. Volatile: the compiler must not fold the zeros above.
macro_rules! offset {
    ($member:ident) => {
        // SAFETY: a static of the right type; volatile only so that the loader's value is read.
        {
            #[allow(unused_unsafe)]
            unsafe {
                core::ptr::read_volatile(core::ptr::addr_of!($crate::maps::OFFSETS.$member))
            }
        }
    };
}
pub(crate) use offset;

/// How many copies are attached.
#[inline(always)]
pub fn copies() -> u32 {
    // SAFETY: as above.
    unsafe { read_volatile(addr_of!(COPIES)) }
}

/// The counters of a device for one copy. One element a copy: copies can interleave on one CPU, and a shared element
/// would lose increments.
#[inline(always)]
pub fn counters(counter: u32, copy: u32) -> Option<&'static mut Counters> {
    let pointer = COUNTERS.get_ptr_mut(counter * COPIES_MAX as u32 + copy)?;
    // SAFETY: per-CPU, and this copy does not run twice at once on a CPU (the kernel's own guard).
    Some(unsafe { &mut *pointer })
}

/// Whether the issue program is attached.
#[inline(always)]
pub fn net() -> bool {
    // SAFETY: as above.
    unsafe { read_volatile(addr_of!(NET)) != 0 }
}
