//! Disks that change under the agent: away and back, grown, and the one that holds the agent's own state.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Site, SiteOptions, command, compare::size_bytes,
};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
const SENT: &str = "highwater_agent_sent_bytes_total";
const RESYNCS: &str = "highwater_agent_resynchronizations_total";

fn write(device: &Path, at: u64, byte: u8) -> Result<()> {
    let file = File::options().write(true).open(device)?;
    file.write_all_at(&vec![byte; MIB as usize], at)?;
    Ok(file.sync_all()?)
}

/// The disk with the agent's own state and its copied log: what the agent writes because of a point does not make the next
/// one larger.
#[test]
fn the_agents_own_disk_does_not_feed_back() -> Result<()> {
    let arena = Arena::enter("own")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let options = SiteOptions {
        point_interval: "1s".into(),
        state_dir: Some(data.path().join("state")),
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    site.start_agent()?;
    site.protect(disk.path(), "own")?;
    site.wait_replicated()?;
    site.point()?;
    let mut sent = vec![];
    let (mut before, mut points) = (site.metric(SENT)?, site.points()?.len());
    let until = Instant::now() + Duration::from_secs(60);
    while sent.len() < 16 {
        ensure!(Instant::now() < until, "only {} points", sent.len());
        thread::sleep(Duration::from_millis(100));
        // As a log service would: what the agent says, synced onto the disk that it replicates.
        fs::write(data.path().join("agent.log"), site.agent_log())?;
        let now = site.points()?.len();
        if now > points {
            File::open(data.path().join("agent.log"))?.sync_all()?;
            let total = site.metric(SENT)?;
            sent.push((total - before) / (now - points) as f64);
            (before, points) = (total, now);
        }
    }
    println!("bytes sent per point: {sent:?}");
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (early, late) = (mean(&sent[..8]), mean(&sent[8..]));
    ensure!(sent.iter().all(|bytes| *bytes < 512e3), "a point of a resting disk is large: {sent:?}");
    // The log itself grows; the points must not grow faster than it.
    ensure!(late < early * 2.0 + 64e3, "the points grow: {sent:?}");
    let last = site.point()?;
    site.assert_exact(last)?;
    site.stop_agent()
}

#[test]
fn a_device_vanishes_and_returns() -> Result<()> {
    let arena = Arena::enter("vanish")?;
    let disk = LoopDisk::new(Backing::File, 64 * MIB)?;
    write(disk.path(), 0, 1)?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    for expected in ["HW-1468", "HW-1460", "HW-1463", "cannot be opened", "no recovery point this time"] {
        site.allow(expected);
    }
    site.start_agent()?;
    site.protect(disk.path(), "raw")?;
    site.wait_replicated()?;
    site.point()?;
    let device = disk.path().to_string_lossy().into_owned();
    command::run("losetup", &["--detach", &device])?;
    site.wait_state("raw", "error", Duration::from_secs(15))?;
    ensure!(site.point_within(Duration::ZERO).is_err(), "a point was made without its disk");
    // Changed where no tracker sees it.
    File::options().write(true).open(disk.image())?.write_all_at(&[9; 8192], 40 * MIB)?;
    File::open(disk.image())?.sync_all()?;
    command::run("losetup", &["--direct-io=on", &device, &disk.image().to_string_lossy()])
        .or_else(|_| command::run("losetup", &[&*device, &*disk.image().to_string_lossy()]))?;
    site.wait_state("raw", "bitmap", Duration::from_secs(20))?;
    let point = site.point()?;
    site.assert_exact(point)?;
    ensure!(site.metric(RESYNCS)? == 1.0, "it was not compared");
    site.stop_agent()
}

#[test]
fn a_device_grows() -> Result<()> {
    let arena = Arena::enter("grow")?;
    let disk = LoopDisk::new(Backing::File, 64 * MIB)?;
    write(disk.path(), 0, 1)?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    for expected in ["HW-1460", "its size changed", "no recovery point this time"] {
        site.allow(expected);
    }
    site.start_agent()?;
    site.protect(disk.path(), "raw")?;
    site.wait_replicated()?;
    let small = site.point()?;
    File::options().write(true).open(disk.image())?.set_len(80 * MIB)?;
    command::run("losetup", &["--set-capacity", &disk.path().to_string_lossy()])?;
    write(disk.path(), 79 * MIB, 7)?;
    site.wait_until("the new size is noticed", Duration::from_secs(15), |site| {
        let disk = site.disk_status("raw")?;
        Ok(disk["size-bytes"] == 80 * MIB && disk["state"] == "bitmap")
    })?;
    let point = site.point()?;
    site.assert_exact(point)?;
    let size = size_bytes(&site.recover(point)?.image("raw"))?;
    ensure!(size == 80 * MIB, "the recovered disk has {size} bytes");
    let size = size_bytes(&site.recover(small)?.image("raw")).context("the smaller point")?;
    ensure!(size == 64 * MIB, "the point before has {size} bytes now");
    site.stop_agent()
}
