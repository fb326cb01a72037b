//! Write-ordered capture: what is sealed of the stream, applied to a copy of each device, is the device; and each state on the way
//! is one that a crash could have left.
//!
//! A window that the kernel's own counts do not prove is never applied: then all starts over with a new copy. What the stream
//! leaves to be read again would hide a lost write, so it is counted, and confined: writers meet in one small area of each device
//! only, and of all other blocks none may be read again unless its completion was not shown.

mod closed;
mod replica;
mod round;
mod writers;

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use highwater_agent::capture::pool::BlockPool;
use highwater_agent::capture::{Found, Layout, Loss, Ring, StreamReader, Tap};
use highwater_agent::source::BufferPool;
use highwater_agent::tracker::barrier::Barrier;
use highwater_agent::tracker::probe::Kernel;

use super::machine;
use super::subject::Subject;

const RING_BYTES: usize = 64 << 20;
/// What is held of the stream beside the ring.
const POOL_BYTES: u64 = 192 << 20;
/// Buffers for reading single blocks.
const FETCH_BYTES: usize = 1 << 20;
/// Rounds that may be given up because a window was not proved.
const LOST_ROUNDS_MAX: usize = 3;

/// What a run showed, for its line.
#[derive(Debug, Default)]
pub struct Figures {
    /// How the kernel's memory was found.
    pub bases: String,
    /// Copies of the program.
    pub copies: usize,
    /// Changes captured in the round that was proved.
    pub events: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Proved windows.
    pub windows: usize,
    /// Positions that were held to be states that a crash could have left.
    pub states: usize,
    /// Times a copy was skipped, of all copies.
    pub skipped: u64,
    /// Rounds started over because the kernel had skipped every copy.
    pub lost: usize,
}

/// Runs it. `ext4` is the index of the device with the file system, which only file operations write to.
pub fn run(kernel: &Kernel, subjects: &mut [Subject], ext4: usize, duration: Duration) -> Result<Figures> {
    closed::check()?;
    let layout = Layout::of(kernel)?;
    let barrier = Barrier::new(layout.preemptible_tracepoints)?;
    let started = Instant::now();
    let (mut tap, mut ring) = Tap::load(layout, None, RING_BYTES).context("cannot load the programs")?;
    println!("  loaded in {:.2} s, {} copies", started.elapsed().as_secs_f64(), tap.copies());
    let bases = find(&mut tap, &mut ring, subjects)?;
    // What takes records out of the ring inherits it: the load must not starve it.
    // SAFETY: plain numbers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
    let reader = StreamReader::start(ring, BlockPool::new(POOL_BYTES), BufferPool::new(FETCH_BYTES))
        .context("cannot read the stream")?;
    let mut figures = Figures { bases, copies: tap.copies(), ..Figures::default() };
    loop {
        let seed = 0x500 + figures.lost as u64 * 16;
        match round::run(&mut tap, &reader, &barrier, subjects, ext4, (duration, seed), &mut figures)? {
            None => return Ok(figures),
            Some(loss @ (Loss::Skipped | Loss::Overflow(_))) if figures.lost < LOST_ROUNDS_MAX => {
                println!("  a window is not proved: {loss}; all over again");
                figures.lost += 1;
            }
            Some(loss) => bail!("the stream is not to be believed: {loss}"),
        }
    }
}

/// Finds the kernel's memory by reading from each device in turn; the last answer stays, and all are verified.
fn find(tap: &mut Tap, ring: &mut Ring, subjects: &[Subject]) -> Result<String> {
    let mut told = String::new();
    for subject in subjects {
        let started = Instant::now();
        let found =
            tap.prepare(ring, &subject.device).with_context(|| format!("reading {}", subject.name))?;
        println!(
            "  memory found by {}: {found:?}, verified, {:.2} s",
            subject.name,
            started.elapsed().as_secs_f64()
        );
        if found != Found::Agreed {
            // Stock kernels let root read their memory; one that does not is no failure of ours.
            let refused = File::open("/proc/kcore").err();
            let refused =
                refused.context("the kernel's own word was not used, though /proc/kcore can be read")?;
            println!("  the kernel's symbols could not be asked: /proc/kcore: {refused}");
        }
        told = format!("{found:?}");
    }
    ensure!(tap.found().is_some(), "nothing was verified");
    Ok(match machine::kaslr() {
        Some(true) => format!("{told} under KASLR"),
        Some(false) => told,
        None => format!("{told} (KASLR not told)"),
    })
}
