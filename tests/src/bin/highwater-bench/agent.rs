//! The installation under measurement: what it logs of its freezes, and the memory of its daemons.

use std::fs;

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Daemon, Site, SiteOptions};

use crate::results::Series;

/// Collector and agent, the agent telling where its freezes' time goes.
pub fn install(arena: &Arena) -> Result<Site> {
    // Its records lie on a tmpfs, as in real life.
    let run = std::path::PathBuf::from("/dev/shm").join(format!("hwtest-run-{}", std::process::id()));
    fs::create_dir_all(&run)?;
    std::os::unix::fs::symlink(&run, arena.dir().join("run"))?;
    let options = SiteOptions {
        copy_frozen: false,
        // The configuration ends with this table, so another can follow it.
        tracking: vec!["[log]".into(), "level = \"debug\"".into()],
        ..SiteOptions::default()
    };
    let mut site = Site::new(arena, &options)?;
    site.allow("no recovery point this time");
    site.start_agent()?;
    Ok(site)
}

/// The run directory goes with this.
pub struct RunDir;

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(format!("/dev/shm/hwtest-run-{}", std::process::id()));
    }
}

/// What the agent logged of its freezes and epochs since a place in its log, in milliseconds.
#[derive(Default)]
pub struct Timings {
    /// From the first freeze to the last thaw.
    pub freeze: Series,
    /// The kernel's own part of it: `FIFREEZE`.
    pub enter: Series,
    /// The rest.
    pub beyond: Series,
    /// Ending an epoch, frozen or not.
    pub epoch: Series,
}

/// All that the agent has logged.
pub fn log(arena: &Arena) -> String {
    fs::read_to_string(arena.dir().join("agent.log")).unwrap_or_default()
}

/// Reads them.
pub fn timings(arena: &Arena, log_from: usize) -> Timings {
    let log = log(arena);
    let mut timings = Timings::default();
    for line in log.get(log_from..).unwrap_or_default().lines() {
        let of = |name: &str| {
            let rest = line.split_once(&format!(" {name}="))?.1;
            rest.split_whitespace().next()?.parse::<f64>().ok().map(|us| us / 1e3)
        };
        if let (Some(total), Some(enter)) = (of("total_us"), of("enter_us")) {
            timings.freeze.push(total);
            timings.enter.push(enter);
            timings.beyond.push(total - enter);
        } else if let (Some(total), Some(_)) = (of("total_us"), of("replaced_us")) {
            timings.epoch.push(total);
        }
    }
    timings
}

/// Most and present resident memory of a daemon, MiB.
pub fn memory_mib(daemon: Option<&Daemon>) -> Result<[f64; 2]> {
    let pid = daemon.and_then(Daemon::pid).context("the daemon does not run")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no memory in status")?;
        let kib = line.trim().trim_end_matches(" kB").trim().parse::<f64>()?;
        ensure!(kib > 0.0, "{name} {line}");
        Ok(kib / 1024.0)
    };
    Ok([of("VmHWM:")?, of("VmRSS:")?])
}
