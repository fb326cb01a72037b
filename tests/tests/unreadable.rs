//! Disks that cannot be read, wholly or in one block: the others go on, and the disk comes back by itself.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, LoopDisk, Site, SiteOptions,
    buffer::{Aligned, open_direct},
    compare_devices,
    raw::write_random,
};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const BLOCK: u64 = 4096;
const RESYNCS: &str = "highwater_agent_resynchronizations_total";

/// A disk whose end can be made unreadable: a loop device fails reads behind the end of its file.
struct Failing {
    disk: LoopDisk,
    lost: Vec<u8>,
}

impl Failing {
    fn new(seed: u64) -> Result<Self> {
        let failing = Self { disk: LoopDisk::new(Backing::File, SIZE)?, lost: vec![] };
        failing.write(0, SIZE, seed)?;
        Ok(failing)
    }

    fn path(&self) -> &Path {
        self.disk.path()
    }

    /// Random content, past the page cache.
    fn write(&self, at: u64, bytes: u64, seed: u64) -> Result<()> {
        write_random(self.path(), at, bytes, seed)
    }

    /// The last bytes can't be read any more. What they are is kept at the side.
    fn fail_last(&mut self, bytes: u64) -> Result<()> {
        let file = File::options().read(true).write(true).open(self.disk.image())?;
        file.sync_all()?;
        self.lost = vec![0; usize::try_from(bytes)?];
        file.read_exact_at(&mut self.lost, SIZE - bytes)?;
        file.set_len(SIZE - bytes)?;
        let mut block = Aligned::zeroed(BLOCK as usize);
        let read = open_direct(self.path(), false)?.read_exact_at(&mut block, SIZE - BLOCK);
        ensure!(read.is_err(), "this kernel's loop devices do not fail");
        Ok(())
    }

    /// It reads again, with its old content.
    fn heal(&mut self) -> Result<()> {
        let file = File::options().write(true).open(self.disk.image())?;
        file.write_all_at(&self.lost, SIZE - self.lost.len() as u64)?;
        Ok(file.sync_all()?)
    }
}

/// A point of which this disk is exactly as it is now; nothing writes to it.
fn point_with(site: &Site, disks: &[(&str, &Path)], without: &[&str]) -> Result<()> {
    let point = site.point()?;
    let recovered = site.recover(point)?;
    for (name, path) in disks {
        let differing = compare_devices(path, &recovered.image(name), &[])?;
        ensure!(differing.is_empty(), "point {point}: {} blocks of {name} differ", differing.len());
    }
    for name in without {
        ensure!(!recovered.image(name).exists(), "point {point} has disk {name}, which cannot be read");
    }
    Ok(())
}

fn raw_site(arena: &Arena) -> Result<Site> {
    let mut site = Site::new(arena, &SiteOptions { copy_frozen: false, ..SiteOptions::default() })?;
    site.allow("HW-1436");
    site.start_agent()?;
    Ok(site)
}

/// What `highwater points` says of a disk that an earlier point has.
fn left_out(site: &Site) -> Result<String> {
    let said: serde_json::Value =
        serde_json::from_str(&site.operator(&["points", &site.machine()?, "--json"])?)?;
    let last = said["points"].as_array().and_then(|points| points.last()).context("no points")?;
    Ok(last["disks-left-out"].to_string())
}

#[test]
fn one_disk_fails_and_the_other_goes_on() -> Result<()> {
    let arena = Arena::enter("fails")?;
    let (good, mut bad) = (Failing::new(1)?, Failing::new(2)?);
    let (good_path, bad_path) = (good.path().to_owned(), bad.path().to_owned());
    let (both, one) = ([("good", &*good_path), ("bad", &*bad_path)], [("good", &*good_path)]);
    let mut site = raw_site(&arena)?;
    site.protect(good.path(), "good")?;
    site.protect(bad.path(), "bad")?;
    site.wait_replicated()?;
    point_with(&site, &both, &[])?;
    // First a single block, then half of the disk.
    for (round, bytes) in [(1, BLOCK), (2, SIZE / 2)] {
        bad.write(SIZE - bytes, bytes.min(MIB), 10 + round)?;
        good.write(4 * MIB, MIB, 20 + round)?;
        bad.fail_last(bytes)?;
        point_with(&site, &one, &["bad"])?;
        let told = left_out(&site)?;
        ensure!(told.contains("\"bad\"") && told.contains("last-point"), "the operator is not told: {told}");
        let told = site.disk_status("bad")?;
        let reason = told["reason"].as_str().unwrap_or_default();
        ensure!(told["state"] == "error" && reason.contains("HW-1436"), "{told:#}");
        if bytes == BLOCK {
            ensure!(reason.contains(&format!("block {}", SIZE / BLOCK - 1)), "which block: {reason}");
        }
        let notes = site.status()?["notes"].to_string();
        ensure!(notes.contains("without it"), "{notes}");
        ensure!(site.metric("highwater_agent_errors_total")? >= 1.0);
        // Points go on while it fails, each as fast as ever.
        for seed in 0..3 {
            good.write(8 * MIB, MIB, 30 + 10 * round + seed)?;
            let began = Instant::now();
            point_with(&site, &one, &["bad"])?;
            ensure!(began.elapsed() < Duration::from_secs(5), "the good disk waits for the bad one");
        }
        // What is written meanwhile is not forgotten.
        bad.write(MIB, MIB, 40 + round)?;
        let connections = count(&site.agent_log(), "connected to the collector");
        bad.heal()?;
        site.wait_state("bad", "bitmap", Duration::from_secs(30))?;
        point_with(&site, &both, &[])?;
        ensure!(left_out(&site)? == "[]");
        ensure!(
            count(&site.agent_log(), "connected to the collector") == connections && connections == 1,
            "a read error cost the session"
        );
    }
    ensure!(site.metric(RESYNCS)? == 0.0, "it was compared");
    site.verify()?;
    site.stop_agent()
}

#[test]
fn a_disk_fails_in_its_first_copy() -> Result<()> {
    let arena = Arena::enter("fails-first")?;
    let (good, mut bad) = (Failing::new(1)?, Failing::new(2)?);
    let (good_path, bad_path) = (good.path().to_owned(), bad.path().to_owned());
    let mut site = raw_site(&arena)?;
    site.protect(good.path(), "good")?;
    site.wait_replicated()?;
    bad.fail_last(8 * MIB)?;
    site.protect(bad.path(), "bad")?;
    site.wait_state("bad", "error", Duration::from_secs(20))?;
    good.write(MIB, MIB, 5)?;
    point_with(&site, &[("good", &*good_path)], &["bad"])?;
    // It is what it was after a restart too.
    site.stop_agent()?;
    site.start_agent()?;
    site.wait_state("bad", "error", Duration::from_secs(20))?;
    good.write(MIB, MIB, 6)?;
    point_with(&site, &[("good", &*good_path)], &["bad"])?;
    bad.heal()?;
    site.wait_replicated()?;
    point_with(&site, &[("good", &*good_path), ("bad", &*bad_path)], &[])?;
    site.stop_agent()
}

fn count(log: &str, text: &str) -> usize {
    log.matches(text).count()
}

/// Nobody notices the agent: a device is detached at once, and the agent says that it is away.
#[test]
fn a_protected_device_is_not_held_open() -> Result<()> {
    let arena = Arena::enter("not-held")?;
    let disk = LoopDisk::new(Backing::File, 32 * MIB)?;
    fs::write(disk.path(), vec![3; MIB as usize])?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    site.allow("HW-1468");
    site.start_agent()?;
    site.protect(disk.path(), "raw")?;
    site.wait_replicated()?;
    site.point()?;
    let pid = site.agent.as_ref().and_then(highwater_tests::Daemon::pid).context("no agent")?;
    let (mut open, samples) = (0, 300);
    for _ in 0..samples {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            open += usize::from(fs::read_link(entry.path()).is_ok_and(|to| to == disk.path()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Looked at every two seconds, for a moment.
    ensure!(open <= samples / 50, "open in {open} of {samples} looks");
    let device = disk.path().to_string_lossy().into_owned();
    let name = disk.path().file_name().context("a name")?.to_string_lossy().into_owned();
    highwater_tests::command::run("losetup", &["--detach", &device])?;
    let bound = Path::new("/sys/block").join(name).join("loop/backing_file");
    let began = Instant::now();
    while bound.exists() {
        ensure!(began.elapsed() < Duration::from_millis(500), "somebody holds the device");
        std::thread::sleep(Duration::from_millis(5));
    }
    site.wait_state("raw", "error", Duration::from_secs(10))?;
    let reason = site.disk_status("raw")?["reason"].to_string();
    ensure!(reason.contains("not there"), "{reason}");
    site.stop_agent()
}
