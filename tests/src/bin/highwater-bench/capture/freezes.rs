//! How long filesystem-consistent points freeze a filesystem under load: write-ordered mode beside bitmap mode, in turn.
//!
//! One installation changes between the modes: the agent is stopped, `capture.mode` is changed, and it goes on from its bitmaps.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Backing, FileSystem, Fio, FioKind, LoopDisk, Mounted, Site};

use super::{MIB, stored};
use crate::Choice;
use crate::agent::{self, timings};
use crate::results::{Results, Series};

const DISK_BYTES: u64 = 512 * MIB;
/// The rounds, and the points of each mode in each: ten of each in all.
const ROUNDS: u32 = 5;
const ROUNDS_QUICK: u32 = 2;
const POINTS: u32 = 2;
const BETWEEN: Duration = Duration::from_millis(500);
const LOAD_BYTES_PER_S: u64 = 32 * MIB;
/// Longer than all points of a round can take; then the load is ended.
const LOAD_SECONDS: u32 = 600;
const MODES: [(&str, &str, &str); 2] =
    [("bitmap", "off", "bitmap"), ("write-ordered", "automatic", "write-ordered")];

/// Of one mode, in milliseconds.
#[derive(Default)]
struct Freezes {
    /// As told by the points.
    whole: Series,
    /// The kernel's own part: `FIFREEZE`.
    enter: Series,
    /// Beyond it.
    beyond: Series,
}

/// See the module.
pub fn freezes(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES)?;
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = agent::fresh(arena)?;
    site.allow(" WARN ");
    site.protect(disk.path(), "bench")?;
    site.wait_replicated()?;
    let mut freezes = <[Freezes; 2]>::default();
    let rounds = choice.rounds.unwrap_or(if choice.quick { ROUNDS_QUICK } else { ROUNDS });
    for round in 0..rounds as usize {
        eprintln!("round {} of {rounds}", round + 1);
        for turn in 0..MODES.len() {
            let at = (round + turn) % MODES.len();
            let (_, mode, state) = MODES[at];
            switch(&mut site, mode)?;
            // Dropped, it ends: before the filesystem goes.
            let _load = Fio::new(&mounted.path().join("load"), FioKind::Buffered, 64 * MIB)
                .rate_bytes_per_s(LOAD_BYTES_PER_S)
                .runtime_s(LOAD_SECONDS)
                .start()?;
            site.wait_state("bench", state, Duration::from_secs(60))?;
            // The first one has more to do than those that follow.
            site.point()?;
            some(arena, &site, &mut freezes[at])?;
        }
    }
    for ((name, ..), freezes) in MODES.iter().zip(&freezes) {
        let target = if *name == "write-ordered" { "p99 <= 20 ms" } else { "" };
        results.row(&format!("freeze, ext4, fio 32 MiB/s, {name}"), &freezes.whole, "ms", "");
        results.row("  p99", &freezes.whole.quantile(0.99).into(), "ms", "");
        results.row("  of it FIFREEZE, the kernel's own", &freezes.enter, "ms", "");
        results.row("  beyond it", &freezes.beyond, "ms", "");
        results.row("  beyond it, p99", &freezes.beyond.quantile(0.99).into(), "ms", target);
    }
    agent::dismiss(site)
}

/// Some points, after one another.
fn some(arena: &Arena, site: &Site, freezes: &mut Freezes) -> Result<()> {
    let log_from = agent::log(arena).len();
    let mut wanted = vec![];
    for _ in 0..POINTS {
        thread::sleep(BETWEEN);
        wanted.push(site.point()?);
    }
    let last = *wanted.last().context("a round has points")?;
    let stored = stored::wait_logged(arena, log_from, last)?;
    for point in stored.iter().filter(|point| wanted.contains(&point.number)) {
        ensure!(point.freeze_us > 0.0, "point {} was made without a freeze", point.number);
        freezes.whole.push(point.freeze_us / 1e3);
    }
    // Freezes of attempts that failed are among them.
    let told = timings(arena, log_from);
    told.enter.values().iter().for_each(|enter| freezes.enter.push(*enter));
    told.beyond.values().iter().for_each(|beyond| freezes.beyond.push(*beyond));
    Ok(())
}

/// Restarts the agent in another mode.
fn switch(site: &mut Site, mode: &str) -> Result<()> {
    let path = site.agent_config().to_path_buf();
    let lines: Vec<String> = (fs::read_to_string(&path)?.lines())
        .map(|line| if line.starts_with("mode = ") { format!("mode = \"{mode}\"") } else { line.to_owned() })
        .collect();
    fs::write(&path, lines.join("\n"))?;
    site.stop_agent()?;
    site.start_agent()
}
