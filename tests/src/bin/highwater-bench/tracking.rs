//! What tracking costs: random 4 KiB writes at queue depth 32 to a disk in memory, where nothing else takes long.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use highwater_agent::device;
use highwater_agent::tracker::{Options, Tracker};
use highwater_delta::DiskId;
use highwater_tests::{Arena, Backing, LoopDisk};

use crate::Choice;
use crate::load::{self, RANDOM_4K, SEQUENTIAL_1M};
use crate::programs::{self, Statistics};
use crate::results::{Results, Series};

const DISK_BYTES: u64 = 512 << 20;
const ROUNDS: u32 = 5;

/// A way to track, or none.
struct Way {
    name: &'static str,
    how: Option<(usize, bool)>,
    target: &'static str,
}

const WAYS: [Way; 5] = [
    Way { name: "untracked", how: None, target: "" },
    Way {
        name: "tracked: 3 copies, net (the default)",
        how: Some((3, true)),
        target: ">= 0.98 of untracked",
    },
    Way { name: "tracked: 3 copies, no net", how: Some((3, false)), target: "" },
    Way { name: "tracked: 1 copy, net", how: Some((1, true)), target: "" },
    Way { name: "tracked: 1 copy, no net", how: Some((1, false)), target: "" },
];

/// The programs at work; gone from the kernel when dropped.
struct Tracking {
    tracker: Option<Tracker>,
    disk: DiskId,
    bpf_dir: PathBuf,
}

impl Tracking {
    fn start(arena: &Arena, device: &Path, copies: usize, net: bool) -> Result<Self> {
        let bpf_dir = arena.bpf_dir().to_path_buf();
        let (mut tracker, _) = Tracker::open(Options {
            bpf_dir: bpf_dir.clone(),
            run_dir: arena.dir().join("run"),
            copies: Some(copies),
            net,
            bits_max: 1 << 28,
        })?;
        let disk = DiskId::new();
        tracker.protect(disk, &device::inspect(device)?)?;
        Ok(Tracking { tracker: Some(tracker), disk, bpf_dir })
    }

    /// Something was seen, and with the net nothing was missed. Without it, some kernels hide events from all copies; the tracker
    /// must notice, and that costs nothing here.
    fn check(&mut self, net: bool) -> Result<()> {
        let tracker = self.tracker.as_mut().context("tracking has ended")?;
        let mut words = 0u64;
        let end = tracker.end_epoch(|_, _, _| words += 1)?;
        ensure!(!net || end.faults.is_empty(), "with the net: {:?}", end.faults);
        if let Some((_, fault)) = end.faults.first() {
            eprintln!("without the net: {fault}");
        }
        ensure!(words > 0, "disk {} was written to and nothing was marked", self.disk);
        Ok(())
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.tracker.take().map(Tracker::detach) {
            eprintln!("bench: {error}");
        }
    }
}

/// All of it.
pub fn measure(choice: &Choice) -> Result<Results> {
    let arena = Arena::enter("bench-tracking")?;
    let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES)?;
    // Every page of the disk is there before anything is measured.
    load::write(disk.path(), SEQUENTIAL_1M, DISK_BYTES, choice.seconds)?;
    let mut iops: Vec<Series> = vec![Series::default(); WAYS.len()];
    let rounds = choice.rounds.unwrap_or(ROUNDS) as usize;
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for turn in 0..WAYS.len() {
            // Each way comes first, last and in between.
            let way = (round + turn) % WAYS.len();
            iops[way].push(run(&arena, disk.path(), WAYS[way].how, choice.seconds)?);
        }
    }
    let mut results = Results::default();
    for (way, series) in WAYS.iter().zip(&iops) {
        results.row(way.name, series, "IOPS", "");
        if way.how.is_some() {
            results.row("  of untracked, by round", &series.ratio(&iops[0]), "", way.target);
        }
    }
    for (copies, net) in [(3, true), (1, true), (3, false)] {
        let target = if (copies, net) == (3, true) { "<= 350 ns" } else { "" };
        time(&arena, disk.path(), copies, net, choice.seconds, &mut results, target)?;
    }
    results.note(
        "Times are the kernel's (bpf_stats_enabled), which adds some 60 ns to every run of a program: what runs without\n\
         statistics takes that much less. \"In all\" is the sum over all programs for one 4 KiB write.",
    );
    Ok(results)
}

fn run(arena: &Arena, device: &Path, how: Option<(usize, bool)>, seconds: u32) -> Result<f64> {
    let mut tracking = how.map(|(copies, net)| Tracking::start(arena, device, copies, net)).transpose()?;
    let iops = load::write(device, RANDOM_4K, DISK_BYTES, seconds)?.iops;
    if let (Some(tracking), Some((_, net))) = (&mut tracking, how) {
        tracking.check(net)?;
    }
    Ok(iops)
}

/// With statistics, and so not compared with anything.
fn time(
    arena: &Arena,
    device: &Path,
    copies: usize,
    net: bool,
    seconds: u32,
    results: &mut Results,
    target: &str,
) -> Result<()> {
    let tracking = Tracking::start(arena, device, copies, net)?;
    let _statistics = Statistics::on()?;
    let before = programs::read(&tracking.bpf_dir)?;
    let writes = load::write(device, RANDOM_4K, DISK_BYTES, seconds)?.writes;
    let after = programs::read(&tracking.bpf_dir)?;
    let way = format!(
        "{copies} {}, {}",
        if copies == 1 { "copy" } else { "copies" },
        if net { "net" } else { "no net" }
    );
    let mut hooks: BTreeMap<&str, Series> = BTreeMap::new();
    let mut all_ns = 0.0;
    for (name, ran) in &after {
        let was = before.get(name).copied().unwrap_or_default();
        let (time, count) = (ran.time_ns - was.time_ns, ran.count - was.count);
        all_ns += time as f64 / writes.max(1) as f64;
        if count > 0 {
            let hook = name.rsplit_once('_').map_or(name.as_str(), |(stem, _)| stem);
            hooks.entry(hook).or_default().push(time as f64 / count as f64);
        }
    }
    for (hook, series) in hooks {
        let target = if hook == "rq_complete" && copies == 3 { "<= 150 ns per copy" } else { "" };
        results.row(&format!("{way}: {hook}, each copy and event"), &series, "ns", target);
    }
    results.row(&format!("{way}: in all, each write"), &all_ns.into(), "ns", target);
    Ok(())
}
