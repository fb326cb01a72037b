//! The installation under measurement: what it logs of its freezes, and the memory of its daemons.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Daemon, Site, SiteOptions, command};

use crate::cpu;
use crate::results::Series;

/// Collector and agent, the agent telling where its freezes' time goes.
fn install(arena: &Arena, capture: Vec<String>) -> Result<Site> {
    // Its records lie on a tmpfs, as in real life.
    let run = run_dir();
    // What an installation before noted there of its vault is not true of this one.
    let _ = fs::remove_dir_all(&run);
    fs::create_dir_all(&run)?;
    std::os::unix::fs::symlink(&run, arena.dir().join("run"))?;
    let options = SiteOptions {
        copy_frozen: false,
        // The configuration ends with this table, so another can follow it.
        tracking: vec!["[log]".into(), "level = \"debug\"".into()],
        capture,
        ..SiteOptions::default()
    };
    let mut site = Site::new(arena, &options)?;
    site.allow("no recovery point this time");
    site.start_agent()?;
    Ok(site)
}

/// In bitmap mode. Sees that only one installation lies in the arena at a time.
pub fn fresh(arena: &Arena) -> Result<Site> {
    fresh_capturing(arena, SiteOptions::default().capture)
}

/// The same, with these lines for the agent's `[capture]`.
pub fn fresh_capturing(arena: &Arena, capture: Vec<String>) -> Result<Site> {
    for name in ["run", "vault", "collector", "state", "agent.toml", "agent.log", "collector.log"] {
        let path = arena.dir().join(name);
        let _ = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
    }
    install(arena, capture)
}

/// Ends it, and tracking with it.
pub fn dismiss(mut site: Site) -> Result<()> {
    site.stop_agent()?;
    // Not stopped in order: it waits for nothing.
    site.kill_collector()?;
    let _ = site.agent_command(&["detach", "--yes"]);
    Ok(())
}

fn run_dir() -> PathBuf {
    Path::new("/dev/shm").join(format!("hwtest-run-{}", std::process::id()))
}

/// The run directory goes with this.
pub struct RunDir;

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(run_dir());
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
        } else if let (Some(total), Some(_)) = (of("total_us"), of("turned_us")) {
            timings.epoch.push(total);
        }
    }
    timings
}

/// Waits until the agent has logged a text so many times.
pub fn wait_logged(arena: &Arena, text: &str, times: usize, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    while log(arena).matches(text).count() < times {
        ensure!(Instant::now() < until, "the agent has not logged `{text}` within {patience:?}");
        // Asking it for its status instead would cost it more than what is measured.
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Processor time that a daemon has used so far, in user space and in the kernel, seconds.
pub fn cpu_seconds(daemon: Option<&Daemon>) -> Result<f64> {
    cpu::of(&proc(daemon)?)
}

/// What its threads of these names have used of it.
pub fn cpu_seconds_of(daemon: Option<&Daemon>, threads: &[&str]) -> Result<f64> {
    cpu::threads(&proc(daemon)?, threads)
}

fn proc(daemon: Option<&Daemon>) -> Result<PathBuf> {
    Ok(PathBuf::from(format!("/proc/{}", pid(daemon)?)))
}

/// Holds all threads of a daemon on these processors.
pub fn pin(daemon: Option<&Daemon>, processors: &str) -> Result<()> {
    command::run("taskset", &["-acp", processors, &pid(daemon)?.to_string()])?;
    Ok(())
}

fn pid(daemon: Option<&Daemon>) -> Result<u32> {
    daemon.and_then(Daemon::pid).context("the daemon does not run")
}

/// Most and present resident memory of a daemon, MiB.
pub fn memory_mib(daemon: Option<&Daemon>) -> Result<[f64; 2]> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid(daemon)?))?;
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no memory in status")?;
        let kib = line.trim().trim_end_matches(" kB").trim().parse::<f64>()?;
        ensure!(kib > 0.0, "{name} {line}");
        Ok(kib / 1024.0)
    };
    Ok([of("VmHWM:")?, of("VmRSS:")?])
}
