//! What these tests have in common.

use anyhow::{Context, Result};
use highwater_tests::{Arena, FileSystem, LoopDisk, Mounted, Random, Site, SiteOptions};
use std::fs;

pub const MIB: u64 = 1 << 20;
/// What a daemon may grow by under attack.
pub const GROWTH_MAX: u64 = 160 * MIB;

pub fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Resident bytes of a daemon.
pub fn resident(daemon: Option<&highwater_tests::Daemon>) -> Result<u64> {
    let pid = daemon.and_then(highwater_tests::Daemon::pid).context("the daemon does not run")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse::<u64>()? * 1024)
}

/// A protected filesystem, replicated, with one point.
pub fn site<'a>(
    arena: &'a Arena,
    disk: &LoopDisk,
    options: &SiteOptions,
) -> Result<(Site, Mounted, &'a Arena)> {
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = Site::new(arena, options)?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    write(&mounted, "first", 1)?;
    Ok((site, mounted, arena))
}

pub fn write(mounted: &Mounted, name: &str, seed: u64) -> Result<()> {
    let mut content = vec![0; MIB as usize];
    Random::new(seed).fill(&mut content);
    Ok(fs::write(mounted.path().join(name), content)?)
}
