//! How long the programs run for one write of 4 KiB, by the kernel's own statistics: those of tracking, those of capture, and all.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use highwater_tests::{Arena, Backing, LoopDisk};

use super::stream::{Way, Working};
use super::{MIB, seconds};
use crate::Choice;
use crate::load::{self, RANDOM_4K, SEQUENTIAL_1M};
use crate::programs::{self, Ran, Statistics};
use crate::results::{Results, Series};

const DISK_BYTES: u64 = 512 * MIB;
const ROUNDS: u32 = 3;

/// Of one round, for one write: nanoseconds and runs.
#[derive(Default)]
struct Parts {
    tracking: [Series; 2],
    capture: [Series; 2],
    all: Series,
    /// Nanoseconds of each capture program for one write.
    each: BTreeMap<String, Series>,
}

/// See the module.
pub fn programs(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES)?;
    load::write(disk.path(), SEQUENTIAL_1M, DISK_BYTES, 2)?;
    let mut parts = Parts::default();
    let mut dropped = 0;
    for _ in 0..choice.rounds.unwrap_or(if choice.quick { 1 } else { ROUNDS }) {
        let working = Working::start(arena, disk.path(), Way::Ordered)?.context("capture is at work")?;
        let _statistics = Statistics::on()?;
        let before = [programs::read(arena.bpf_dir())?, programs::held("capture_")?];
        let writes =
            load::write(disk.path(), RANDOM_4K, DISK_BYTES, seconds(choice, choice.seconds, 1))?.writes;
        let after = [programs::read(arena.bpf_dir())?, programs::held("capture_")?];
        dropped += working.stop()?.dropped;
        parts.push(&before, &after, writes);
    }
    let [time, runs] = &parts.tracking;
    results.row("programs of tracking, each 4 KiB write", time, "ns", "<= 350 ns");
    results.row("  their runs", runs, "", "");
    let [time, runs] = &parts.capture;
    results.row("programs of capture, each 4 KiB write", time, "ns", "");
    results.row("  their runs", runs, "", "");
    for (name, series) in &parts.each {
        results.row(&format!("  of it {name}"), series, "ns", "");
    }
    results.row("all programs, each 4 KiB write", &parts.all, "ns", "<= 1100 ns");
    results.row("  records dropped meanwhile", &(dropped as f64).into(), "", "0");
    results.note(
        "Times of programs are the kernel's (bpf_stats_enabled), summed over the copies; the statistics themselves are in\n\
         each run: a copy of the capture program that finds its write handled by another shows about how much.",
    );
    Ok(())
}

impl Parts {
    fn push(&mut self, before: &[BTreeMap<String, Ran>; 2], after: &[BTreeMap<String, Ran>; 2], writes: u64) {
        let per_write = |value: u64| value as f64 / writes.max(1) as f64;
        let mut all = 0.0;
        for (at, part) in [&mut self.tracking, &mut self.capture].into_iter().enumerate() {
            let mut sum = Ran::default();
            for (name, ran) in &after[at] {
                let was = before[at].get(name).copied().unwrap_or_default();
                let time_ns = ran.time_ns - was.time_ns;
                sum.time_ns += time_ns;
                sum.count += ran.count - was.count;
                if at == 1 && ran.count > was.count {
                    self.each.entry(name.clone()).or_default().push(per_write(time_ns));
                }
            }
            part[0].push(per_write(sum.time_ns));
            part[1].push(per_write(sum.count));
            all += per_write(sum.time_ns);
        }
        self.all.push(all);
    }
}
