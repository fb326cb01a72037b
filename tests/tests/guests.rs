//! A guest protected from its host, with nothing of ours in it: its disk is a block device here, and QEMU's guest agent freezes its file
//! systems for the points.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, LoopDisk, Site, SiteOptions, command, metric, scrape,
    vm::{WritingOptions, WritingVm, files_in},
};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const DISK_BYTES: u64 = 192 << 20;
/// For what a guest, emulated, does in a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest that writes, on a disk that is replicated.
struct Stand {
    site: Site,
    vm: WritingVm,
    disk: LoopDisk,
}

impl Stand {
    fn new(arena: &Arena, options: SiteOptions, vm: &WritingOptions, guest: &[&str]) -> Result<Self> {
        let ordered = options.capture.iter().any(|line| line.starts_with("point-interval"));
        let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES)?;
        let vm = WritingVm::boot(arena.dir(), disk.path(), vm)?;
        let mut site = Site::new(arena, &options)?;
        // With no socket and no disk: they are found.
        let lines = ["", "[[guest]]", "name = \"hwtest-guest\""].iter().chain(guest);
        let config =
            fs::read_to_string(site.agent_config())? + &lines.copied().collect::<Vec<_>>().join("\n");
        fs::write(site.agent_config(), config)?;
        site.start_agent()?;
        site.protect(disk.path(), "guest")?;
        if ordered {
            site.wait_ordered()?
        } else {
            site.wait_replicated()?
        }
        Ok(Self { site, vm, disk })
    }

    /// Makes a point; answers it, how consistent it is, and how many files were safe before it was asked for.
    fn point(&self) -> Result<(u64, String, u64)> {
        self.vm.wait_more(3, PATIENCE)?;
        let safe = self.vm.safe()?;
        let point = self.site.point()?;
        let points = self.site.operator(&["points", &self.site.machine()?, "--json"])?;
        let points: Value = serde_json::from_str(&points)?;
        let all = points["points"].as_array().context("no points")?;
        let told = all.iter().find(|p| p["point"] == point).context("it is not listed")?;
        Ok((point, told["consistency"].as_str().context("no consistency")?.to_owned(), safe))
    }

    /// A point whose file system is clean without any recovery, and has all that was safe.
    fn clean_point(&self, consistency: &str) -> Result<u64> {
        let (point, told, safe) = self.point()?;
        ensure!(told == consistency, "it is {told}: {}", self.site.agent_log());
        let recovered = self.site.recover(point)?;
        let image = recovered.image("guest");
        let features = command::run("dumpe2fs", &["-h", &image.to_string_lossy()])?;
        ensure!(
            !features.contains("needs_recovery"),
            "its journal is not empty: it was not frozen\n{features}"
        );
        command::run("fsck.ext4", &["-f", "-n", &image.to_string_lossy()])?;
        let found = files_of(&image, "ro,noload")?;
        ensure!(found >= safe, "point {point} has {found} files of {safe} that were safe");
        Ok(point)
    }
}

/// How many of the writer's files an image has.
fn files_of(image: &Path, options: &str) -> Result<u64> {
    let at = tempfile::Builder::new().prefix("hwtest-look-").tempdir_in("/dev/shm")?;
    let place = at.path().to_string_lossy().into_owned();
    let options = format!("loop,{options}");
    command::run("mount", &["-t", "ext4", "-o", &options, &image.to_string_lossy(), &place])?;
    let found = files_in(at.path());
    command::run("umount", &[&place])?;
    found
}

#[test]
fn a_guest_is_frozen_through_its_agent() -> Result<()> {
    let arena = Arena::enter("guests")?;
    let stand = Stand::new(&arena, SiteOptions::default(), &WritingOptions::default(), &[])?;
    let found: Value = serde_json::from_str(&stand.site.agent_command(&["discover", "--json"])?)?;
    let guests = found["guests"].as_array().context("no guests")?;
    let guest = guests.iter().find(|g| g["name"] == "hwtest-guest").context("it is not found")?;
    ensure!(guest["pid"] == stand.vm.pid().context("it runs")?, "{guest:#}");
    let disk = &guest["disks"][0];
    ensure!(
        disk["source"] == stand.disk.path().to_string_lossy().as_ref() && disk["protectable"] == true,
        "{guest:#}"
    );
    for _ in 0..3 {
        let point = stand.clean_point("filesystem")?;
        // What was copied while it was frozen.
        stand.site.assert_exact(point)?;
        stand.vm.wait_more(1, PATIENCE)?;
    }
    let told = &stand.site.status()?["guests"][0];
    ensure!(told["name"] == "hwtest-guest" && told["frozen-at-ms"].is_u64(), "{told:#}");
    ensure!(told["trouble"].is_null(), "{told:#}");
    let metrics = scrape(stand.site.agent_metrics())?;
    let still = "highwater_agent_guest_freezes_total{guest=\"hwtest-guest\",result=\"still\"}";
    ensure!(metric(&metrics, still).is_some_and(|count| count >= 3.0), "{metrics}");
    Ok(())
}

#[test]
fn a_guest_is_frozen_in_write_ordered_mode_and_through_the_hosts_cache() -> Result<()> {
    let arena = Arena::enter("guests-ordered")?;
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered("1s") };
    // Of itself, QEMU would not have it written out for minutes.
    let vm = WritingOptions { cache: "unsafe", ..WritingOptions::default() };
    let stand = Stand::new(&arena, options, &vm, &["application = true"])?;
    for _ in 0..3 {
        stand.clean_point("application")?;
    }
    Ok(())
}

/// What was safe before a crash-consistent point of the stream is in it, after the guest's file system has recovered.
fn next_crash_point(stand: &Stand) -> Result<()> {
    let (safe, before) = (stand.vm.safe()?, stand.site.points()?.len());
    let until = Instant::now() + PATIENCE;
    while stand.site.points()?.len() < before + 3 {
        ensure!(Instant::now() < until, "no points");
        thread::sleep(Duration::from_millis(100));
    }
    let newest = stand.site.points()?.iter().map(|point| point.0).max().context("no points")?;
    let recovered = stand.site.recover(newest)?;
    let found = files_of(&recovered.image("guest"), "rw")?;
    ensure!(found >= safe, "point {newest} has {found} files of {safe} that were safe");
    Ok(())
}

#[test]
fn a_guest_that_does_not_hear_costs_the_rank_and_nothing_else() -> Result<()> {
    let arena = Arena::enter("guests-deaf")?;
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered("1s") };
    let mut stand =
        Stand::new(&arena, options, &WritingOptions { deaf: true, ..WritingOptions::default() }, &[])?;
    stand.site.allow("HW-1445");
    let began = Instant::now();
    let (point, consistency, safe) = stand.point()?;
    ensure!(consistency == "crash", "{consistency}");
    ensure!(began.elapsed() < PATIENCE, "it took {:?}", began.elapsed());
    ensure!(stand.site.agent_log().contains("HW-1445"), "{}", stand.site.agent_log());
    let told = &stand.site.status()?["guests"][0]["trouble"];
    ensure!(told.as_str().is_some_and(|told| told.contains("HW-1445")), "{told:#}");
    let recovered = stand.site.recover(point)?;
    let found = files_of(&recovered.image("guest"), "rw")?;
    ensure!(found >= safe, "point {point} has {found} files of {safe} that were safe");
    stand.vm.wait_more(3, PATIENCE)?;
    next_crash_point(&stand)
}

/// A hook runs as long as this file is there.
struct Mark(PathBuf);

impl Drop for Mark {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

#[test]
fn with_the_agent_killed_the_guest_goes_on_within_a_second() -> Result<()> {
    let arena = Arena::enter("guests-killed")?;
    let mut stand = Stand::new(&arena, SiteOptions::default(), &WritingOptions::default(), &[])?;
    stand.clean_point("filesystem")?;
    // Called while all is frozen, and does not end by itself.
    let (mark, hook) = (Mark(arena.dir().join("frozen")), arena.dir().join("hook"));
    let hold = format!("touch {0}\nwhile [ -e {0} ]; do sleep 0.05; done", mark.0.display());
    fs::write(&hook, format!("#!/bin/sh\n[ $1 = frozen ] || exit 0\n{hold}\n"))?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let mut asked = stand.site.agent_command_started(&["point"])?;
    let until = Instant::now() + PATIENCE;
    while !mark.0.exists() {
        ensure!(Instant::now() < until, "it was never frozen: {}", stand.site.agent_log());
        thread::sleep(Duration::from_millis(2));
    }
    // A file may have been under way; then nothing.
    thread::sleep(Duration::from_millis(300));
    let before = stand.vm.safe()?;
    thread::sleep(Duration::from_secs(1));
    ensure!(stand.vm.safe()? == before, "the guest writes while it is frozen");
    stand.site.kill_agent()?;
    let took = stand.vm.wait_more(1, PATIENCE)?;
    println!("the guest's next file was safe {took:?} after the kill");
    ensure!(took < Duration::from_secs(1), "the guest went on only after {took:?}");
    asked.wait()?;
    drop(mark);
    stand.site.start_agent()?;
    stand.site.wait_replicated()?;
    fs::write(&hook, "#!/bin/sh\n")?;
    stand.clean_point("filesystem")?;
    Ok(())
}
