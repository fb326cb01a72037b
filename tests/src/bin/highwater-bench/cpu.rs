//! Processor time, in user space and in the kernel, seconds; as fine as the kernel tells it (10 ms).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const TICKS_PER_SECOND: f64 = 100.0;

/// Of the process or thread that this directory of /proc tells of.
pub fn of(proc: &Path) -> Result<f64> {
    let stat = fs::read_to_string(proc.join("stat"))?;
    // The name, in brackets, may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks: Vec<f64> = fields.split_whitespace().skip(11).take(2).filter_map(|f| f.parse().ok()).collect();
    ensure!(ticks.len() == 2, "no times in stat");
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_SECOND)
}

/// Of a process's threads of these names, as long as they live.
pub fn threads(proc: &Path, names: &[&str]) -> Result<f64> {
    let mut sum = 0.0;
    for thread in fs::read_dir(proc.join("task"))? {
        let thread = thread?.path();
        // One that has just ended is none of them.
        let Ok(name) = fs::read_to_string(thread.join("comm")) else { continue };
        if names.contains(&name.trim_end()) {
            sum += of(&thread)?;
        }
    }
    Ok(sum)
}
