//! Maps and load-time constants of the capture programs. Names are part of the contract with user space
//! (`agent/src/capture/object.rs`).

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray, RingBuf},
    macros::btf_map,
};
use core::ptr::read_volatile;
use highwater_abi::stream::{
    Bases, CAPTURED_PROBES, CAPTURED_SLOTS, CaptureCounters, CaptureOffsets, HANDLED_MAX, Header, Probe,
    captured_slot,
};

const F_MMAPABLE: usize = 0x400;

/// The stream. Its size is set by user space at load.
#[btf_map]
pub static STREAM: RingBuf<u64, { 1 << 20 }> = RingBuf::new();

/// `dev_t`s of whole devices that are captured.
#[btf_map]
pub static CAPTURED: Array<u32, { CAPTURED_SLOTS as usize }> = Array::new();

/// Which bio was captured last, and by which copy: `address | copy`, at the place that the address gives.
#[btf_map]
pub static HANDLED: Array<u64, { HANDLED_MAX as usize }, F_MMAPABLE> = Array::new();

/// Whether a whole device is captured.
#[inline(always)]
pub fn is_captured(dev: u32) -> bool {
    let mut probe = 0;
    while dev != 0 && probe < CAPTURED_PROBES {
        // SAFETY: an element of an array map; volatile, as user space writes it meanwhile.
        if CAPTURED
            .get_ptr(captured_slot(dev, probe))
            .is_some_and(|place| unsafe { read_volatile(place) } == dev)
        {
            return true;
        }
        probe += 1;
    }
    false
}

/// One element.
#[btf_map]
pub static BASES: Array<Bases, 1> = Array::new();

/// One element.
#[btf_map]
pub static PROBE: Array<Probe, 1> = Array::new();

/// By copy.
#[btf_map]
pub static CAPTURE_COUNTERS: PerCpuArray<CaptureCounters, 8> = PerCpuArray::new();

/// State of a walk over a bio's segments, by copy. Not on the stack: sizes kept there made the verifier follow each
/// iteration of the loop apart, and never come to an end.
#[repr(C)]
pub struct Walk {
    /// What the next record says; its place moves on.
    pub header: Header,
    /// Address of the bio's segments.
    pub segments: u64,
    /// Which segment, and how much of it is done.
    pub index: u32,
    /// See `index`.
    pub done: u32,
    /// Bytes of the bio that are left.
    pub left: u32,
    /// Records that the ring had no room for.
    pub dropped: u32,
    /// Segments and pages that could not be read.
    pub faults: u32,
    /// 0.
    pub reserved: u32,
    /// A bio's address as a number: the verifier allows no arithmetic with what it knows as a pointer, and forgets that it was
    /// one when it is read back.
    pub key: u64,
}

/// By copy.
#[btf_map]
pub static WALKS: PerCpuArray<Walk, 8> = PerCpuArray::new();

/// Member offsets.
#[unsafe(no_mangle)]
pub static OFFSETS: CaptureOffsets = CaptureOffsets {
    request_queue: 0,
    request_sector: 0,
    request_cmd_flags: 0,
    request_bio: 0,
    queue_disk: 0,
    disk_part0: 0,
    bdev_dev: 0,
    bdev_disk: 0,
    bio_bdev: 0,
    bio_opf: 0,
    bio_status: 0,
    bio_io_vec: 0,
    bio_sector: 0,
    bio_size: 0,
    bio_idx: 0,
    bio_done: 0,
    page_struct_bytes: 0,
    bio_next: 0,
    bio_crypt: 0,
    reserved: 0,
};

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
