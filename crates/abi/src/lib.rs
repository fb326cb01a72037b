//! What user space and the eBPF programs share: the layout of maps' values, limits and names. Both sides are
//! compiled from this one file, the eBPF side without `std`.
//!
//! Everything is `repr(C)`, made of fixed-width integers without padding, so that the two compilers agree.
#![no_std]

pub mod stream;

/// Changes with every change of a map's meaning; part of the pin directory's name, so that an agent never takes
/// over programs and maps it does not understand.
pub const ABI_VERSION: u32 = 6;

/// Most copies of each program.
pub const COPIES_MAX: usize = 6;
/// Most whole block devices tracked at once.
pub const TARGETS_MAX: u32 = 256;
/// Most protected ranges (the disk itself, or partitions) on one tracked device.
pub const RANGES_MAX: usize = 8;
/// Most bitmaps in use at once: one for each protected range.
pub const SLOTS_MAX: u32 = 1024;
/// Writes of bio-based devices that can be in flight at once.
pub const INFLIGHT_MAX: u32 = 65_536;
/// Requests that are noted. A note stays with its request, whose memory is used again and again; the least recently used ones
/// make room.
pub const ISSUED_MAX: u32 = 65_536;
/// Sectors of a bitmap's smallest block (4 KiB), as a shift.
pub const BLOCK_SHIFT_SECTORS: u32 = 3;

/// How a device's writes are seen.
pub mod hook {
    /// `block_rq_complete`: virtio, NVMe, SCSI, loop.
    pub const REQUEST: u32 = 1;
    /// `block_bio_queue` and `block_bio_complete`: device-mapper, md, zram.
    pub const BIO: u32 = 2;
}

/// A tracked device, by the `dev_t` of its whole disk (`major << 20 | minor`, the kernel's own encoding).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// One of [`hook`].
    pub hook: u32,
    /// Which element of the counters is its own: `counter * COPIES_MAX + copy`.
    pub counter: u32,
    /// How many of `ranges` are used.
    pub ranges_used: u32,
    /// 0.
    pub reserved: u32,
    /// What is protected on it; ranges may overlap (a disk and its partition).
    pub ranges: [Range; RANGES_MAX],
}

/// A protected stretch of a device and the bitmap that marks it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub start: u64,
    /// First sector behind it.
    pub end: u64,
    /// Its epoch is `EPOCHS[slot]`, whose parity tells its bitmap: `BITMAPS[slot * 2 + parity]`.
    pub slot: u32,
    /// Sectors per bit, as a shift; at least [`BLOCK_SHIFT_SECTORS`].
    pub shift: u32,
}

/// Classes of operations, as the kernel's own statistics divide them.
pub mod class {
    /// Writes, write-zeroes, secure erase, zone append and reset: the write columns of `/sys/block/*/stat`.
    pub const WRITE: usize = 0;
    /// Discards: the discard columns.
    pub const DISCARD: usize = 1;
    /// How many there are.
    pub const COUNT: usize = 2;
}

/// Counters of one copy of the programs for one device; per CPU, summed by the reader. They only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Completions that changed the device, by class. Request-based with the net: those that no copy before was shown.
    pub events: [u64; class::COUNT],
    /// Their sectors.
    pub sectors: [u64; class::COUNT],
    /// Bio-based only: sectors seen at submission, by class.
    pub queued_sectors: [u64; class::COUNT],
    /// Completions reported as failed: marked all the same.
    pub failed: u64,
    /// Bio-based only: the table of writes in flight was full.
    pub inflight_full: u64,
    /// Bio-based only: a completion without an entry in the table: a split part, or submitted before tracking began.
    pub orphans: u64,
    /// Writes that a bitmap was too small for, or whose bitmap was missing, and changes without a range (a zone's
    /// reset) or whose ranges are not known any more: the bitmap is not to be trusted.
    pub unmarked: u64,
    /// Request-based only, written by the issue program alone: completions that no copy was shown, found when their
    /// request was used again; their sectors, by class.
    pub late_sectors: [u64; class::COUNT],
    /// Sectors of those events that no copy before this one was shown, by class: summed over the copies, every event once,
    /// whichever copies were skipped. Completions of request-based devices (only with the net), submissions of bio-based
    /// ones.
    pub first_sectors: [u64; class::COUNT],
    /// Passthrough commands that send data to the device (SG_IO, NVMe passthrough): what they change can't be seen.
    pub passthrough: u64,
}

/// A change between issue and completion. Request-based devices: by the request's address, the net beneath the completion
/// programs. Bio-based ones: by the bio's address, because a bio has lost its range when it completes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Issued {
    /// First sector: of the first range, where a request discards several.
    pub sector: u64,
    /// Bytes: of all ranges together.
    pub bytes: u64,
    /// `request.start_time_ns`: tells a request from the next one in the same memory; 0 for a bio.
    pub started_ns: u64,
    /// When it was issued (CLOCK_MONOTONIC).
    pub issued_ns: u64,
    /// The first sector of the last completion that was seen, plus 1: a request can complete in parts. 0 for a bio.
    pub shown: u64,
    /// `dev_t` of the whole disk.
    pub dev: u32,
    /// One of [`class`].
    pub class: u32,
    /// Not 0 once a completion program has seen its end.
    pub seen: u32,
    /// Not 0 where a request discards several ranges, so that `sector` and `bytes` do not tell which.
    pub scattered: u32,
}

/// Where the members lie that the programs read, looked up in the running kernel's BTF before the programs are loaded.
/// Byte offsets within their structures.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `request.q`
    pub request_queue: u32,
    /// `request.__sector`
    pub request_sector: u32,
    /// `request.cmd_flags`
    pub request_cmd_flags: u32,
    /// `request.__data_len`
    pub request_data_len: u32,
    /// `request.start_time_ns`
    pub request_start_time: u32,
    /// `request.bio`
    pub request_bio: u32,
    /// `request_queue.disk`
    pub queue_disk: u32,
    /// `gendisk.part0`
    pub disk_part0: u32,
    /// `block_device.bd_dev`
    pub bdev_dev: u32,
    /// `block_device.bd_disk`
    pub bdev_disk: u32,
    /// `bio.bi_next`
    pub bio_next: u32,
    /// `bio.bi_bdev`
    pub bio_bdev: u32,
    /// `bio.bi_opf`
    pub bio_opf: u32,
    /// `bio.bi_iter.bi_sector`
    pub bio_sector: u32,
    /// `bio.bi_iter.bi_size`
    pub bio_size: u32,
    /// `bio.bi_status`
    pub bio_status: u32,
}
