//! The demo's steps.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use highwater_tests::{Arena, FileSystem, Mounted, Site, SiteOptions, command};
use serde_json::{Value, json};

use crate::disk::Disk;
use crate::files::{self, Files, checksums};
use crate::interrupt;
use crate::journal::{self, Journal};
use crate::report::{Report, rate_mb_per_s, size};
use crate::stage::Stage;
use crate::workload::{self, Workload};

const DISK_BYTES: u64 = 1 << 30;
const DISK_NAME: &str = "data";
const POINTS: usize = 4;
const BETWEEN_POINTS: Duration = Duration::from_millis(1500);
const BEFORE_DISASTER: Duration = Duration::from_millis(2500);
/// Between two points without a freeze.
const CRASH_INTERVAL: &str = "1s";
const CAPTURE_PATIENCE: Duration = Duration::from_secs(60);
const COPY_PATIENCE: Duration = Duration::from_secs(300);

/// A point, and what the disk held.
struct Taken {
    number: u64,
    files: Files,
    journal_synced: u64,
    journal_written: u64,
}

/// Runs the demo; answers its figures. An error if anything recovered differs from what it was.
pub fn run(quiet: bool) -> Result<Value> {
    let mut report = Report::new(quiet);
    report.line(
        "Highwater: a busy disk is protected, destroyed, and recovered. All of it happens on this machine.",
    );
    let arena = Arena::enter("demo")?;
    interrupt::begin();
    let mut stage = Stage::new(&arena);
    let told = tell(&arena, &mut stage, &mut report);
    if told.is_err() && !interrupt::interrupted() {
        eprint!("{}", stage.last_words());
    }
    drop(stage);
    // It looks whether anything is left, and fails loudly.
    drop(arena);
    told?;
    report.line("Nothing is left behind: no device, mount, process, eBPF program or file.");
    Ok(report.end())
}

fn tell(arena: &Arena, stage: &mut Stage, report: &mut Report) -> Result<()> {
    make_disk(stage, report)?;
    install(arena, stage, report)?;
    replicate(stage, report)?;
    capture(stage, report)?;
    let taken = take_points(stage, report)?;
    let (Some(latest), Some(older)) = (taken.last(), taken.get(1)) else { bail!("too few points") };
    let newest = disaster(stage, report)?;
    if let Some(newest) = newest {
        recover_newest(stage, report, newest)?;
    }
    recover(stage, report, latest, "latest")?;
    recover(stage, report, older, "older")?;
    report.end_step();
    report.line(
        "\nEvery file of both frozen points came back byte for byte, from a disk that no longer exists.",
    );
    Ok(())
}

fn make_disk(stage: &mut Stage, report: &mut Report) -> Result<()> {
    report.step("A disk that is in use");
    stage.disk = Some(Disk::make(stage.dir(), DISK_BYTES)?);
    let root = stage.disk()?.path().to_path_buf();
    workload::fill(&root)?;
    let used = stage.disk()?.used_bytes()?;
    stage.journal = Some(Journal::start(&root)?);
    stage.workload = Some(Workload::start(&root));
    let device = stage.disk()?.device()?.display().to_string();
    report.told(format!("{device}, {} with a mounted ext4, {} in use.", size(DISK_BYTES), size(used)));
    report.told("Three programs write to it from now on: documents are made, changed, renamed and");
    report.told("deleted; a database overwrites its pages; a journal is appended to without a pause.");
    report.figure("disk-bytes", DISK_BYTES);
    report.figure("disk-used-bytes", used);
    interrupt::check()
}

fn install(arena: &Arena, stage: &mut Stage, report: &mut Report) -> Result<()> {
    report.step("A collector with an empty vault, and an agent enrolled with it");
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered(CRASH_INTERVAL) };
    stage.site = Some(Site::new(arena, &options)?);
    interrupt::check()?;
    stage.site_mut()?.start_agent()?;
    report.told("$ highwater-collector init         made the vault, its key, a certificate authority");
    report.told(format!("$ highwater-collector run          listens on {}, TLS 1.3", stage.site()?.ingest()));
    report.told("$ highwater-agent enroll URL -       this machine has its certificate");
    report.told("$ highwater-agent run              its eBPF programs are in the kernel");
    interrupt::check()
}

fn replicate(stage: &mut Stage, report: &mut Report) -> Result<()> {
    report.step("Protection: the first copy, while the programs write on");
    let device = stage.disk()?.device()?.to_path_buf();
    let began = Instant::now();
    stage.site_mut()?.protect(&device, DISK_NAME)?;
    report.told(format!("$ highwater-agent protect {} --name {DISK_NAME}", device.display()));
    while !["bitmap", "write-ordered"].contains(&state(stage)?.as_str()) {
        interrupt::check()?;
        ensure!(
            began.elapsed() < COPY_PATIENCE,
            "the first copy takes too long: {:#}",
            stage.site()?.status()?
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let seconds = began.elapsed().as_secs_f64();
    let stored = tree_bytes(stage.site()?.vault())?;
    let rate = rate_mb_per_s(DISK_BYTES, seconds);
    report.told(format!(
        "{} copied in {seconds:.1} s: {rate:.0} MB/s of disk. Empty blocks are not sent,",
        size(DISK_BYTES)
    ));
    report.told(format!("the rest compressed and encrypted: {} in the vault.", size(stored)));
    report.figure("initial-seconds", seconds);
    report.figure("initial-mb-per-s", rate);
    report.figure("initial-stored-bytes", stored);
    interrupt::check()
}

/// From here on each write is captured, where the kernel lets it.
fn capture(stage: &Stage, report: &mut Report) -> Result<()> {
    let began = Instant::now();
    while state(stage)? != "write-ordered" {
        interrupt::check()?;
        let status = stage.site()?.status()?;
        if status["capture"]["unavailable"].is_string() || began.elapsed() > CAPTURE_PATIENCE {
            report.told(
                "This kernel lets no payload be captured: bitmap mode goes on, with points by freeze only.",
            );
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    report.told("Since then each write is captured in order, payload included, without a kernel module:");
    report.told(format!("a crash-consistent point every {CRASH_INTERVAL}, with nothing ever frozen for it."));
    Ok(())
}

fn state(stage: &Stage) -> Result<String> {
    Ok(stage.site()?.disk_status(DISK_NAME)?["state"].as_str().context("a disk has a state")?.to_owned())
}

fn take_points(stage: &Stage, report: &mut Report) -> Result<Vec<Taken>> {
    report.step("Recovery points, each of the whole disk at one instant");
    report.told("Documents and database rest a moment before each, so that the checksum of every file");
    report.told("can be noted for later; the journal does not, and is frozen in full flight.");
    report.line("");
    report.told("point    written since      stored      frozen    safe after       files");
    let mut taken = Vec::new();
    let mut figures = Vec::new();
    let mut sectors = written_sectors(stage)?;
    for _ in 0..POINTS {
        interrupt::sleep(BETWEEN_POINTS)?;
        stage.workload()?.pause()?;
        let files = checksums(stage.disk()?.path(), journal::NAME)?;
        let journal_synced = stage.journal()?.synced();
        let number = stage.site()?.point()?;
        let journal_written = stage.journal()?.written();
        stage.workload()?.resume();
        let now = written_sectors(stage)?;
        let written = (now - std::mem::replace(&mut sectors, now)) * 512;
        let points = stage.points()?;
        let point = points.iter().find(|p| p["point"] == number).context("the new point is not listed")?;
        let figure = |name: &str| point[name].as_u64().with_context(|| format!("a point without {name}"));
        let (taken_at_ms, stored_at_ms) = (figure("taken-at-ms")?, figure("stored-at-ms")?);
        let (freeze_us, stored) = (figure("freeze-us")?, figure("bytes-stored")?);
        let safe_ms = stored_at_ms.saturating_sub(taken_at_ms);
        report.told(format!(
            "{number:>5} {:>16} {:>11} {:>8.0} ms {safe_ms:>10} ms {:>11}",
            size(written),
            size(stored),
            freeze_us as f64 / 1e3,
            files.len(),
        ));
        figures.push(json!({
            "point": number, "written-bytes": written, "stored-bytes": stored, "freeze-ms": freeze_us as f64 / 1e3,
            "safe-after-ms": safe_ms, "files": files.len(), "files-bytes": files::bytes(&files),
        }));
        taken.push(Taken { number, files, journal_synced, journal_written });
    }
    report.figure("points", figures);
    Ok(taken)
}

/// A point that was made without a freeze.
struct Crash {
    number: u64,
    journal_synced: u64,
    journal_written: u64,
}

fn disaster(stage: &mut Stage, report: &mut Report) -> Result<Option<Crash>> {
    report.step("Disaster");
    interrupt::sleep(BEFORE_DISASTER)?;
    let points = stage.points()?;
    let newest = points.iter().max_by_key(|p| p["point"].as_u64()).context("there are no points")?;
    let figure = |name: &str| newest[name].as_u64().with_context(|| format!("a point without {name}"));
    let (number, taken_at_ms, crash) =
        (figure("point")?, figure("taken-at-ms")?, newest["consistency"] == "crash");
    let site = stage.site_mut()?;
    // Whatever the daemons say from now on is no wonder.
    site.allow("");
    let rpo_ms = now_ms().saturating_sub(taken_at_ms);
    stage.disk.as_mut().context("there is no disk")?.destroy()?;
    let (written, synced) = (stage.journal()?.written(), stage.journal()?.synced_by(taken_at_ms));
    stage.site_mut()?.kill_agent()?;
    stage.site_mut()?.kill_collector()?;
    stage.workload = None;
    stage.journal = None;
    report.told("While all three write: the disk's file is emptied and deleted, the filesystem torn away,");
    report
        .told("the device detached; agent and collector are killed with -9. The vault and its key are left.");
    report.told(format!(
        "RPO: the newest point, {number}, was {:.1} s old when the disk went.",
        rpo_ms as f64 / 1e3,
    ));
    report.figure("rpo-at-disaster-ms", rpo_ms);
    interrupt::check()?;
    Ok(crash.then_some(Crash { number, journal_synced: synced, journal_written: written }))
}

/// A point that no one froze for: what a power cut at its moment would have left.
fn recover_newest(stage: &Stage, report: &mut Report, point: Crash) -> Result<()> {
    report.step(&format!("Recovery of the newest point, {}, for which nothing was frozen", point.number));
    let (image, seconds) = recovered(stage, report, point.number)?;
    // The file system does what it does after a power cut: it replays its log.
    drop(Mounted::existing(FileSystem::Ext4, &image, "rw")?);
    command::run("e2fsck", &["-f", "-n", &image.to_string_lossy()])?;
    let mounted = Mounted::existing(FileSystem::Ext4, &image, "ro")?;
    let records = journal::records(mounted.path())?;
    ensure!(
        (point.journal_synced..=point.journal_written).contains(&records),
        "point {}: the journal ends at record {records}, not between {} and {}",
        point.number,
        point.journal_synced,
        point.journal_written
    );
    report.told("Mounted as after a power cut: its log is replayed; fsck: clean.");
    report.told(format!(
        "Journal: records 0 to {records} without a gap; synced by the point's time: {}.",
        point.journal_synced
    ));
    report.figure(
        "recover-newest",
        json!({ "point": point.number, "seconds": seconds, "journal-records": records }),
    );
    drop(mounted);
    remove(&image)
}

fn remove(image: &Path) -> Result<()> {
    fs::remove_dir_all(image.parent().context("it lies in a directory")?)?;
    interrupt::check()
}

/// Recovers a point; answers the image and how long it took.
fn recovered(stage: &Stage, report: &mut Report, number: u64) -> Result<(PathBuf, f64)> {
    let site = stage.site()?;
    ensure!(site.collector.is_none() && site.agent.is_none(), "a daemon runs");
    let to = stage.dir().join(format!("recovered-{number}"));
    let to_text = to.to_string_lossy().into_owned();
    let point = number.to_string();
    let began = Instant::now();
    site.operator(&["recover", &site.machine()?, "--point", &point, "--to", &to_text])?;
    let seconds = began.elapsed().as_secs_f64();
    interrupt::check()?;
    let rate = rate_mb_per_s(DISK_BYTES, seconds);
    report.told(format!(
        "$ highwater --vault DIR --key-file FILE recover MACHINE --point {number} --to ./recovered"
    ));
    report.told(format!(
        "{} in {seconds:.1} s: {rate:.0} MB/s of disk, every block's hash checked.",
        size(DISK_BYTES)
    ));
    Ok((to.join(format!("{DISK_NAME}.img")), seconds))
}

fn recover(stage: &Stage, report: &mut Report, point: &Taken, which: &str) -> Result<()> {
    report.step(&format!("Recovery of the {which} frozen point, {}, straight from the vault", point.number));
    let (image, seconds) = recovered(stage, report, point.number)?;
    check(&image, point, report)?;
    report.figure(
        &format!("recover-{which}"),
        json!({ "point": point.number, "seconds": seconds, "mb-per-s": rate_mb_per_s(DISK_BYTES, seconds) }),
    );
    remove(&image)
}

/// The proof: filesystem, files, journal.
fn check(image: &Path, point: &Taken, report: &Report) -> Result<()> {
    command::run("e2fsck", &["-f", "-n", &image.to_string_lossy()])?;
    let mounted = Mounted::existing(FileSystem::Ext4, image, "ro")?;
    let found = checksums(mounted.path(), journal::NAME)?;
    let differences = files::differences(&point.files, &found);
    ensure!(
        differences.is_empty(),
        "point {}: {} files are not what they were: {}",
        point.number,
        differences.len(),
        differences[..differences.len().min(5)].join(", ")
    );
    let records = journal::records(mounted.path())?;
    ensure!(
        (point.journal_synced..=point.journal_written).contains(&records),
        "point {}: the journal ends at record {records}, not between {} and {}",
        point.number,
        point.journal_synced,
        point.journal_written
    );
    report.told(format!(
        "fsck: clean. {} files, {}: all checksums equal to those noted at the point.",
        found.len(),
        size(files::bytes(&found))
    ));
    report.told(format!(
        "Journal: records 0 to {records} without a gap; synced before the point was asked for: {}.",
        point.journal_synced
    ));
    Ok(())
}

fn written_sectors(stage: &Stage) -> Result<u64> {
    let disk = stage.site()?.disk_status(DISK_NAME)?;
    disk["tracker"]["sectors-written"].as_u64().context("the agent counts no sectors")
}

fn tree_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { tree_bytes(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}
