//! Writes hidden from the tracker on purpose: noticed, no point while in doubt, only the differences sent, then exact again.

use anyhow::{Context, Result, ensure};
use highwater_agent::tracker::object::{self, Object};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Random, Site, SiteOptions,
    raw::{hidden, kernel_number, write_blocks},
};
use nix::sys::signal::Signal;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

const MIB: u64 = 1 << 20;
/// Blocks written while tracking is off.
const HIDDEN: u64 = 5;
const DIFFERENT: &str = "highwater_agent_blocks_different_total";
const RESYNCS: &str = "highwater_agent_resynchronizations_total";

/// A raw disk with content, replicated, and a first point of it.
fn replicated(arena: &Arena, replication: &[&str]) -> Result<(LoopDisk, Site)> {
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let mut random = Random::new(4);
    let mut content = vec![0; 16 * MIB as usize];
    random.fill(&mut content);
    let mut file = File::options().write(true).open(disk.path())?;
    file.write_all(&content)?;
    file.sync_all()?;
    let replication = replication.iter().map(ToString::to_string).collect();
    let mut site = Site::new(arena, &SiteOptions { replication, ..SiteOptions::default() })?;
    site.start_agent()?;
    site.protect(disk.path(), "raw")?;
    site.wait_replicated()?;
    site.point()?;
    Ok((disk, site))
}

#[test]
fn a_hidden_write_makes_the_disk_suspect_and_only_differences_are_sent() -> Result<()> {
    let arena = Arena::enter("hidden")?;
    let (disk, mut site) = replicated(&arena, &[])?;
    site.allow("HW-1460");
    site.allow("no recovery point this time");
    site.allow("HW-1466");
    let points = site.points()?.len();
    let different = site.metric(DIFFERENT)?;
    hidden(&arena, disk.path(), || write_blocks(disk.path(), 100, HIDDEN, 0xA5))?;
    // In doubt from the end of the next epoch on: this attempt must not become a point.
    let attempt = site.point_within(Duration::ZERO);
    ensure!(site.metric("highwater_agent_tracking_faults_total")? >= 1.0, "nothing was noticed: {attempt:?}");
    ensure!(site.agent_log().contains("HW-1460"), "{}", site.agent_log());
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    ensure!(site.metric(RESYNCS)? == 1.0, "{} comparisons", site.metric(RESYNCS)?);
    let sent = site.metric(DIFFERENT)? - different;
    ensure!(sent == HIDDEN as f64, "{sent} blocks were sent, {HIDDEN} were different");
    // The attempt after the hidden write was answered by the point after the comparison, or refused.
    ensure!(site.points()?.len() <= points + 2);
    site.verify()?;
    site.stop_agent()
}

#[test]
fn with_manual_resynchronization_the_operator_decides_and_a_restart_does_not() -> Result<()> {
    let arena = Arena::enter("manual")?;
    let (disk, mut site) = replicated(&arena, &["resync = \"manual\""])?;
    site.allow("HW-1460");
    site.allow("no recovery point this time");
    let points = site.points()?.len();
    hidden(&arena, disk.path(), || write_blocks(disk.path(), 200, HIDDEN, 0x5A))?;
    ensure!(site.point_within(Duration::ZERO).is_err(), "a point was made of a disk in doubt");
    site.wait_state("raw", "suspect", Duration::from_secs(5))?;
    let reason = site.disk_status("raw")?["reason"].to_string();
    ensure!(reason.contains("did not see"), "{reason}");
    ensure!(site.point_within(Duration::from_secs(1)).is_err(), "a point was made of a disk in doubt");
    // Neither an orderly restart nor a kill makes it trusted.
    site.stop_agent()?;
    site.start_agent()?;
    site.wait_state("raw", "suspect", Duration::from_secs(5))?;
    site.kill_agent()?;
    site.start_agent()?;
    site.wait_state("raw", "suspect", Duration::from_secs(5))?;
    ensure!(site.point_within(Duration::from_secs(1)).is_err(), "a point was made of a disk in doubt");
    ensure!(site.points()?.len() == points);
    site.wait_until("connected", Duration::from_secs(10), |s| {
        Ok(s.status()?["collector"]["state"] == "connected")
    })?;
    site.agent_command(&["resync", "raw"])?;
    site.wait_replicated()?;
    ensure!(site.metric(DIFFERENT)? == HIDDEN as f64, "{} blocks were sent", site.metric(DIFFERENT)?);
    let point = site.point()?;
    site.assert_exact(point)?;
    site.stop_agent()
}

#[test]
fn tracking_switched_off_for_good_is_switched_on_again() -> Result<()> {
    let arena = Arena::enter("off")?;
    let (disk, mut site) = replicated(&arena, &[])?;
    site.allow("HW-1460");
    site.allow("no recovery point this time");
    Object::open(arena.bpf_dir())?.remove_target(kernel_number(disk.path())?)?;
    write_blocks(disk.path(), 300, HIDDEN, 0x11)?;
    site.point_within(Duration::ZERO).ok();
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    // What is written from now on is seen again.
    write_blocks(disk.path(), 4000, HIDDEN, 0x22)?;
    let point = site.point()?;
    site.assert_exact(point)?;
    ensure!(site.metric(RESYNCS)? == 1.0, "{} comparisons", site.metric(RESYNCS)?);
    site.stop_agent()
}

#[test]
fn pins_removed_while_no_agent_runs() -> Result<()> {
    let arena = Arena::enter("pins")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    fs::write(data.path().join("a"), vec![1; 8 * MIB as usize])?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let before = site.point()?;
    site.stop_agent()?;
    object::remove(arena.bpf_dir())?;
    fs::write(data.path().join("b"), vec![2; MIB as usize])?;
    File::open(data.path())?.sync_all()?;
    site.allow("HW-1460");
    site.start_agent()?;
    ensure!(site.metric(RESYNCS)? == 1.0, "no comparison was begun");
    // Killed within the comparison: it goes on, and stays a comparison.
    site.kill_agent()?;
    site.start_agent()?;
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    site.assert_exact(before)?;
    let different = site.metric(DIFFERENT)?;
    ensure!(different < 4096.0, "{different} blocks were sent as different");
    site.stop_agent()
}

/// While a disk is compared, its machine's other disks can be unprotected; what is stored of it stays its own.
#[test]
fn a_disk_that_leaves_during_a_comparison_changes_no_other() -> Result<()> {
    let arena = Arena::enter("leaves")?;
    let disks: Vec<LoopDisk> =
        (0..3).map(|_| LoopDisk::new(Backing::Tmpfs, 32 * MIB)).collect::<Result<_>>()?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    site.start_agent()?;
    for (at, disk) in disks.iter().enumerate() {
        write_blocks(disk.path(), 0, 4096, 0x11 * (at as u8 + 1))?;
        site.protect(disk.path(), &format!("disk{at}"))?;
    }
    site.wait_replicated()?;
    site.point()?;
    // The comparison is asked for while the collector cannot answer; the operators' requests come in between.
    site.signal_collector(Signal::SIGSTOP)?;
    site.agent_command(&["resync", "disk1"])?;
    std::thread::sleep(Duration::from_millis(500));
    let left = site.agent_command(&["unprotect", "disk0"]);
    site.signal_collector(Signal::SIGCONT)?;
    left?;
    for name in ["disk1", "disk2"] {
        site.wait_state(name, "bitmap", Duration::from_secs(60))?;
    }
    let point = site.point()?;
    let recovered = site.recover(point)?;
    for (name, byte) in [("disk1", 0x22), ("disk2", 0x33)] {
        let mut block = vec![0; 4096];
        let image = File::open(recovered.image(name))?;
        for at in 0..4096 {
            image.read_exact_at(&mut block, at * 4096)?;
            ensure!(block.iter().all(|b| *b == byte), "{name}, block {at}: {:#x}", block[0]);
        }
    }
    site.verify()?;
    site.stop_agent()
}

/// With the kernel's accounting switched off it cannot be seen whether the disk is at rest: no points, and the reason.
#[test]
fn without_the_kernels_counts_there_are_no_points() -> Result<()> {
    let arena = Arena::enter("iostats")?;
    let (disk, mut site) = replicated(&arena, &[])?;
    site.allow("no recovery point this time");
    let name = disk.path().file_name().context("a device's name")?.to_string_lossy().into_owned();
    let switch = Path::new("/sys/block").join(name).join("queue/iostats");
    fs::write(&switch, "0")?;
    write_blocks(disk.path(), 50, 3, 0x77)?;
    let refused = site.point_within(Duration::ZERO);
    fs::write(&switch, "1")?;
    ensure!(format!("{refused:?}").contains("HW-1488"), "{refused:?}");
    write_blocks(disk.path(), 60, 3, 0x78)?;
    let point = site.point()?;
    site.assert_exact(point)?;
    site.stop_agent()
}
