//! A point is made of what was held still, or not at all: a filesystem that is mounted while a round goes on, and writers
//! that reach the device beneath a frozen filesystem.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Random, Site, SiteOptions,
    buffer::{Aligned, open_direct},
    raw::{hidden, write_blocks},
};
use nix::sys::signal::Signal;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
const SENT: &str = "highwater_agent_sent_bytes_total";

fn write_file(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let mut content = vec![0; usize::try_from(bytes)?];
    Random::new(seed).fill(&mut content);
    let mut file = File::create(path)?;
    file.write_all(&content)?;
    Ok(file.sync_all()?)
}

/// Writes all the time, past the page cache: only a freeze holds it up.
fn write_on(path: &Path, stop: &AtomicBool) -> Result<u64> {
    write_file(path, MIB, 0)?;
    let file = open_direct(path, true)?;
    let mut block = Aligned::zeroed(4096);
    let mut written = 0;
    while !stop.load(Ordering::Acquire) {
        block.fill(written as u8);
        file.write_all_at(&block, written % 256 * 4096)?;
        written += 1;
        // Enough to be caught in the act, and not so much that no round would end.
        thread::sleep(Duration::from_micros(500));
    }
    Ok(written)
}

/// The round is long by the bandwidth; the filesystem that appears within it is written to without a pause, so that no attempt
/// succeeds unless it is frozen.
#[test]
fn a_filesystem_mounted_while_a_round_goes_on_is_frozen_too() -> Result<()> {
    let arena = Arena::enter("mounted")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    FileSystem::Ext4.make(disk.path())?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    // Mounted for this alone: it is not there when the round begins.
    let data = Mounted::existing(FileSystem::Ext4, disk.path(), "")?;
    write_file(&data.path().join("round"), 10 * MIB, 1)?;
    drop(data);
    site.agent_command(&["bandwidth", "4MiB"])?;
    let (sent, stop) = (site.metric(SENT)?, AtomicBool::new(false));
    let (point, written) = thread::scope(|scope| {
        let point = scope.spawn(|| site.point_within(Duration::ZERO));
        site.wait_until("a round goes on", Duration::from_secs(20), |s| Ok(s.metric(SENT)? > sent + 1e5))?;
        let data = Mounted::existing(FileSystem::Ext4, disk.path(), "")?;
        let path = data.path().join("written");
        let stop = &stop;
        let writer = scope.spawn(move || write_on(&path, stop));
        let still = !point.is_finished();
        let point = point.join().map_err(|_| anyhow::anyhow!("panicked"));
        stop.store(true, Ordering::Release);
        let written = writer.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        ensure!(still, "the round was over before the filesystem was mounted");
        drop(data);
        anyhow::Ok((point??, written))
    })?;
    ensure!(written > 100, "only {written} writes");
    site.assert_exact(point)?;
    site.verify()?;
    site.stop_agent()
}

/// Sectors read from a device so far.
fn sectors_read(device: &Path) -> Result<u64> {
    let name = device.file_name().context("a device's name")?;
    let stat = fs::read_to_string(Path::new("/sys/class/block").join(name).join("stat"))?;
    Ok(stat.split_ascii_whitespace().nth(2).context("no reads")?.parse()?)
}

/// A mounted filesystem with more changed than can be read in a moment, which is all read under the freeze.
fn changed(arena: &Arena) -> Result<(LoopDisk, Mounted, Site)> {
    let disk = LoopDisk::new(Backing::File, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let more = ["memory = \"1GiB\"", "freeze-budget = \"512MiB\"", "readers = 1"];
    let options = SiteOptions { replication: more.map(String::from).to_vec(), ..SiteOptions::default() };
    let mut site = Site::new(arena, &options)?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    site.point()?;
    write_file(&data.path().join("changed"), 48 * MIB, 2)?;
    Ok((disk, data, site))
}

/// Asks for a point, and does something to the device while the agent reads it under the freeze: the agent is stopped for it,
/// so that it is neither before the freeze nor after its end.
fn within_the_freeze(site: &Site, device: &Path, what: impl FnOnce() -> Result<()>) -> Result<Result<u64>> {
    let agent = site.agent.as_ref().context("no agent")?;
    let before = sectors_read(device)?;
    thread::scope(|scope| {
        let point = scope.spawn(|| site.point_within(Duration::ZERO));
        let until = Instant::now() + Duration::from_secs(20);
        while sectors_read(device)? < before + 4 * 2048 {
            ensure!(Instant::now() < until, "nothing is read");
        }
        agent.signal(Signal::SIGSTOP)?;
        let done = what();
        let read = sectors_read(device)? - before;
        agent.signal(Signal::SIGCONT)?;
        done?;
        let point = point.join().map_err(|_| anyhow::anyhow!("panicked"))?;
        // Else the test does not test what it says.
        ensure!(read < 44 * 2048, "all was read already: {read} sectors");
        Ok(point)
    })
}

/// Far from what the filesystem has written.
const BLOCK: u64 = 95 * 256;

#[test]
fn a_raw_writer_under_a_frozen_filesystem_costs_another_attempt() -> Result<()> {
    let arena = Arena::enter("under")?;
    let (disk, _data, mut site) = changed(&arena)?;
    let point = within_the_freeze(&site, disk.path(), || write_blocks(disk.path(), BLOCK, 2, 0xA1))??;
    site.assert_exact(point)?;
    let image = File::open(site.recover(point)?.image("data"))?;
    let mut block = [0; 4096];
    image.read_exact_at(&mut block, BLOCK * 4096)?;
    ensure!(block.iter().all(|b| *b == 0xA1), "the point lacks what was written: {:#x}", block[0]);
    site.stop_agent()
}

/// The tracker is shown nothing of it: the kernel's count alone tells, before the thaw, and there is no point of it.
#[test]
fn a_writer_that_no_program_sees_makes_the_attempt_fail() -> Result<()> {
    let arena = Arena::enter("slipped")?;
    let (disk, _data, mut site) = changed(&arena)?;
    site.allow("HW-1460");
    site.allow("no recovery point this time");
    let points = site.points()?.len();
    let attempt = within_the_freeze(&site, disk.path(), || {
        hidden(&arena, disk.path(), || write_blocks(disk.path(), BLOCK, 2, 0xA2))
    })?;
    let told = format!("{attempt:?}");
    ensure!(attempt.is_err() && told.contains("HW-1460"), "the attempt did not fail: {told}");
    ensure!(site.points()?.len() == points, "a point was made");
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    site.stop_agent()
}
