//! Write-ordered capture: the payload of each change of a captured device, copied at submission into one ring buffer, in
//! the order of submission; completions in between. See `highwater_abi::stream` for the records.
//!
//! An object of its own beside the tracking programs, which go on beneath it: this one is loaded and attached while writes
//! are captured, and nothing here can take a bit away.
//!
//! * `block_bio_queue` runs before the bio is issued, so whoever depends on the write submits after its record.
//! * The program exists in several copies, since the kernel skips one that is already running on the CPU. A copy that
//!   finds its bio handled by one before leaves. If in doubt it captures again: twice is harmless, never is not.
//! * What the ring has no room for, or cannot be read, is counted; user space believes no stretch of the stream in which
//!   such a count or every copy's misses have grown.
#![no_std]
#![no_main]

mod complete;
#[path = "../kernel.rs"]
mod kernel;
mod maps;
mod probe;
mod submit;
mod walk;

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

/// The kernel allows the tracing helpers only to programs under a GPL-compatible licence.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

macro_rules! programs {
    ($body:path, $tracepoint:literal: $($name:ident = $copy:literal),*) => { $(
        #[btf_tracepoint(function = $tracepoint)]
        pub fn $name(ctx: BtfTracePointContext) -> i32 {
            // SAFETY: the arguments and structures read are those of this tracepoint, and the verifier checks each load.
            unsafe { $body(&ctx, $copy) }
            0
        }
    )* };
}

programs!(submit::queue, "block_bio_queue":
    capture_1 = 1, capture_2 = 2, capture_3 = 3, capture_4 = 4, capture_5 = 5, capture_6 = 6);
programs!(probe::queue, "block_bio_queue": capture_probe = 7);
programs!(complete::request, "block_rq_complete": capture_rq_complete = 0);
programs!(complete::bio, "block_bio_complete": capture_bio_complete = 0);
