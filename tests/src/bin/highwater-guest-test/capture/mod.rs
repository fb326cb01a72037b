//! Write-ordered capture: what is sealed of the stream, applied to a copy of each device, is the device; and each state on the way
//! is one that a crash could have left.
//!
//! The same of a database whose data and log are two volumes of LVM (`volumes`), at many more positions; of discards of many
//! ranges in one request (`scattered`); and of a disk beneath which device-mapper logs all writes (`logged`), by that log.
//!
//! A window that the kernel's own counts do not prove is never applied: then all starts over with a new copy. What the stream
//! leaves to be read again would hide a lost write, so it is counted, and confined: writers meet in one small area of each device
//! only, and what is read again elsewhere (where a completion was not shown) is counted apart.

mod closed;
mod follow;
mod journal;
mod logged;
mod logged_writers;
mod oracle;
mod replica;
mod round;
mod scattered;
mod volumes;
mod work;
mod write_log;
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
pub use logged::Disks as LoggedDisks;

const RING_BYTES: usize = 64 << 20;
/// What is held of the stream beside the ring.
const POOL_BYTES: u64 = 192 << 20;
/// Buffers for reading single blocks.
const FETCH_BYTES: usize = 1 << 20;
/// Rounds that may be given up because a window was not proved, for one that is.
const LOST_ROUNDS_MAX: usize = 3;
/// Rounds of the database on two volumes.
const SHORT_ROUNDS: u32 = 2;

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
    /// Rounds started over because a window was not proved.
    pub lost: usize,
    /// Of the database on two volumes.
    pub volumes: volumes::Figures,
    /// Of the disk whose writes were logged.
    pub logged: logged::Figures,
    /// What became of a round with one copy, where that is too few.
    pub too_few: Option<&'static str>,
}

/// What is captured.
pub struct Disks<'s> {
    /// Devices of all kinds.
    pub subjects: &'s mut [Subject],
    /// Which of them has the file system: only file operations write to it.
    pub ext4: usize,
    /// Which of them takes many ranges in one discard.
    pub nvme: usize,
    /// The volumes of data and log.
    pub volumes: &'s mut [Subject],
    /// The disk beneath which writes are logged, and the log's.
    pub logged: logged::Disks,
}

/// Runs it.
pub fn run(kernel: &Kernel, disks: Disks<'_>, duration: Duration) -> Result<Figures> {
    let Disks { subjects, ext4, nvme, volumes, logged } = disks;
    closed::check()?;
    // What takes records out of the ring inherits it: the load must not starve it.
    // SAFETY: plain numbers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
    let (mut capture, bases) = Capture::load(kernel, None, subjects)?;
    let mut figures = Figures { bases, copies: capture.tap.copies(), ..Figures::default() };
    figures.lost =
        until_proved(0x500, |seed| round::run(&mut capture, subjects, ext4, (duration, seed), &mut figures))?;
    // Where positions are many, a window that is not proved is not rare; a short round is the sooner without.
    for at in 1..=SHORT_ROUNDS {
        println!("  a database on two volumes");
        figures.lost += until_proved(0x700 + u64::from(at) * 0x100, |seed| {
            let long = (duration / (SHORT_ROUNDS * 2), seed);
            volumes::run(&mut capture, volumes, long, &mut figures.volumes)
        })?;
    }
    println!("  discards of many ranges in one request");
    figures.lost += until_proved(0xa00, |seed| scattered::run(&mut capture, &mut subjects[nvme], seed))?;
    println!("  a disk whose writes are logged");
    figures.lost += until_proved(0xb00, |seed| {
        logged::run(&mut capture, &logged, (duration / 3, seed), &mut figures.logged)
    })?;
    drop(capture);
    if kernel.preemptible_tracepoints {
        figures.too_few = Some(too_few(kernel, subjects, ext4, duration / 2)?);
    }
    Ok(figures)
}

/// Rounds until one is proved, each with a seed of its own. Answers how many were not.
fn until_proved(seed: u64, mut round: impl FnMut(u64) -> Result<Option<Loss>>) -> Result<usize> {
    let mut lost = 0;
    loop {
        match round(seed + lost as u64 * 16)? {
            None => return Ok(lost),
            Some(loss @ (Loss::Skipped | Loss::Overflow(_))) if lost < LOST_ROUNDS_MAX => {
                println!("  a window is not proved: {loss}; all over again");
                lost += 1;
            }
            Some(loss) => bail!("the stream is not to be believed: {loss}"),
        }
    }
}

/// With one copy on purpose, where that is too few: a round that is believed all the same must be exact.
fn too_few(
    kernel: &Kernel,
    subjects: &mut [Subject],
    ext4: usize,
    duration: Duration,
) -> Result<&'static str> {
    println!("  with one copy on purpose");
    let (mut capture, _) = Capture::load(kernel, Some(1), &subjects[..1])?;
    let mut figures = Figures::default();
    match round::run(&mut capture, subjects, ext4, (duration, 0x600), &mut figures)? {
        Some(Loss::Skipped) => Ok("refused"),
        Some(Loss::Overflow(_)) => Ok("overflowed"),
        None => Ok("exact"),
        Some(loss) => bail!("the stream is not to be believed: {loss}"),
    }
}

/// The programs, and who reads what they capture.
struct Capture {
    tap: Tap,
    reader: StreamReader,
    barrier: Barrier,
}

impl Capture {
    /// Loads so many copies, or those needed, and finds the kernel's memory. Answers how.
    fn load(kernel: &Kernel, copies: Option<usize>, subjects: &[Subject]) -> Result<(Self, String)> {
        let layout = Layout::of(kernel)?;
        let barrier = Barrier::new(layout.preemptible_tracepoints)?;
        let started = Instant::now();
        let (mut tap, mut ring) =
            Tap::load(layout, copies, RING_BYTES).context("cannot load the programs")?;
        println!("  loaded in {:.2} s, {} copies", started.elapsed().as_secs_f64(), tap.copies());
        let bases = find(&mut tap, &mut ring, subjects)?;
        let reader = StreamReader::start(ring, BlockPool::new(POOL_BYTES), BufferPool::new(FETCH_BYTES))
            .context("cannot read the stream")?;
        Ok((Self { tap, reader, barrier }, bases))
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
