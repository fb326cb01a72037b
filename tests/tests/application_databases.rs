//! Application-consistent points of real databases under load, with the hooks as they are shipped: what is recovered from any of them starts
//! without a complaint and has all that was acknowledged; and whatever goes wrong with a hook, the database goes on in time.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, MariaDb, Mounted, Postgres, Promises, Redis, ShippedHook, Site,
    SiteOptions, Writer, Writers, redis::Keeping,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const MIB: u64 = 1 << 20;
const CLIENTS: usize = 3;
/// Application-consistent points of a test.
const POINTS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk with a file system that is to be replicated.
struct Stand {
    site: Site,
    mounted: Mounted,
    kind: FileSystem,
    ordered: bool,
    disk: LoopDisk,
}

/// A point, when it was asked for, and its time (ms since 1970).
struct Point {
    number: u64,
    asked_at_ms: u64,
    taken_at_ms: u64,
}

impl Stand {
    fn new(arena: &Arena, kind: FileSystem, options: SiteOptions, application: &[&str]) -> Result<Self> {
        let ordered = options.capture.iter().any(|line| line.starts_with("point-interval"));
        let disk = LoopDisk::new(Backing::Tmpfs, 384 * MIB)?;
        let mounted = Mounted::make(kind, disk.path())?;
        let application = application.iter().map(ToString::to_string).collect();
        let site = Site::new(arena, &SiteOptions { application, copy_frozen: false, ..options })?;
        fs::create_dir(site.hooks_dir())?;
        Ok(Self { site, mounted, kind, ordered, disk })
    }

    fn place(&self) -> &Path {
        self.mounted.path()
    }

    /// Installs a hook as it is shipped.
    fn ship(&self, arena: &Arena, hook: &str, settings: &str) -> Result<ShippedHook> {
        ShippedHook::install(hook, &self.site.hooks_dir(), &format!("50-{hook}"), arena.dir(), settings)
    }

    /// A hook of the test's own.
    fn hook(&self, name: &str, body: &str) -> Result<()> {
        let path = self.site.hooks_dir().join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n"))?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
    }

    /// Replicates it from now on.
    fn protect(&mut self) -> Result<()> {
        self.site.allow("write-ordered mode is left");
        self.site.start_agent()?;
        self.site.protect(self.disk.path(), "data")?;
        if self.ordered { self.site.wait_ordered() } else { self.site.wait_replicated() }
    }

    /// Asks for an application-consistent point; answers how consistent it is.
    fn point(&self) -> Result<(Point, String)> {
        let asked_at_ms = now_ms();
        let said = self.site.agent_command(&["point", "--application"])?;
        let number: u64 = said.split_ascii_whitespace().find_map(|w| w.parse().ok()).context("no number")?;
        let points = self.site.operator(&["points", &self.site.machine()?, "--json"])?;
        let points: Value = serde_json::from_str(&points)?;
        let all = points["points"].as_array().context("no points")?;
        let point = all.iter().find(|p| p["point"] == number).context("it is not listed")?;
        let rank = point["consistency"].as_str().context("no consistency")?.to_owned();
        let taken_at_ms = point["taken-at-ms"].as_u64().context("no time")?;
        Ok((Point { number, asked_at_ms, taken_at_ms }, rank))
    }

    /// Makes points, all of them application-consistent; what the hook holds it lets go of.
    fn points(&self, hook: &ShippedHook) -> Result<Vec<Point>> {
        let mut points = vec![];
        for _ in 0..POINTS {
            thread::sleep(Duration::from_secs(1));
            points.push(self.good_point(hook)?);
        }
        Ok(points)
    }

    fn good_point(&self, hook: &ShippedHook) -> Result<Point> {
        let (point, rank) = self.point()?;
        ensure!(rank == "application", "{rank}: {}", self.site.agent_log());
        within(PATIENCE, "the hook holds something", || hook.is_idle())?;
        Ok(point)
    }

    /// Recovers each point, has it told how many records of each column are there, and holds that against what was promised before
    /// a time of it.
    fn check(
        &self,
        points: &[Point],
        promises: &Promises,
        time: impl Fn(&Point) -> u64,
        records: impl Fn(&Path) -> Result<Vec<u64>>,
    ) -> Result<()> {
        let mut last = vec![];
        for point in points {
            let recovered = self.site.recover(point.number)?;
            let mounted = Mounted::existing(self.kind, &recovered.image("data"), "")?;
            let present =
                records(mounted.path()).with_context(|| format!("point {}, after {last:?}", point.number))?;
            promises.check(&present)?;
            let overdue_ms = promises.overdue_ms(&present, time(point));
            ensure!(
                overdue_ms == 0,
                "point {} lacks what was acknowledged {overdue_ms} ms before",
                point.number
            );
            last = present;
        }
        println!("{} records, the last point with {last:?}", promises.records());
        Ok(())
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

fn within(limit: Duration, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let began = Instant::now();
    while !is_so()? {
        ensure!(began.elapsed() < limit, "{what} after {limit:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(began.elapsed())
}

fn writers<W: Writer + 'static>(client: impl Fn(usize) -> Result<W>) -> Result<Writers> {
    let clients =
        (0..CLIENTS).map(|number| Ok(Box::new(client(number)?) as Box<dyn Writer>)).collect::<Result<_>>()?;
    Ok(Writers::start(clients, Duration::from_millis(4)))
}

/// Whose commits are on disk only later, if there is no checkpoint.
#[test]
fn postgres_has_what_was_committed_before_the_checkpoint() -> Result<()> {
    let arena = Arena::enter("hook-postgres")?;
    let mut stand = Stand::new(&arena, FileSystem::Xfs, SiteOptions::ordered("1s"), &[])?;
    let server = Postgres::create(stand.place(), stand.place())?;
    server.make_tables()?;
    // Nobody else is to write the log.
    for setting in ["wal_writer_delay = '10s'", "autovacuum = off", "checkpoint_timeout = '1h'"] {
        server.query(&format!("ALTER SYSTEM SET {setting}"))?;
    }
    server.query("SELECT pg_reload_conf()")?;
    let settings = format!("INSTANCES={}:5432\n", server.socket_dir().display());
    let hook = stand.ship(&arena, "postgresql", &settings)?;
    let writers = writers(|number| server.hasty_client(number))?;
    stand.protect()?;
    let mut points = stand.points(&hook)?;
    let promises = writers.stop()?;
    // What nobody writes after drives nothing out of the memory.
    points.push(stand.good_point(&hook)?);
    server.judge()?;
    server.crash()?;
    // Commits after the checkpoint are on their own.
    let time = |point: &Point| point.asked_at_ms;
    stand.check(&points, &promises, time, |place| {
        let server = Postgres::recover(place, place)?;
        let records = server.records(CLIENTS)?;
        let said = server.tool("pg_amcheck", &["--heapallindexed", "--parent-check", "postgres"])?;
        ensure!(said.is_empty(), "pg_amcheck: {said}");
        server.judge()?;
        server.crash()?;
        Ok(records)
    })?;
    stand.site.stop_agent()
}

/// Tables with transactions and without.
fn mariadb_is_whole(arena: &Arena, kind: FileSystem, options: SiteOptions, settings: &str) -> Result<()> {
    let mut stand = Stand::new(arena, kind, options, &[])?;
    let server = MariaDb::create(stand.place())?;
    let settings = format!("OPTION_FILES={}\n{settings}", server.option_file().display());
    let hook = stand.ship(arena, "mariadb", &settings)?;
    let writers = writers(|number| server.client(number))?;
    stand.protect()?;
    let points = stand.points(&hook)?;
    let promises = writers.stop()?;
    server.judge()?;
    server.crash()?;
    let time = |point: &Point| point.taken_at_ms;
    stand.check(&points, &promises, time, |place| {
        let server = MariaDb::recover(place)?;
        let records = server.records(CLIENTS)?;
        server.judge()?;
        server.crash()?;
        Ok(records)
    })?;
    stand.site.stop_agent()
}

#[test]
fn mariadb_is_whole_in_write_ordered_mode() -> Result<()> {
    let arena = Arena::enter("hook-mariadb")?;
    mariadb_is_whole(&arena, FileSystem::Ext4, SiteOptions::ordered("1s"), "")
}

/// With the lock that MySQL has too.
#[test]
fn mariadb_is_whole_in_bitmap_mode() -> Result<()> {
    let arena = Arena::enter("hook-mariadb-bitmap")?;
    mariadb_is_whole(&arena, FileSystem::Xfs, SiteOptions::default(), "LOCK=ftwrl\n")
}

fn redis_has_all(arena: &Arena, keeping: Keeping, options: SiteOptions) -> Result<()> {
    let mut stand = Stand::new(arena, FileSystem::Ext4, options, &[])?;
    let server = Redis::start(stand.place(), keeping, &[])?;
    let hook = stand.ship(arena, "redis", &format!("INSTANCES={}\n", server.socket().display()))?;
    let writers = writers(|number| server.client(number))?;
    stand.protect()?;
    let points = stand.points(&hook)?;
    let promises = writers.stop()?;
    server.crash()?;
    let time = |point: &Point| point.taken_at_ms;
    stand.check(&points, &promises, time, |place| {
        let server = Redis::start(place, keeping, &[])?;
        let records = server.records(CLIENTS)?;
        server.judge()?;
        server.crash()?;
        Ok(records)
    })?;
    stand.site.stop_agent()
}

#[test]
fn redis_has_what_was_acknowledged_in_its_snapshot() -> Result<()> {
    let arena = Arena::enter("hook-redis-snapshot")?;
    redis_has_all(&arena, Keeping::Snapshots, SiteOptions::ordered("1s"))
}

#[test]
fn redis_has_what_was_acknowledged_in_its_log() -> Result<()> {
    let arena = Arena::enter("hook-redis-log")?;
    redis_has_all(&arena, Keeping::Log, SiteOptions::default())
}

/// A write that waits for whatever holds the database.
fn write(server: &MariaDb) -> Result<()> {
    server.query("REPLACE INTO hw.inno VALUES (0, 1, 'x'); REPLACE INTO hw.aria VALUES (0, 1, 'x')").map(drop)
}

/// How long a write takes now.
fn write_within(server: &MariaDb, limit: Duration) -> Result<Duration> {
    let began = Instant::now();
    write(server)?;
    let took = began.elapsed();
    ensure!(took < limit, "the database was held for {took:?}, not {limit:?}");
    Ok(took)
}

/// Neither a database that does not let itself be locked, nor a hook that hangs or fails while it is, holds it for longer than told.
#[test]
fn whatever_goes_wrong_the_database_goes_on() -> Result<()> {
    const HOOK_TIMEOUT: Duration = Duration::from_secs(12);
    /// Ending what hangs, and a machine that is busy.
    const SLACK: Duration = Duration::from_secs(5);
    let arena = Arena::enter("hook-wrong")?;
    let mut stand =
        Stand::new(&arena, FileSystem::Ext4, SiteOptions::default(), &["hook-timeout = \"12s\""])?;
    stand.site.allow("HW-1498");
    let server = MariaDb::create(stand.place())?;
    let settings = format!("OPTION_FILES={}\nLOCK_S=2\n", server.option_file().display());
    let hook = stand.ship(&arena, "mariadb", &settings)?;
    stand.protect()?;
    let rank = |site: &Stand| Ok::<_, anyhow::Error>(site.point()?.1);
    ensure!(rank(&stand)? == "application");

    // Somebody else holds a table.
    let mut other = server.session()?;
    other.carry_out("LOCK TABLES hw.isam WRITE;")?;
    ensure!(rank(&stand)? == "filesystem");
    ensure!(stand.site.agent_log().contains("no lock"), "{}", stand.site.agent_log());
    write_within(&server, SLACK)?;
    drop(other);

    // It answers nothing.
    server.signal(Signal::SIGSTOP)?;
    let stopped = rank(&stand);
    server.signal(Signal::SIGCONT)?;
    ensure!(stopped? == "filesystem");
    ensure!(stand.site.agent_log().contains("does not let us in"), "{}", stand.site.agent_log());
    write_within(&server, SLACK)?;

    // It is locked when the next hook hangs, or fails.
    let mark = arena.dir().join("mark");
    for (body, held_max) in [("sleep 1000", HOOK_TIMEOUT + SLACK), ("exit 7", SLACK)] {
        fs::remove_file(&mark).ok();
        stand.hook("60-wrong", &format!("[ $1 = thaw ] && exit; echo > {}; {body}", mark.display()))?;
        let (rank, held) = thread::scope(|scope| -> Result<_> {
            let asked = scope.spawn(|| rank(&stand));
            within(PATIENCE, "the hook is not called", || Ok(mark.exists()))?;
            let held = write_within(&server, held_max)?;
            Ok((asked.join().map_err(|_| anyhow::anyhow!("it panicked"))??, held))
        })?;
        println!("{body}: held for {held:?}");
        ensure!(rank == "filesystem", "{rank}");
        within(PATIENCE, "the hook holds something", || hook.is_idle())?;
    }
    fs::remove_file(stand.site.hooks_dir().join("60-wrong"))?;
    ensure!(rank(&stand)? == "application");
    server.judge()?;
    server.crash()?;
    stand.site.stop_agent()
}

/// Nobody calls `thaw`: the server itself ends the lock. When the agent is back, it hears that the lock was not held.
#[test]
fn an_agent_that_dies_leaves_no_database_locked() -> Result<()> {
    const HOLD: Duration = Duration::from_secs(5);
    const SLACK: Duration = Duration::from_secs(3);
    let arena = Arena::enter("hook-killed")?;
    let mut stand = Stand::new(&arena, FileSystem::Ext4, SiteOptions::default(), &["hold = \"5s\""])?;
    stand.site.allow("HW-1498");
    let server = MariaDb::create(stand.place())?;
    let settings = format!("OPTION_FILES={}\n", server.option_file().display());
    let hook = stand.ship(&arena, "mariadb", &settings)?;
    let mark = arena.dir().join("mark");
    stand.hook("60-slow", &format!("[ $1 = thaw ] && exit; echo > {}; sleep 10", mark.display()))?;
    stand.protect()?;
    let mut asked = stand.site.agent_command_started(&["point", "--application"])?;
    within(PATIENCE, "the database is not locked", || Ok(mark.exists()))?;
    stand.site.kill_agent()?;
    let held = write_within(&server, HOLD + SLACK)?;
    println!("held for {held:?}");
    ensure!(held > HOLD / 2, "it was not locked: a write took {held:?}");
    ensure!(!asked.wait()?.success(), "there is no point");
    fs::remove_file(stand.site.hooks_dir().join("60-slow"))?;
    stand.site.start_agent()?;
    let said = "the lock was gone before the thaw";
    within(PATIENCE, "thaw is not called", || Ok(stand.site.agent_log().contains(said)))?;
    ensure!(hook.is_idle()?);
    ensure!(stand.point()?.1 == "application");
    server.judge()?;
    server.crash()?;
    stand.site.stop_agent()
}
