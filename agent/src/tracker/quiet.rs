//! The kernel's own count of a device's I/O, read so that a quiet moment is really one.
//!
//! A completion is traced first and accounted a moment later. Read in between, the kernel's count lacks what the tracker's has.
//! `inflight` does not tell: it counts what the driver has, and a completing request is out of it. Completions run in
//! interrupt or softirq context, so after nothing was in flight a grace period (`membarrier`) outlasts every one
//! that had begun. What is accounted in the meantime was traced after the first sample and shows in the second.

use super::account::KernelCount;
use crate::device;
use highwater_abi::class;

/// Reads it. `patient`: wait for a grace period (milliseconds) if nothing is in flight; without it the count is good for a
/// bound only, and never idle.
pub fn kernel_count(dev: u32, patient: bool) -> Option<KernelCount> {
    let whole = (dev >> 20, dev & 0xf_ffff);
    let still = || device::inflight(whole).is_ok_and(|(_, writes)| writes == 0);
    let idle = patient && still() && grace_period();
    let stat = device::stat(whole).ok()?;
    let mut sectors = [0; class::COUNT];
    sectors[class::WRITE] = stat.sectors_written;
    sectors[class::DISCARD] = stat.sectors_discarded;
    Some(KernelCount { sectors, idle: idle && still() })
}

fn grace_period() -> bool {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no memory is passed.
    let passed = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 };
    // Kernels with nohz_full CPUs refuse it; the tracepoints' barrier waits for a grace period too.
    passed || super::Barrier::new().and_then(|barrier| barrier.wait()).is_ok()
}

/// CLOCK_MONOTONIC, the programs' clock.
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| (t.tv_sec() as u64) * 1_000_000_000 + t.tv_nsec() as u64)
}
