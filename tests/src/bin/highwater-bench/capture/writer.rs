//! What the writer pays: its rate without anything, tracked, and captured, on a disk in memory and on a file with direct I/O.
//!
//! The reader of the stream runs on the same processors as fio and the loop device's own threads: where there are few, what it takes of
//! them is much of what the writer pays. It is told beside; and what the writer pays where the stream is captured but nobody reads more of
//! it than where its records end, which is about what it pays where the reader has a processor of its own.

use anyhow::Result;
use highwater_tests::{Arena, Backing, LoopDisk};

use super::stream::{Told, Way, Working};
use super::{MB, MIB, seconds};
use crate::Choice;
use crate::load::{self, PACED_4K, Pattern, RANDOM_4K, SEQUENTIAL_1M};
use crate::results::{Results, Series};

const DISK_BYTES: u64 = 512 * MIB;
const ROUNDS: u32 = 5;
const DISKS: [(&str, Backing, &str); 2] =
    [("RAM disk", Backing::Tmpfs, ">= 0.85"), ("file, direct I/O", Backing::File, ">= 0.95")];

/// See the module.
pub fn writer(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    for (name, backing, target) in DISKS {
        let disk = LoopDisk::new(backing, DISK_BYTES)?;
        // Every block of the disk is there before anything is measured.
        load::write(disk.path(), SEQUENTIAL_1M, DISK_BYTES, seconds(choice, 4, 2))?;
        random(arena, choice, (name, &disk, target), results)?;
        sequential(arena, choice, (name, &disk), results)?;
        if backing == Backing::File {
            paced(arena, choice, (name, &disk), results)?;
        }
    }
    Ok(())
}

/// Where the disk is the bound and not the processors.
fn paced(
    arena: &Arena,
    choice: &Choice,
    (name, disk): (&str, &LoopDisk),
    results: &mut Results,
) -> Result<()> {
    let what = format!("{name}, 4 KiB random at {} IOPS", PACED_4K.rate_iops);
    compare(arena, choice, disk, PACED_4K, |done| done.iops)?.tell(
        results,
        &what,
        "IOPS",
        [">= 0.98", ">= 0.95"],
    );
    let mean = compare(arena, choice, disk, PACED_4K, |done| done.mean_us)?;
    mean.tell(results, &format!("{what}, time of one"), "us", ["", ""]);
    Ok(())
}

/// What was measured of one pattern.
#[derive(Default)]
struct Compared {
    /// One for each [`Way`].
    rates: [Series; 4],
    /// Processor seconds of reading, assembling and sealing 10^9 bytes that were captured.
    reading: Series,
    /// In all rounds of the last way.
    told: Told,
}

fn random(
    arena: &Arena,
    choice: &Choice,
    (name, disk, target): (&str, &LoopDisk, &str),
    results: &mut Results,
) -> Result<()> {
    let compared = compare(arena, choice, disk, RANDOM_4K, |done| done.iops)?;
    compared.tell(results, &format!("{name}, 4 KiB random, QD 32"), "IOPS", [">= 0.98", target]);
    Ok(())
}

fn sequential(
    arena: &Arena,
    choice: &Choice,
    (name, disk): (&str, &LoopDisk),
    results: &mut Results,
) -> Result<()> {
    let compared = compare(arena, choice, disk, SEQUENTIAL_1M, |done| done.bytes_per_s / MB)?;
    compared.tell(results, &format!("{name}, 1 MiB sequential"), "MB/s", ["", ""]);
    Ok(())
}

fn compare(
    arena: &Arena,
    choice: &Choice,
    disk: &LoopDisk,
    pattern: Pattern,
    rate: impl Fn(load::Done) -> f64,
) -> Result<Compared> {
    let mut compared = Compared::default();
    let rounds = choice.rounds.unwrap_or(if choice.quick { 2 } else { ROUNDS }) as usize;
    let seconds = seconds(choice, choice.seconds, 1);
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for turn in 0..Way::ALL.len() {
            // Each way comes first, last and in between.
            let at = (round + turn) % Way::ALL.len();
            let working = Working::start(arena, disk.path(), Way::ALL[at])?;
            let done = load::write(disk.path(), pattern, DISK_BYTES, seconds)?;
            compared.rates[at].push(rate(done));
            let Some(told) = working.map(Working::stop).transpose()? else { continue };
            if Way::ALL[at] == Way::Ordered {
                compared.reading.push(told.cpu_s * 1e9 / done.bytes.max(1) as f64);
                compared.told.add(told);
            }
        }
    }
    Ok(compared)
}

impl Compared {
    fn tell(&self, results: &mut Results, what: &str, unit: &str, targets: [&str; 2]) {
        let [none, bitmap, passed, ordered] = &self.rates;
        results.row(&format!("{what}: untracked"), none, unit, "");
        results.row("  tracked, of untracked, by round", &bitmap.ratio(none), "", targets[0]);
        results.row("  captured and passed over, of untracked, by round", &passed.ratio(none), "", "");
        results.row("  captured, of untracked, by round", &ordered.ratio(none), "", targets[1]);
        results.row("  captured", ordered, unit, "");
        results.row("  processor time of reading and sealing, a GB", &self.reading, "s", "");
        let told = self.told;
        results.row("  records dropped, all rounds", &(told.dropped as f64).into(), "", "0");
        if told.losses + told.unsealed > 0 {
            results.note(format!(
                "{what}: {} batches were sealed; the stream lacked something {} times, and {} times no position could be\n\
                 sealed in time. What is dropped costs less than what is captured.",
                told.sealed, told.losses, told.unsealed
            ));
        }
    }
}
