//! The captured stream: every change of the captured devices, payload included, in the order of submission, through one BPF
//! ring buffer a machine; completions in between, in the order in which they were seen.
//!
//! A record is a [`Header`], and for [`kind::WRITE`] and [`kind::PROBE`] as many bytes of payload as it says. A bio with several
//! segments becomes several records. A record may come twice (another copy of the program was not sure of the first): both
//! precede the bio's issue.

/// Most copies of the capture program. Slots carry a copy's number in the three low bits of a bio's address.
pub const CAPTURE_COPIES_MAX: usize = 6;
/// Slots in which copies tell each other which bio they have captured.
pub const HANDLED_MAX: u32 = 4096;
/// Places for the `dev_t`s of captured devices; 0 is empty. A device lies at [`captured_slot`] or one of the places after it, as many
/// as [`CAPTURED_PROBES`]. An array and not a hash map, since each write of each device asks, and the kernel compiles a look into an array
/// into the program.
pub const CAPTURED_SLOTS: u32 = 1024;
/// See [`CAPTURED_SLOTS`].
pub const CAPTURED_PROBES: u32 = 4;
/// The `probe`-th place where a device may lie.
#[inline(always)]
#[must_use]
pub fn captured_slot(dev: u32, probe: u32) -> u32 {
    ((dev.wrapping_mul(0x9E37_79B1) >> 20).wrapping_add(probe)) % CAPTURED_SLOTS
}
/// The element of per-copy maps that the probe uses: beside all copies.
pub const PROBE_COPY: u32 = 7;
/// What a record tells.
pub mod kind {
    /// Submitted: data, which follow.
    pub const WRITE: u16 = 1;
    /// Submitted: the range is discarded.
    pub const DISCARD: u16 = 2;
    /// Submitted: the range becomes zeros.
    pub const ZEROES: u16 = 3;
    /// Submitted: a flush without data.
    pub const FLUSH: u16 = 4;
    /// A range of a request has completed (request-based devices), or a bio (bio-based ones: then `bytes` is 0).
    pub const COMPLETE: u16 = 5;
    /// The content of a page of the agent's own, read back through the way of capture.
    pub const PROBE: u16 = 6;
}

/// What every record begins with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// First byte on the whole device. Segments can end within a sector.
    pub at: u64,
    /// The bio's address, which tells bios in flight apart; of a completed request: of its first bio.
    pub bio: u64,
    /// `dev_t` of the whole device, the kernel's encoding.
    pub dev: u32,
    /// Bytes of the range; of payload, where there is some.
    pub bytes: u32,
    /// One of [`kind`].
    pub kind: u16,
    /// Not 0: more records of this bio follow. Between them no state of the disk is to be taken: the device may promise to
    /// write a bio as a whole or not at all.
    pub more: u16,
    /// Submissions: `bi_opf`. Completions: the status, 0 if it went well, and above its 8 bits the operation.
    pub flags: u32,
}

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = size_of::<Header>();

/// Where the kernel keeps page structures and where it maps all memory. On x86-64, the address of a page's content is
/// `direct + ((page - pages) / page_struct_bytes) * 4096`. Both 0: unknown, nothing is captured.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bases {
    /// `vmemmap_base`: the first `struct page`.
    pub pages: u64,
    /// `page_offset_base`: the direct mapping.
    pub direct: u64,
}

/// What one copy of the capture program did; per CPU, summed by the reader. They only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureCounters {
    /// Bios captured.
    pub bios: u64,
    /// Bytes of payload.
    pub bytes: u64,
    /// Records for which the ring had no room: the stream lacks them.
    pub dropped: u64,
    /// Pages that could not be read, or segments: the stream lacks them.
    pub faults: u64,
    /// Changes of which the range is not known at submission (zone append and reset).
    pub unsupported: u64,
}

/// How a probe is asked for, and what it found. One element; written by user space before it reads a page with direct I/O.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// The thread whose next read is meant (`gettid`); 0: none.
    pub thread: u64,
    /// What to do: [`probe`].
    pub what: u64,
    /// Found: the address of the first segment's `struct page`.
    pub page: u64,
    /// Found: that segment's length and offset within the page.
    pub bytes: u64,
    /// See `bytes`.
    pub offset: u64,
    /// Found: the address of the thread's `task_struct`, which lies in the direct mapping.
    pub task: u64,
    /// Search: the page's frame number, and the two words its content begins with.
    pub frame: u64,
    /// See `frame`.
    pub magic: [u64; 2],
    /// Search: the highest candidate for the direct mapping's base, and how many GiB below it are tried.
    pub from: u64,
    /// See `from`.
    pub steps: u64,
    /// Search, found: how many candidates showed the page, and the last of them.
    pub hits: u64,
    /// See `hits`.
    pub found: u64,
}

/// What a probe does.
pub mod probe {
    /// Tells where the page structure and the task lie.
    pub const LOCATE: u64 = 1;
    /// Looks where the page is mapped.
    pub const SEARCH: u64 = 2;
    /// Captures the page, as a record of [`super::kind::PROBE`].
    pub const CAPTURE: u64 = 3;
}

/// Where the members lie that the capture programs read. Byte offsets within their structures.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureOffsets {
    /// `request.q`
    pub request_queue: u32,
    /// `request.__sector`
    pub request_sector: u32,
    /// `request.cmd_flags`
    pub request_cmd_flags: u32,
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
    /// `bio.bi_bdev`
    pub bio_bdev: u32,
    /// `bio.bi_opf`
    pub bio_opf: u32,
    /// `bio.bi_status`
    pub bio_status: u32,
    /// `bio.bi_io_vec`
    pub bio_io_vec: u32,
    /// `bio.bi_iter.bi_sector`
    pub bio_sector: u32,
    /// `bio.bi_iter.bi_size`
    pub bio_size: u32,
    /// `bio.bi_iter.bi_idx`
    pub bio_idx: u32,
    /// `bio.bi_iter.bi_bvec_done` (`bi_offset` from 7.3 on)
    pub bio_done: u32,
    /// Bytes of a `struct page`.
    pub page_struct_bytes: u32,
    /// `bio.bi_next`
    pub bio_next: u32,
    /// `bio.bi_crypt_context`; 0 where the kernel has no inline encryption.
    pub bio_crypt: u32,
    /// 0.
    pub reserved: u32,
}
