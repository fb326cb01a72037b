//! With the copies the kernel needs: nothing is missed, nothing is reported, and the counts equal the kernel's; through a
//! take-over and a frozen moment in the midst of the load.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use highwater_abi::class;
use highwater_agent::device::Hook;
use highwater_agent::tracker::{Fault, Options, Origin, Tracker};
use highwater_tests::buffer::Aligned;
use highwater_tests::{Churn, Freeze};

use super::discards;
use super::load::{self, Done, Load};
use super::machine;
use super::subject::{Epoch, Subject, epoch, epochs, missed, protect, settle, take_pending};

/// Where the file system is mounted.
const MOUNT: &str = "/mnt/ext4";
/// Writers stay out of the tracker's sight of it so long, between two lives.
const ORPHANED: Duration = Duration::from_millis(300);

/// Ends of epochs before what they marked is read.
const ENDS_PER_READING: usize = 5;

/// What a run showed, for its line.
#[derive(Debug, Default)]
pub struct Figures {
    /// Completions of all devices.
    pub events: u64,
    /// Times a copy was skipped.
    pub skipped: u64,
    /// Epochs ended.
    pub epochs: usize,
}

/// All epochs under load.
#[derive(Default)]
struct Total {
    epochs: usize,
    blocks: usize,
    ending: Duration,
    reading: Duration,
}

impl Total {
    fn add(&mut self, epoch: &Epoch) {
        self.epochs += ENDS_PER_READING;
        self.blocks += epoch.blocks;
        self.ending += epoch.ending;
        self.reading += epoch.reading;
    }
}

/// Runs it. `nvme` is the index of the device that takes many ranges in one discard, `ext4` that of the one with the file system,
/// which only file operations write to.
pub fn run(
    options: &Options,
    subjects: &mut [Subject],
    (nvme, ext4): (usize, usize),
    duration: Duration,
) -> Result<Figures> {
    machine::mount_ext4(&subjects[ext4].path, Path::new(MOUNT))?;
    let started = Instant::now();
    let (mut tracker, origin) = Tracker::open(options.clone()).context("cannot load the programs")?;
    ensure!(matches!(origin, Origin::Fresh(_)), "someone tracked already");
    println!("  loaded in {:.2} s, {} copies", started.elapsed().as_secs_f64(), tracker.copies());
    protect(&mut tracker, subjects)?;
    let (stop, done) = (AtomicBool::new(false), Done::default());
    let plan: Vec<_> = subjects.iter().map(|s| (s.path.clone(), load_of(s))).collect();
    let churns: Vec<Churn> =
        (1..=3).map(|seed| Churn::start(Path::new(MOUNT), seed)).collect::<Result<_>>()?;
    // The load must not starve what reads after it.
    // SAFETY: plain numbers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
    let mut total = Total::default();
    let loaded = thread::scope(|scope| {
        let mut writers = vec![];
        for (index, (path, load)) in plan.iter().enumerate().filter(|(index, _)| *index != ext4) {
            for writer in 0..load.writers {
                let (stop, done) = (&stop, &done);
                writers.push(
                    scope.spawn(move || load::write(path, *load, writer, index as u64 + 1, stop, done)),
                );
            }
        }
        let (path, stop_discards, discarded) = (&plan[nvme].0, &stop, &done);
        writers.push(scope.spawn(move || discards::under_load(path, 0x900, stop_discards, discarded)));
        let result = middle(options, tracker, subjects, ext4, duration, &mut total);
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().expect("writers do not panic")?;
        }
        result
    });
    let operations: u64 =
        churns.into_iter().map(Churn::stop).map(|c| c.map(|c| c.total())).sum::<Result<_>>()?;
    let mut tracker = loaded?;
    println!(
        "  load: {} writes, {} discards, {} zeroed, {operations} file operations",
        done.writes.load(Ordering::Relaxed),
        done.discards.load(Ordering::Relaxed),
        done.zeroes.load(Ordering::Relaxed),
    );
    println!(
        "  {} epochs, {} blocks read; ending took {:.1} s, reading {:.1} s",
        total.epochs,
        total.blocks,
        total.ending.as_secs_f64(),
        total.reading.as_secs_f64(),
    );
    nix::unistd::sync();
    let frozen = Freeze::new(Path::new(MOUNT))?;
    let all: Vec<_> = subjects.iter().map(|s| s.id).collect();
    ensure!(settle(&mut tracker, subjects, &all)?, "something stays in flight");
    let figures = judge(&tracker, subjects, total.epochs)?;
    drop(frozen);
    nix::mount::umount(MOUNT).context("cannot unmount")?;
    epoch(&mut tracker, subjects)?;
    passthrough(&mut tracker, subjects)?;
    tracker.detach()?;
    Ok(figures)
}

fn load_of(subject: &Subject) -> Load {
    match (subject.name, subject.device.hook) {
        // zram does not account discards and zeroing: its counts would not tell what was seen.
        ("zram", _) => {
            Load { discard: false, rest: Duration::from_millis(300), ..Load::mixed(&subject.path, 3, false) }
        }
        (_, Hook::Bio) => Load::mixed(&subject.path, 3, true),
        ("nvme", _) => Load::mixed(&subject.path, 6, true),
        _ => Load::mixed(&subject.path, 4, true),
    }
}

/// Epochs under load; a third in, a take-over; two thirds in, a frozen moment.
fn middle(
    options: &Options,
    mut tracker: Tracker,
    subjects: &mut [Subject],
    ext4: usize,
    duration: Duration,
    total: &mut Total,
) -> Result<Tracker> {
    let started = Instant::now();
    let mut cycle = |tracker: &mut Tracker, subjects: &mut [Subject], until: Instant| -> Result<()> {
        while Instant::now() < until {
            total.add(&epochs(tracker, subjects, ENDS_PER_READING)?);
        }
        Ok(())
    };
    cycle(&mut tracker, subjects, started + duration / 3)?;
    drop(tracker);
    thread::sleep(ORPHANED);
    let (mut tracker, origin) = Tracker::open(options.clone()).context("cannot take over")?;
    ensure!(origin == Origin::TakenOver, "not taken over: {origin:?}");
    let pending = take_pending(&tracker, subjects)?;
    println!("  taken over with {pending} blocks pending");
    cycle(&mut tracker, subjects, started + duration * 2 / 3)?;
    let disk = subjects[ext4].id;
    let frozen = Freeze::new(Path::new(MOUNT))?;
    ensure!(settle(&mut tracker, subjects, &[disk])?, "a frozen file system's disk is not at rest");
    let missed: usize = missed(&subjects[ext4..=ext4])?.iter().sum();
    drop(frozen);
    ensure!(missed == 0, "frozen under load: {missed} blocks of {} missed", subjects[ext4].name);
    println!("  frozen under load: 0 of {} blocks missed", subjects[ext4].device.sectors() / 8);
    cycle(&mut tracker, subjects, started + duration)?;
    Ok(tracker)
}

/// Compares devices with replicas, and counts with the kernel's.
fn judge(tracker: &Tracker, subjects: &[Subject], epochs: usize) -> Result<Figures> {
    let mut sum = Figures { epochs, ..Figures::default() };
    let mut wrong = vec![];
    for (subject, missed) in subjects.iter().zip(missed(subjects)?) {
        let figures = tracker.figures(subject.id)?;
        let counted = figures.counters;
        println!(
            "  {}: {} events, {} sectors written, {} discarded, {} only in the net, {} skipped, {missed} blocks missed",
            subject.name,
            counted.events.iter().sum::<u64>(),
            counted.sectors[class::WRITE],
            counted.sectors[class::DISCARD],
            figures.late,
            figures.misses,
        );
        sum.events += counted.events.iter().sum::<u64>();
        sum.skipped = sum.skipped.max(figures.misses);
        if missed > 0 {
            wrong.push(format!("{missed} blocks of {} were missed", subject.name));
        }
        if !subject.faults.is_empty() {
            wrong.push(format!("{} is suspect: {:?}", subject.name, subject.faults));
        }
        if counted.sectors[class::WRITE] == 0 {
            wrong.push(format!("nothing was seen of {}", subject.name));
        }
        if !figures.compared {
            wrong.push(format!("the counts of {} have no base", subject.name));
        }
        if Some(counted.sectors) != figures.kernel {
            wrong.push(format!(
                "{}: the kernel counts {:?}, the tracker {:?}",
                subject.name, figures.kernel, counted
            ));
        }
    }
    if !wrong.is_empty() {
        bail!(wrong.join("; "));
    }
    Ok(sum)
}

/// A write past the block layer makes its disk suspect, and no other.
fn passthrough(tracker: &mut Tracker, subjects: &mut [Subject]) -> Result<()> {
    for subject in subjects.iter_mut() {
        ensure!(subject.faults.is_empty(), "{} is suspect: {:?}", subject.name, subject.faults);
    }
    let nvme = subjects.iter().find(|s| s.name == "nvme").context("there is an nvme disk")?;
    let mut data = Aligned::zeroed(4096);
    data.fill(0x5a);
    machine::nvme_passthrough_write(&nvme.path, 7, &mut data)?;
    epoch(tracker, subjects)?;
    for subject in subjects.iter() {
        // Each copy of the programs was shown it.
        let right = match subject.faults[..] {
            [Fault::Passthrough(_)] => subject.name == "nvme",
            ref faults => faults.is_empty() && subject.name != "nvme",
        };
        ensure!(right, "after passthrough, {}: {:?}", subject.name, subject.faults);
    }
    println!("  a passthrough write makes its disk suspect");
    Ok(())
}
