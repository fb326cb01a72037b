//! Write-ordered replication: every point is a state that a crash could have left, whatever is written; and at a freeze the
//! replica is the device, byte for byte.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, Chains, Churn, FileSystem, Fio, FioKind, HotPages, LoopDisk, Mounted, Plan, Site,
    SiteOptions, Zram, command, compare::copy_device, free_space::only_free_differs,
};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

/// Waits until so many points are in the vault.
fn wait_points(site: &Site, count: usize) -> Result<Vec<u64>> {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        let points = site.points()?;
        if points.len() >= count {
            return Ok(points.into_iter().map(|(point, _)| point).collect());
        }
        ensure!(Instant::now() < until, "only {} points of {count}: {:#}", points.len(), site.status()?);
        thread::sleep(Duration::from_millis(200));
    }
}

/// How often write-ordered mode was left for want of something. On a machine with other work that can happen.
fn lost(status: &serde_json::Value) -> Result<u64> {
    let left = status["capture"]["left"].as_object().context("left")?;
    Ok(left.iter().filter(|(kind, _)| *kind != "disks-changed").filter_map(|(_, times)| times.as_u64()).sum())
}

/// Chains of writes over these disks, protected from the first write on: every point is a state that a crash could have left.
fn chains(arena: &Arena, disks: &[&Path], plan: Plan) -> Result<()> {
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered("1s") };
    let mut site = Site::new(arena, &options)?;
    site.allow("write-ordered mode is left");
    site.allow("no recovery point this time");
    site.start_agent()?;
    let chains = Chains::start(Plan { disks: disks.iter().map(|d| d.to_path_buf()).collect(), ..plan })?;
    let names: Vec<String> = (0..disks.len()).map(|at| format!("disk{at}")).collect();
    for (disk, name) in disks.iter().zip(&names) {
        site.protect(disk, name)?;
    }
    site.wait_ordered()?;
    let first = wait_points(&site, 1)?.len();
    let points = wait_points(&site, first + 6)?;
    let history = chains.stop()?;
    ensure!(history.writes() > 500, "only {} writes", history.writes());
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (checked, last) = history.check_points(&site, &names)?;
    ensure!(checked >= 6, "only {checked} of {} points have all disks", points.len());
    println!("{} writes, {checked} points, the last with {last}", history.writes());
    let status = site.status()?;
    println!("{:#}", status["capture"]);
    ensure!(lost(&status)? <= 2, "write-ordered mode is lost again and again: {status:#}");
    site.verify()?;
    site.stop_agent()
}

#[test]
fn chains_on_a_raw_disk() -> Result<()> {
    let arena = Arena::enter("raw")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    chains(
        &arena,
        &[disk.path()],
        Plan {
            pause: Duration::from_micros(std::env::var("PAUSE_US").map_or(500, |t| t.parse().unwrap())),
            ..Plan::default()
        },
    )
}

#[test]
fn chains_over_two_disks() -> Result<()> {
    let arena = Arena::enter("two")?;
    let (a, b) = (LoopDisk::new(Backing::Tmpfs, 64 * MIB)?, LoopDisk::new(Backing::File, 64 * MIB)?);
    chains(
        &arena,
        &[a.path(), b.path()],
        Plan { whole_blocks: true, pause: Duration::from_micros(500), ..Plan::default() },
    )
}

#[test]
fn chains_on_a_bio_based_disk() -> Result<()> {
    let arena = Arena::enter("zram")?;
    let disk = Zram::new(64 * MIB)?;
    chains(
        &arena,
        &[disk.path()],
        Plan { whole_blocks: true, pause: Duration::from_micros(500), ..Plan::default() },
    )
}

/// A mounted filesystem under every load at once: at each freeze the replica is the device; each point in between is clean.
fn file_system(arena: &Arena, device: &Path, kind: FileSystem) -> Result<()> {
    let mounted = Mounted::make(kind, device)?;
    let mut site = Site::new(arena, &SiteOptions::ordered("1s"))?;
    site.allow("write-ordered mode is left");
    site.allow("no recovery point this time");
    site.start_agent()?;
    let loads = [FioKind::Direct, FioKind::Buffered, FioKind::Mmap];
    let running: Vec<_> = (loads.iter().enumerate())
        .map(|(i, how)| {
            Fio::new(&mounted.path().join(format!("fio{i}")), *how, 16 * MIB)
                .runtime_s(15)
                .rate_bytes_per_s(8 * MIB)
                .seed(i as u64)
                .start()
        })
        .collect::<Result<_>>()?;
    let files = Churn::start(mounted.path(), 7)?;
    let hot = HotPages::start(mounted.path())?;
    site.protect(device, "data")?;
    site.wait_ordered()?;
    let mut frozen = vec![];
    for _ in 0..4 {
        frozen.push(site.point()?);
        thread::sleep(Duration::from_millis(1300));
    }
    files.stop()?;
    let rewritten = hot.stop()?;
    for fio in running {
        fio.wait()?;
    }
    frozen.push(site.point()?);
    for point in &frozen {
        let free = site.assert_exact_in_use(*point, kind)?;
        println!("point {point}: {free} blocks of free space differ; {rewritten} writes to hot pages");
    }
    // Kernels before 6.7 mount no copy of a btrfs that is mounted.
    drop(mounted);
    let points = site.points()?;
    ensure!(points.len() >= frozen.len() + 3, "only {} points", points.len());
    for (point, _) in &points {
        let recovered = site.recover(*point)?;
        let image = recovered.image("data");
        let disk = LoopDisk::new(Backing::Tmpfs, std::fs::metadata(&image)?.len())?;
        std::fs::copy(&image, disk.path())?;
        std::fs::File::open(disk.path())?.sync_all()?;
        kind.replay_and_check(disk.path()).with_context(|| format!("point {point}"))?;
    }
    let status = site.status()?;
    println!("{:#}", status["capture"]);
    ensure!(lost(&status)? <= 2, "write-ordered mode is lost again and again: {status:#}");
    site.stop_agent()
}

#[test]
fn ext4_under_load() -> Result<()> {
    let arena = Arena::enter("ext4")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 192 * MIB)?;
    file_system(&arena, disk.path(), FileSystem::Ext4)
}

#[test]
fn xfs_under_load() -> Result<()> {
    let arena = Arena::enter("xfs")?;
    let disk = LoopDisk::new(Backing::Tmpfs, FileSystem::Xfs.size_bytes_min().max(192 * MIB))?;
    file_system(&arena, disk.path(), FileSystem::Xfs)
}

#[test]
fn btrfs_under_load() -> Result<()> {
    let arena = Arena::enter("btrfs")?;
    let disk = LoopDisk::new(Backing::Tmpfs, FileSystem::Btrfs.size_bytes_min().max(256 * MIB))?;
    file_system(&arena, disk.path(), FileSystem::Btrfs)
}

/// What the comparison lets pass, and what not: of allocated blocks that no file reads, and of a file's.
#[test]
fn only_what_nobody_reads_may_differ_on_xfs() -> Result<()> {
    let _arena = Arena::enter("xfs-unread")?;
    let disk = LoopDisk::new(Backing::Tmpfs, FileSystem::Xfs.size_bytes_min())?;
    let mounted = Mounted::make(FileSystem::Xfs, disk.path())?;
    let (written, reserved) = (mounted.path().join("written"), mounted.path().join("reserved"));
    std::fs::write(&written, vec![1; 64 << 10])?;
    command::run("fallocate", &["-l", "64K", &reserved.to_string_lossy()])?;
    command::run("sync", &["-f", &written.to_string_lossy()])?;
    let block_of = |path: &Path| -> Result<u64> {
        let told = command::run("filefrag", &["-v", "-b4096", &path.to_string_lossy()])?;
        let line = told.lines().find(|line| line.trim_start().starts_with("0:")).context("no extent")?;
        Ok(line
            .split(':')
            .nth(2)
            .and_then(|range| range.split("..").next())
            .context("no place")?
            .trim()
            .parse()?)
    };
    let (written, reserved) = (block_of(&written)?, block_of(&reserved)?);
    drop(mounted);
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let (frozen, recovered) = (dir.path().join("frozen"), dir.path().join("recovered"));
    copy_device(disk.path(), &frozen)?;
    for (block, passes) in [(reserved, true), (written, false), (0, false)] {
        copy_device(disk.path(), &recovered)?;
        // In block 0 behind the superblock's first fields.
        File::options().write(true).open(&recovered)?.write_all_at(&[7; 16], block * 4096 + 2048)?;
        let judged = only_free_differs(FileSystem::Xfs, &frozen, &recovered, &[block]);
        ensure!(judged.is_ok() == passes, "block {block}: {judged:?}");
    }
    Ok(())
}
