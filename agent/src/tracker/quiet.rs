//! The kernel's own count of a device's I/O, read so that a quiet moment is really one.
//!
//! A completion is traced first and accounted a moment later. Read in between, the kernel's count lacks what the tracker's has.
//! `inflight` does not tell: it counts what the driver has, and a completing request is out of it. Completions run in
//! interrupt or softirq context, so after nothing was in flight a [`Barrier`](super::Barrier) outlasts every one
//! that had begun. What is accounted in the meantime was traced after the first sample and shows in the second.
//!
//! So: [`at_rest`], the barrier, [`kernel_count`].

use super::account::KernelCount;
use crate::device;
use highwater_abi::class;

/// Whether nothing that changes the device is in flight. A device whose I/O is not counted (`queue/iostats`) never is.
pub fn at_rest(dev: u32) -> bool {
    device::inflight(numbers(dev)).is_ok_and(|(_, writes)| writes == 0) && counted(dev)
}

/// Whether the kernel counts the device's I/O.
fn counted(dev: u32) -> bool {
    device::iostats_on(numbers(dev)).unwrap_or(true)
}

/// Reads it. `rested`: nothing was in flight before the barrier. `None`: the device cannot be asked, or is not counted.
pub fn kernel_count(dev: u32, rested: bool) -> Option<KernelCount> {
    if !counted(dev) {
        return None;
    }
    let stat = device::stat(numbers(dev)).ok()?;
    let mut sectors = [0; class::COUNT];
    sectors[class::WRITE] = stat.sectors_written;
    sectors[class::DISCARD] = stat.sectors_discarded;
    Some(KernelCount { sectors, idle: rested && at_rest(dev) })
}

/// CLOCK_MONOTONIC, the programs' clock.
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| (t.tv_sec() as u64) * 1_000_000_000 + t.tv_nsec() as u64)
}

fn numbers(dev: u32) -> (u32, u32) {
    (dev >> 20, dev & 0xf_ffff)
}
