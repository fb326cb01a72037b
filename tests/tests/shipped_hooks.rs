//! The hooks as they are shipped, called without an agent: what they hold still, for how long, and what they say when they cannot.

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, MariaDb, Postgres, Redis, ShippedHook, redis::Keeping};
use nix::sys::signal::Signal;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Longer than a test needs.
const LONG_S: u64 = 60;
const BLOCKED: Duration = Duration::from_millis(700);

/// A hook with its settings, in a directory of hooks.
fn ship(dir: &Path, hook: &str, settings: &str) -> Result<ShippedHook> {
    let hooks = dir.join("hooks");
    fs::create_dir_all(&hooks)?;
    ShippedHook::install(hook, &hooks, hook, dir, settings)
}

fn called(hook: &ShippedHook, what: &str, hold_s: u64) -> Result<String> {
    let (done, said) = hook.call(what, hold_s)?;
    ensure!(done, "{what}: {said}");
    Ok(said)
}

/// It fails, and says this.
fn refused(hook: &ShippedHook, what: &str, hold_s: u64, wanted: &str) -> Result<()> {
    let (done, said) = hook.call(what, hold_s)?;
    ensure!(!done && said.contains(wanted), "{what}: {said:?}, not {wanted:?}");
    Ok(())
}

/// How long a write lasts that somebody else ends after a while.
fn timed(
    write: impl FnOnce() -> Result<()> + Send,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    let began = Instant::now();
    thread::scope(|scope| {
        let writing = scope.spawn(move || write().map(|()| began.elapsed()));
        thread::sleep(BLOCKED);
        meanwhile()?;
        writing.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })
}

fn mariadb_with(lock: &str) -> Result<()> {
    let arena = Arena::enter("mariadb-hook")?;
    let place = tempfile::Builder::new().prefix("hwtest-data-").tempdir_in("/dev/shm")?;
    let server = MariaDb::create(place.path())?;
    let settings = format!("OPTION_FILES={}\nLOCK={lock}\nLOCK_S=1\n", server.option_file().display());
    let hook = ship(arena.dir(), "mariadb", &settings)?;
    let tables = ["inno", "isam", "aria"];
    let write = |table: &str| server.query(&format!("REPLACE INTO hw.{table} VALUES (0, 1, 'x')")).map(drop);

    called(&hook, "thaw", LONG_S)?;
    for table in tables {
        let said = called(&hook, "freeze", LONG_S)?;
        ensure!(said.contains(if lock == "auto" { "backup-stage" } else { lock }), "{said}");
        // A second time, which ends nothing.
        ensure!(called(&hook, "freeze", LONG_S)?.contains("already"));
        ensure!(server.query(&format!("SELECT count(*) FROM hw.{table}")).is_ok(), "reads go on");
        let took = timed(|| write(table), || called(&hook, "thaw", LONG_S).map(drop))?;
        ensure!(took >= BLOCKED, "a write to {table} took only {took:?}");
        called(&hook, "thaw", LONG_S)?;
        ensure!(hook.is_idle()?);
    }

    // The time is over: the server goes on by itself, and the point is not what it seems.
    let began = Instant::now();
    called(&hook, "freeze", 2)?;
    write("inno")?;
    let held = began.elapsed();
    ensure!(held > Duration::from_secs(1) && held < Duration::from_secs(5), "held for {held:?}");
    refused(&hook, "thaw", 2, "the lock was gone before the thaw")?;
    // Somebody ends the session, or the server ended.
    called(&hook, "freeze", LONG_S)?;
    let ours =
        "SELECT id FROM information_schema.processlist WHERE id <> connection_id() AND command = 'Sleep'";
    let ours = server.query(ours)?;
    server.query(&format!("KILL {ours}"))?;
    refused(&hook, "thaw", LONG_S, "the lock was gone before the thaw")?;
    called(&hook, "thaw", LONG_S)?;

    // It is killed while it has the lock, or waits for it.
    called(&hook, "freeze", LONG_S)?;
    hook.call_and_kill("freeze", LONG_S, Duration::ZERO)?;
    called(&hook, "thaw", LONG_S)?;
    let mut other = server.session()?;
    other.carry_out("LOCK TABLES hw.isam WRITE;")?;
    hook.call_and_kill("freeze", LONG_S, BLOCKED)?;
    called(&hook, "thaw", LONG_S)?;
    let began = Instant::now();
    write("inno")?;
    ensure!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    ensure!(hook.left_running()?.is_empty(), "a client is left");
    drop(other);

    // A long statement is waited for no longer than told, and what was begun is ended.
    let mut other = server.session()?;
    other.carry_out("LOCK TABLES hw.isam WRITE;")?;
    let began = Instant::now();
    refused(&hook, "freeze", LONG_S, "no lock: ERROR 1205")?;
    ensure!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    drop(other);
    write("isam")?;
    ensure!(hook.is_idle()?);

    // It runs, and answers nothing.
    server.signal(Signal::SIGSTOP)?;
    let stopped = refused(&hook, "freeze", LONG_S, "does not let us in");
    server.signal(Signal::SIGCONT)?;
    stopped?;
    // It does not run.
    server.signal(Signal::SIGKILL)?;
    thread::sleep(BLOCKED);
    ensure!(called(&hook, "freeze", LONG_S)?.contains("no server is running"));
    called(&hook, "thaw", LONG_S)?;
    server.crash()?;
    refused(&hook, "freeze", LONG_S, "cannot be read")
}

#[test]
fn mariadb_stands_still_with_its_own_lock() -> Result<()> {
    mariadb_with("auto")
}

#[test]
fn mariadb_stands_still_with_the_lock_that_mysql_has() -> Result<()> {
    mariadb_with("ftwrl")
}

#[test]
fn mariadb_goes_on_without_the_client_of_the_lock() -> Result<()> {
    let arena = Arena::enter("mariadb-hook-client")?;
    let place = tempfile::Builder::new().prefix("hwtest-data-").tempdir_in("/dev/shm")?;
    let server = MariaDb::create(place.path())?;
    let hook = ship(arena.dir(), "mariadb", &format!("OPTION_FILES={}\n", server.option_file().display()))?;
    called(&hook, "freeze", LONG_S)?;
    let left = hook.left_running()?;
    // Its guard alone: the client lives on.
    let guard = left.iter().min().copied().context("there is no session")?;
    nix::sys::signal::kill(guard, Signal::SIGKILL)?;
    refused(&hook, "thaw", LONG_S, "the lock was gone before the thaw")?;
    ensure!(hook.left_running()?.is_empty(), "a client is left");
    let write = || server.query("REPLACE INTO hw.inno VALUES (0, 1, 'x')").map(drop);
    write()?;
    // All of it.
    called(&hook, "freeze", LONG_S)?;
    for process in hook.left_running()? {
        nix::sys::signal::kill(process, Signal::SIGKILL)?;
    }
    write()?;
    refused(&hook, "thaw", LONG_S, "the lock was gone before the thaw")
}

/// Settings may hold secrets, and are carried out.
#[test]
fn settings_that_others_can_read_are_refused() -> Result<()> {
    let arena = Arena::enter("hook-settings")?;
    for name in ["postgresql", "mariadb", "redis"] {
        let hook = ship(arena.dir(), name, "")?;
        fs::set_permissions(hook.conf(), fs::Permissions::from_mode(0o644))?;
        refused(&hook, "freeze", LONG_S, "nobody else may read it")?;
        refused(&hook, "melt", LONG_S, "call it with freeze or thaw")?;
    }
    Ok(())
}

#[test]
fn postgres_makes_a_checkpoint_or_says_why_not() -> Result<()> {
    let arena = Arena::enter("postgres-hook")?;
    let place = tempfile::Builder::new().prefix("hwtest-data-").tempdir_in("/dev/shm")?;
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
    let server = Postgres::create(place.path(), place.path())?;
    let settings = format!("SOCKET_DIRS={}\nLIMIT_S=3\n", server.socket_dir().display());
    let hook = ship(arena.dir(), "postgresql", &settings)?;
    let last = || server.query("SELECT checkpoint_lsn FROM pg_control_checkpoint()");
    server.query("CREATE TABLE t (a int)")?;
    let before = last()?;
    ensure!(called(&hook, "freeze", LONG_S)?.contains("checkpoint of the server at"));
    ensure!(last()? != before, "there was no checkpoint");
    called(&hook, "thaw", LONG_S)?;
    // It runs, and answers nothing.
    server.signal(Signal::SIGSTOP)?;
    let stopped = refused(&hook, "freeze", LONG_S, "no checkpoint of the server");
    server.signal(Signal::SIGCONT)?;
    stopped?;
    let required = format!("INSTANCES={}:5432\nREQUIRED=yes\n", server.socket_dir().display());
    server.crash()?;
    ensure!(called(&hook, "freeze", LONG_S)?.contains("no server is running"));
    fs::write(hook.conf(), required)?;
    refused(&hook, "freeze", LONG_S, "no server is running")
}

fn redis_with(keeping: Keeping) -> Result<()> {
    let arena = Arena::enter("redis-hook")?;
    let place = tempfile::Builder::new().prefix("hwtest-data-").tempdir_in("/dev/shm")?;
    let server = Redis::start(place.path(), keeping, &["--requirepass", "hush"])?;
    let at = format!("INSTANCES={}\n", server.socket().display());
    let hook = ship(arena.dir(), "redis", &at)?;
    refused(&hook, "freeze", LONG_S, "NOAUTH")?;
    fs::write(hook.conf(), format!("{at}REDISCLI_AUTH=hush\n"))?;
    let write = || -> Result<()> {
        let mut client = server.client(0)?;
        ensure!(client.ask("AUTH hush")? == "+OK");
        ensure!(client.ask("SET key value")? == "+OK");
        Ok(())
    };
    called(&hook, "thaw", LONG_S)?;
    write()?;
    ensure!(!called(&hook, "freeze", LONG_S)?.contains("hush"));
    called(&hook, "freeze", LONG_S)?;
    let took = timed(write, || called(&hook, "thaw", LONG_S).map(drop))?;
    ensure!(took >= BLOCKED, "a write took only {took:?}");
    called(&hook, "thaw", LONG_S)?;
    ensure!(hook.is_idle()?);

    // The time is over.
    let began = Instant::now();
    called(&hook, "freeze", 2)?;
    write()?;
    let held = began.elapsed();
    ensure!(held > Duration::from_secs(1) && held < Duration::from_secs(5), "held for {held:?}");
    refused(&hook, "thaw", 2, "writes went on before the thaw")?;
    // Somebody else had writes go on.
    called(&hook, "freeze", LONG_S)?;
    let mut other = server.client(0)?;
    ensure!(other.ask("AUTH hush")? == "+OK");
    ensure!(other.ask("CLIENT UNPAUSE")? == "+OK");
    write()?;
    refused(&hook, "thaw", LONG_S, "writes went on before the thaw")?;
    // It was another server, which has no pause.
    called(&hook, "freeze", LONG_S)?;
    server.crash()?;
    refused(&hook, "thaw", LONG_S, "the server is another one")?;
    ensure!(called(&hook, "freeze", LONG_S)?.contains("no server is running"));
    called(&hook, "thaw", LONG_S).map(drop)
}

#[test]
fn redis_stands_still_with_a_log() -> Result<()> {
    redis_with(Keeping::Log)
}

#[test]
fn redis_stands_still_with_snapshots() -> Result<()> {
    redis_with(Keeping::Snapshots)
}
