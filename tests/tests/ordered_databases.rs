//! What programs were promised, at crash-consistent points: databases and a program that syncs its files itself, each over two
//! disks, recover from any point as from a power cut, with all that was acknowledged before the point's time.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Postgres, Promises, Site, SiteOptions, Sqlite, Writer,
    Writers,
    site::Recovered,
    sqlite::{self, Journal},
    synced::{self, TwoFiles},
};
use std::{
    path::Path,
    process::Child,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
/// How many points are checked at one time.
const CHECKERS: usize = 2;
/// Of the points' failures, so many are told.
const TOLD_MAX: usize = 5;

/// How many points are made; they come every second.
fn points_min(usual: usize) -> usize {
    if std::env::var_os("HIGHWATER_TEST_LONG").is_some() { 300 } else { usual }
}

/// Protects disks that are being written to, and waits until there are so many points of the stream.
fn protect(site: &mut Site, disks: &[(&Path, &str)], points: usize) -> Result<()> {
    site.allow("write-ordered mode is left");
    site.start_agent()?;
    for (disk, name) in disks {
        site.protect(disk, name)?;
    }
    site.wait_ordered()?;
    let wanted = site.points()?.len() + points;
    let until = Instant::now() + Duration::from_secs(60 + 4 * points as u64);
    while site.points()?.len() < wanted {
        ensure!(Instant::now() < until, "points do not come: {:#}", site.status()?);
        thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// Recovers each point that has all these disks, has it told how many records of each column are there, and holds that against
/// what was promised. What tells it is also told how many points come later.
fn check_points(
    site: &Site,
    disks: &[&str],
    promises: &Promises,
    records: impl Fn(&Recovered, usize) -> Result<Vec<u64>> + Sync,
) -> Result<()> {
    let points = site.points()?;
    let (next, checked, failures) = (AtomicUsize::new(0), Mutex::new(vec![]), Mutex::new(vec![]));
    let check = |at: usize| -> Result<()> {
        let (point, taken_at_ms) = points[at];
        let recovered = site.recover(point)?;
        if !disks.iter().all(|name| recovered.image(name).exists()) {
            // Of before the first copy of all was complete.
            return Ok(());
        }
        let present = records(&recovered, points.len() - 1 - at)?;
        let overdue_ms = promises.overdue_ms(&present, taken_at_ms);
        promises.check(&present)?;
        checked.lock().expect("no panic").push((point, present, overdue_ms));
        Ok(())
    };
    thread::scope(|scope| {
        for _ in 0..CHECKERS {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((point, _)) = points.get(at) else { return };
                    if let Err(error) = check(at) {
                        failures.lock().expect("no panic").push(format!("point {point}: {error:#}"));
                    }
                }
            });
        }
    });
    let (mut checked, failures) = (checked.into_inner()?, failures.into_inner()?);
    checked.sort_unstable();
    let last = checked.last().map(|(_, present, _)| present);
    println!("{} records, {} points, the last with {last:?}", promises.records(), checked.len());
    ensure!(
        failures.is_empty(),
        "{} points: {}",
        failures.len(),
        failures[..failures.len().min(TOLD_MAX)].join("\n")
    );
    for pair in checked.windows(2) {
        let back = pair[0].1.iter().zip(&pair[1].1).any(|(then, now)| now < then);
        ensure!(!back, "a point goes back: {pair:?}");
    }
    ensure!(
        checked.len() * 4 >= points.len() * 3,
        "only {} of {} points have all disks",
        checked.len(),
        points.len()
    );
    let overdue: Vec<(u64, u64)> =
        checked.iter().map(|(point, _, ms)| (*point, *ms)).filter(|(_, ms)| *ms > 0).collect();
    ensure!(
        overdue.is_empty(),
        "{} of {} points lack what had been acknowledged before the time that they tell (point, for how many ms): {overdue:?}",
        overdue.len(),
        checked.len()
    );
    Ok(())
}

/// A load of another kind beside those who are promised something. Killed when dropped.
struct Beside(Child);
impl Drop for Beside {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Whose data lie on one disk, and whose log lies on another.
#[test]
fn postgres_with_its_log_on_another_disk() -> Result<()> {
    const CLIENTS: usize = 4;
    /// Of the last points every page is looked at.
    const THOROUGH: usize = 3;
    let arena = Arena::enter("postgres")?;
    let data = LoopDisk::new(Backing::Tmpfs, 256 * MIB)?;
    let log = LoopDisk::new(Backing::Tmpfs, FileSystem::Xfs.size_bytes_min())?;
    let mounts = (Mounted::make(FileSystem::Ext4, data.path())?, Mounted::make(FileSystem::Xfs, log.path())?);
    let server = Postgres::create(mounts.0.path(), mounts.1.path())?;
    server.make_tables()?;
    server.tool("pgbench", &["--initialize", "--quiet", "postgres"])?;
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered("1s") };
    let mut site = Site::new(&arena, &options)?;
    let clients = (0..CLIENTS)
        .map(|number| Ok(Box::new(server.client(number)?) as Box<dyn Writer>))
        .collect::<Result<_>>()?;
    let writers = Writers::start(clients, Duration::from_millis(4));
    let beside =
        Beside(server.tool_beside("pgbench", &["--client=2", "--rate=40", "--time=3600", "postgres"])?);
    protect(&mut site, &[(data.path(), "data"), (log.path(), "log")], points_min(30))?;
    let promises = writers.stop()?;
    drop(beside);
    server.judge()?;
    server.crash()?;
    ensure!(promises.records() > 1000, "only {} transactions", promises.records());
    check_points(&site, &["data", "log"], &promises, |recovered, last| {
        let data = Mounted::existing(FileSystem::Ext4, &recovered.image("data"), "")?;
        let log = Mounted::existing(FileSystem::Xfs, &recovered.image("log"), "")?;
        let server = Postgres::recover(data.path(), log.path())?;
        let records = server.records(CLIENTS)?;
        if last < THOROUGH {
            let said = server.tool("pg_amcheck", &["--heapallindexed", "--parent-check", "postgres"])?;
            ensure!(said.is_empty(), "pg_amcheck: {said}");
        }
        server.judge()?;
        server.crash()?;
        Ok(records)
    })?;
    site.stop_agent()
}

/// In each of its two ways, on a file system each.
#[test]
fn sqlite_with_either_journal() -> Result<()> {
    let arena = Arena::enter("sqlite")?;
    let places = [(FileSystem::Btrfs, Journal::WriteAhead), (FileSystem::Ext4, Journal::Rollback)];
    let disks = [LoopDisk::new(Backing::Tmpfs, 256 * MIB)?, LoopDisk::new(Backing::Tmpfs, 96 * MIB)?];
    let mut mounts = vec![];
    let mut clients: Vec<Box<dyn Writer>> = vec![];
    for ((kind, journal), disk) in places.iter().zip(&disks) {
        let mounted = Mounted::make(*kind, disk.path())?;
        clients.push(Box::new(Sqlite::create(mounted.path(), *journal)?.client()?));
        mounts.push(mounted);
    }
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered("1s") };
    let mut site = Site::new(&arena, &options)?;
    // A commit on each is some 200 KiB of writes; this is to be no test of throughput.
    let writers = Writers::start(clients, Duration::from_millis(6));
    protect(&mut site, &[(disks[0].path(), "ahead"), (disks[1].path(), "rollback")], points_min(20))?;
    let promises = writers.stop()?;
    ensure!(promises.records() > 500, "only {} transactions", promises.records());
    // A copy of a btrfs that is mounted cannot be mounted on older kernels.
    drop(mounts);
    // And no two copies at a time, for the same reason.
    let alone = Mutex::new(());
    check_points(&site, &["ahead", "rollback"], &promises, |recovered, _| {
        let _alone = alone.lock().ok().context("another check panicked")?;
        let ahead = Mounted::existing(places[0].0, &recovered.image("ahead"), "")?;
        let rollback = Mounted::existing(places[1].0, &recovered.image("rollback"), "")?;
        Ok(vec![sqlite::records(ahead.path())?, sqlite::records(rollback.path())?])
    })?;
    site.stop_agent()
}

/// A record is in the second file only where it is in the first, which lies on another disk.
#[test]
fn what_is_synced_in_order_is_there_in_order() -> Result<()> {
    /// Room for zeros, and so whether metadata changes with each record.
    const ROOM_BYTES: [usize; 3] = [0, 0, 8 << 20];
    let arena = Arena::enter("synced")?;
    let kinds = [FileSystem::Xfs, FileSystem::Ext4];
    let size = FileSystem::Xfs.size_bytes_min();
    let disks = [LoopDisk::new(Backing::Tmpfs, size)?, LoopDisk::new(Backing::Tmpfs, 192 * MIB)?];
    let mounts = [Mounted::make(kinds[0], disks[0].path())?, Mounted::make(kinds[1], disks[1].path())?];
    let writers = (0..)
        .zip(ROOM_BYTES)
        .map(|(seed, room)| {
            // Some begin on one disk, some on the other.
            let (first, second) = if seed == 1 { (1, 0) } else { (0, 1) };
            let files = TwoFiles::create([mounts[first].path(), mounts[second].path()], seed, room)?;
            Ok(Box::new(files) as Box<dyn Writer>)
        })
        .collect::<Result<_>>()?;
    let options = SiteOptions { copy_frozen: false, ..SiteOptions::ordered("1s") };
    let mut site = Site::new(&arena, &options)?;
    let writers = Writers::start(writers, Duration::from_millis(2));
    protect(&mut site, &[(disks[0].path(), "a"), (disks[1].path(), "b")], points_min(16))?;
    let promises = writers.stop()?;
    ensure!(promises.records() > 2000, "only {} records", promises.records());
    check_points(&site, &["a", "b"], &promises, |recovered, _| {
        let a = Mounted::existing(kinds[0], &recovered.image("a"), "")?;
        let b = Mounted::existing(kinds[1], &recovered.image("b"), "")?;
        let mut records = vec![];
        for seed in 0..ROOM_BYTES.len() as u64 {
            let mut both = [synced::records(a.path(), seed)?, synced::records(b.path(), seed)?];
            if seed == 1 {
                both.reverse();
            }
            records.extend(both);
        }
        Ok(records)
    })?;
    site.stop_agent()
}
