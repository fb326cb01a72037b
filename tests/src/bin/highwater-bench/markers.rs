//! Markers of a group: how long its machines are frozen, and how far apart the first freeze and the last thaw are.
//!
//! Real agents, each in a network namespace with a disk and a file system that is written to, all on this machine: its processors are shared by
//! all of them, and each write is shown to the programs of all. The baseline is a group of one machine, which waits for nobody.

use super::{
    Choice,
    results::{Results, Series},
};
use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Causal, Fleet, FleetOptions};
use std::{
    collections::BTreeMap,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const SIZES: [usize; 5] = [1, 2, 8, 16, 32];
const LOG: &str = "info,highwater_agent::engine::group=debug";
/// For the first of so many markers.
const PATIENCE: Duration = Duration::from_secs(120);

/// Of one marker, in microseconds.
struct Marker {
    /// From the first machine's freeze to the last one's thaw.
    spread_us: f64,
    /// Of each machine.
    frozen_us: Vec<f64>,
}

pub fn measure(choice: &Choice) -> Result<Results> {
    let mut results = Results::default();
    let wanted = choice.rounds.unwrap_or(if choice.quick { 2 } else { 15 }) as usize;
    let mut alone = Series::default();
    for machines in SIZES.into_iter().filter(|machines| !choice.quick || *machines <= 8) {
        let markers = of(machines, wanted)?;
        let (mut spread, mut frozen, mut longest) = (Series::default(), Series::default(), Series::default());
        for marker in &markers {
            spread.push(marker.spread_us / 1000.0);
            marker.frozen_us.iter().for_each(|us| frozen.push(us / 1000.0));
            longest.push(marker.frozen_us.iter().copied().fold(0.0, f64::max) / 1000.0);
        }
        let target = if machines == 16 { "50 ms" } else { "" };
        results.row(&format!("{machines} machines: first freeze to last thaw"), &spread, "ms", target);
        results.row(&format!("{machines} machines: a machine is frozen"), &frozen, "ms", "");
        if machines == 1 {
            alone = longest;
        } else {
            let base = Series::from(alone.median());
            results.row(
                &format!("{machines} machines: the same, median, of one alone"),
                &Series::from(frozen.median()).ratio(&base),
                "times",
                "",
            );
        }
    }
    results.note("All machines share the processors of this one; so do the eBPF programs of all of them.");
    Ok(results)
}

fn of(machines: usize, wanted: usize) -> Result<Vec<Marker>> {
    let arena = Arena::enter("bench-markers")?;
    let options = FleetOptions {
        machines,
        ordered: (0..machines).collect(),
        log: Some(LOG),
        ..FleetOptions::default()
    };
    let mut fleet = Fleet::new(&arena, &options)?;
    for warning in ["HW-1458", "HW-1463", "session ended", "no recovery point this time"] {
        fleet.allow(warning);
    }
    let places: Vec<_> = fleet.nodes.iter().map(|node| node.mounted.path().to_path_buf()).collect();
    let places: Vec<&Path> = places.iter().map(std::path::PathBuf::as_path).collect();
    let load = Causal::start(&places, 2, 1000)?;
    let all: Vec<usize> = (0..machines).collect();
    fleet.group("shop", &all, &["--crash-every", "1s"])?;
    let until = Instant::now() + PATIENCE;
    let markers = loop {
        let markers = complete(&fleet, machines)?;
        // The first ones make the connections.
        if markers.len() > wanted {
            break markers;
        }
        ensure!(Instant::now() < until, "{} markers of {wanted} in {PATIENCE:?}", markers.len());
        thread::sleep(Duration::from_millis(500));
    };
    load.stop()?;
    Ok(markers.into_iter().skip(1).collect())
}

/// The markers that all have kept, oldest first.
fn complete(fleet: &Fleet, machines: usize) -> Result<Vec<Marker>> {
    let mut kept: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for at in 0..machines {
        for line in fleet.agent_log(at).lines().filter(|line| line.contains("kept a marker")) {
            let field = |name: &str| {
                let found =
                    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
                found.with_context(|| format!("no {name} in {line}"))
            };
            let thawed_us: f64 = field("thawed_at_us")?.parse()?;
            let frozen_us: f64 = field("frozen_us")?.parse()?;
            kept.entry(field("marker")?.to_owned()).or_default().push((thawed_us - frozen_us, thawed_us));
        }
    }
    let mut complete: Vec<(f64, Marker)> = (kept.into_values())
        .filter(|members| members.len() == machines)
        .map(|members| {
            let first = members.iter().map(|m| m.0).fold(f64::MAX, f64::min);
            let last = members.iter().map(|m| m.1).fold(0.0, f64::max);
            let frozen_us = members.iter().map(|m| m.1 - m.0).collect();
            (first, Marker { spread_us: last - first, frozen_us })
        })
        .collect();
    complete.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(complete.into_iter().map(|(_, marker)| marker).collect())
}
