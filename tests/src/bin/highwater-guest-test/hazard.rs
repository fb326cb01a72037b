//! With one copy and no net, on purpose, under load made to have programs skipped: a block may be missed, never silently.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use highwater_agent::device::Hook;
use highwater_agent::tracker::{Options, Origin, Tracker};

use super::load::{self, Done, Load};
use super::subject::{Subject, epoch, missed, protect, settle};

/// What the rounds showed together.
#[derive(Debug, Default)]
pub struct Figures {
    /// Completions of all devices.
    pub events: u64,
    /// Times a program was skipped.
    pub skipped: u64,
    /// Blocks missed.
    pub missed: usize,
    /// Rounds in which a disk became suspect.
    pub suspect: usize,
    /// Rounds run.
    pub rounds: usize,
}

/// Rounds until blocks were missed and reported, at most so many.
pub fn run(
    options: &Options,
    subjects: &mut [Subject],
    rounds_max: usize,
    duration: Duration,
) -> Result<Figures> {
    let mut figures = Figures::default();
    while figures.rounds < rounds_max && figures.missed == 0 {
        round(options, subjects, duration, &mut figures)?;
    }
    Ok(figures)
}

fn round(
    options: &Options,
    subjects: &mut [Subject],
    duration: Duration,
    figures: &mut Figures,
) -> Result<()> {
    let (mut tracker, origin) = Tracker::open(options.clone()).context("cannot load the programs")?;
    ensure!(matches!(origin, Origin::Fresh(_)), "someone tracked already");
    protect(&mut tracker, subjects)?;
    let (stop, done) = (AtomicBool::new(false), Done::default());
    let seed = 0x100 + figures.rounds as u64 * 16;
    let plan: Vec<_> = subjects.iter().map(|s| (s.path.clone(), load_of(s))).collect();
    thread::scope(|scope| -> Result<()> {
        let mut writers = vec![];
        for (index, (path, load)) in plan.iter().enumerate() {
            for writer in 0..load.writers {
                let (stop, done) = (&stop, &done);
                let seed = seed + index as u64;
                writers.push(scope.spawn(move || load::write(path, *load, writer, seed, stop, done)));
            }
        }
        let until = Instant::now() + duration;
        let mut result = Ok(());
        while result.is_ok() && Instant::now() < until {
            // Long epochs: reading must not take the processors from the completions.
            thread::sleep(Duration::from_millis(300));
            result = epoch(&mut tracker, subjects).map(drop);
        }
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().expect("writers do not panic")?;
        }
        result
    })?;
    let all: Vec<_> = subjects.iter().map(|s| s.id).collect();
    settle(&mut tracker, subjects, &all)?;
    // Once more at rest: the comparison with the kernel's counts must come to its exact reading.
    epoch(&mut tracker, subjects)?;
    figures.rounds += 1;
    println!("  round {}: {} writes", figures.rounds, done.writes.load(Ordering::Relaxed));
    let result = judge(&tracker, subjects, figures);
    tracker.detach()?;
    result
}

fn load_of(subject: &Subject) -> Load {
    match (subject.name, subject.device.hook) {
        ("nvme", _) => Load::small(12),
        (_, Hook::Request) => Load::small(8),
        ("zram", _) => Load::small(4),
        (_, Hook::Bio) => Load::small(6),
    }
}

fn judge(tracker: &Tracker, subjects: &[Subject], sum: &mut Figures) -> Result<()> {
    let (mut skipped, mut suspect, mut silent) = ([0, 0], false, vec![]);
    for (subject, missed) in subjects.iter().zip(missed(subjects)?) {
        let figures = tracker.figures(subject.id)?;
        sum.events += figures.counters.events.iter().sum::<u64>();
        sum.missed += missed;
        suspect |= !subject.faults.is_empty();
        // Misses are counted by program, not by device.
        skipped[usize::from(subject.device.hook == Hook::Bio)] = figures.misses;
        println!(
            "  {}: {} skipped, {missed} blocks missed, {} faults",
            subject.name,
            figures.misses,
            subject.faults.len()
        );
        for fault in subject.faults.iter().take(3) {
            println!("    {fault}");
        }
        if missed > 0 && subject.faults.is_empty() {
            silent.push(format!("{missed} blocks of {}", subject.name));
        }
    }
    sum.skipped += skipped.iter().sum::<u64>();
    sum.suspect += usize::from(suspect);
    if !silent.is_empty() {
        bail!("missed, and not reported: {}", silent.join(", "));
    }
    Ok(())
}
