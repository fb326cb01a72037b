//! What the writer pays: its rate without anything, tracked, and captured, on a disk in memory and on a file with direct I/O.

use anyhow::Result;
use highwater_tests::{Arena, Backing, LoopDisk};

use super::stream::{Told, Way, Working};
use super::{MB, MIB, seconds};
use crate::Choice;
use crate::load::{self, Pattern, RANDOM_4K, SEQUENTIAL_1M};
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
    }
    Ok(())
}

fn random(
    arena: &Arena,
    choice: &Choice,
    (name, disk, target): (&str, &LoopDisk, &str),
    results: &mut Results,
) -> Result<()> {
    let (rates, told) = compare(arena, choice, disk, RANDOM_4K, |done| done.iops)?;
    let what = format!("{name}, 4 KiB random, QD 32");
    tell(results, &what, "IOPS", &rates, [">= 0.98", target], told);
    Ok(())
}

fn sequential(
    arena: &Arena,
    choice: &Choice,
    (name, disk): (&str, &LoopDisk),
    results: &mut Results,
) -> Result<()> {
    let (rates, told) = compare(arena, choice, disk, SEQUENTIAL_1M, |done| done.bytes_per_s / MB)?;
    tell(results, &format!("{name}, 1 MiB sequential"), "MB/s", &rates, ["", ""], told);
    Ok(())
}

/// The rates of each way, and what was lost in all rounds of the last.
fn compare(
    arena: &Arena,
    choice: &Choice,
    disk: &LoopDisk,
    pattern: Pattern,
    rate: impl Fn(load::Done) -> f64,
) -> Result<([Series; 3], Told)> {
    let mut rates = <[Series; 3]>::default();
    let mut all = Told::default();
    let rounds = choice.rounds.unwrap_or(if choice.quick { 2 } else { ROUNDS }) as usize;
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for turn in 0..Way::ALL.len() {
            // Each way comes first, last and in between.
            let at = (round + turn) % Way::ALL.len();
            let working = Working::start(arena, disk.path(), Way::ALL[at])?;
            rates[at].push(rate(load::write(
                disk.path(),
                pattern,
                DISK_BYTES,
                seconds(choice, choice.seconds, 1),
            )?));
            if let Some(working) = working {
                all.add(working.stop()?);
            }
        }
    }
    Ok((rates, all))
}

fn tell(
    results: &mut Results,
    what: &str,
    unit: &str,
    [none, bitmap, ordered]: &[Series; 3],
    [target_bitmap, target_ordered]: [&str; 2],
    told: Told,
) {
    results.row(&format!("{what}: untracked"), none, unit, "");
    results.row("  tracked, of untracked, by round", &bitmap.ratio(none), "", target_bitmap);
    results.row("  captured, of untracked, by round", &ordered.ratio(none), "", target_ordered);
    results.row("  captured", ordered, unit, "");
    results.row("  captured: records dropped, all rounds", &(told.dropped as f64).into(), "", "0");
    if told.losses + told.unsealed > 0 {
        results.note(format!(
            "{what}: of {} batches the stream lacked something {} times, and {} times no position could be sealed in time; what\n\
             is dropped costs less than what is captured.",
            told.sealed, told.losses, told.unsealed
        ));
    }
}
