//! Dirty tracking in the kernel: every completed change of a protected device sets bits in that device's bitmap.
//!
//! * Request-based devices (virtio, NVMe, SCSI, loop) are seen at `block_rq_complete`; bio-based ones
//!   (device-mapper, md, zram) at `block_bio_queue`, which keeps the range, and `block_bio_complete`, which marks it.
//! * Marking happens at completion, never earlier: a reader that took the bits and then read the block must find a
//!   write that was under way during its read marked again.
//! * The kernel skips a program that is already running on the CPU and only counts the miss. So each program exists
//!   in several copies ([`COPIES_MAX`]); marking is idempotent, and user space proves each epoch by a copy that missed
//!   nothing.
//! * Nothing here can fail, delay or alter an I/O.
//!
//! Where structure members lie is looked up by user space in the running kernel's BTF and set in [`OFFSETS`] before
//! load, so that one object serves all kernels.
#![no_std]
#![no_main]
// atomic_or: AtomicU64::fetch_or does not exist on this target.
#![allow(internal_features)]
#![feature(core_intrinsics)]

mod bio;
mod kernel;
mod maps;
mod mark;
mod ranges;
mod request;

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

/// The kernel allows the tracing helpers only to programs under a GPL-compatible licence.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

macro_rules! copies {
    ($body:path, $tracepoint:literal: $($name:ident = $copy:literal),*) => { $(
        #[btf_tracepoint(function = $tracepoint)]
        pub fn $name(ctx: BtfTracePointContext) -> i32 {
            // SAFETY: the arguments and structures read are those of this tracepoint, and the verifier checks each load.
            unsafe { $body(&ctx, $copy) }
            0
        }
    )* };
}

copies!(request::complete, "block_rq_complete":
    rq_complete_1 = 0, rq_complete_2 = 1, rq_complete_3 = 2, rq_complete_4 = 3, rq_complete_5 = 4, rq_complete_6 = 5);
copies!(request::issue, "block_rq_issue": rq_issue_1 = 0);
copies!(bio::queue, "block_bio_queue":
    bio_queue_1 = 0, bio_queue_2 = 1, bio_queue_3 = 2, bio_queue_4 = 3, bio_queue_5 = 4, bio_queue_6 = 5);
copies!(bio::complete, "block_bio_complete":
    bio_complete_1 = 0, bio_complete_2 = 1, bio_complete_3 = 2, bio_complete_4 = 3, bio_complete_5 = 4, bio_complete_6 = 5);
