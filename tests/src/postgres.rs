//! A PostgreSQL server of a test: its data in one place, its write-ahead log in another, no TCP, ended as by a crash.
//!
//! It cannot run as root, so it runs as the user that its package made.

use crate::{
    census::ENVIRONMENT,
    command,
    promises::Writer,
    random::Random,
    server::Server,
    sql::{self, COUNTED, Session},
};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

const USER: &str = "postgres";
/// Pairs of rows; the sum of each stays this.
const PAIRS: u64 = 50;
const PAIR_SUM: u64 = 1000;

/// Small buffers and a small log, so that pages are written and log files used again while the test lasts; and sums over all
/// pages, so that a torn one is noticed.
const SETTINGS: &str = "listen_addresses = ''
shared_buffers = 8MB
max_wal_size = 8MB
min_wal_size = 2MB
checkpoint_timeout = 30s
checkpoint_completion_target = 0.3
autovacuum_naptime = 2s
bgwriter_delay = 50ms
synchronous_commit = on
log_checkpoints = off
";

/// A running server. Dropped: stopped at once, without a checkpoint.
pub struct Postgres(Server);

impl Postgres {
    /// Makes a database in directories of its own on two file systems, and starts its server.
    pub fn create(data: &Path, log: &Path) -> Result<Self> {
        let (data, log) = (data.join("data"), log.join("wal"));
        for dir in [&data, &log] {
            fs::create_dir(dir)?;
            own(dir)?;
        }
        let words =
            ["initdb", "--username", USER, "--auth", "trust", "--data-checksums", "--wal-segsize", "1"];
        let mut made = as_user(words[0])?;
        made.args(&words[1..]).args(["--locale", "C", "--encoding", "UTF8"]);
        made.arg("--pgdata").arg(&data).arg("--waldir").arg(&log);
        let made = made.output().context("cannot start initdb")?;
        ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let settings = data.join("postgresql.conf");
        let defaults = fs::read_to_string(&settings)?;
        fs::write(&settings, defaults + SETTINGS)?;
        Self::start(&data)
    }

    /// Starts a server on a copy of both file systems. Answers when it has recovered.
    pub fn recover(data: &Path, log: &Path) -> Result<Self> {
        let data = data.join("data");
        let link = data.join("pg_wal");
        fs::remove_file(&link).context("the copy has no link to its log")?;
        symlink(log.join("wal"), &link)?;
        // It names a process of the machine that the original ran on, which is this one.
        fs::remove_file(data.join("postmaster.pid")).context("the copy is not one of a server that ran")?;
        let server = Self::start(&data)?;
        let said = server.log();
        ensure!(said.contains("was not properly shut down"), "it did not recover: {said}");
        Ok(server)
    }

    fn start(data: &Path) -> Result<Self> {
        let dir = Server::directory("postgres")?;
        own(dir.path())?;
        let mut command = as_user("postgres")?;
        command.arg("-D").arg(data).arg("-k").arg(dir.path());
        // Its processes leave without a checkpoint.
        Ok(Self(Server::start(dir, command, "ready to accept connections", Signal::SIGQUIT)?))
    }

    /// All it has logged since it was started.
    #[must_use]
    pub fn log(&self) -> String {
        self.0.log()
    }

    /// Fails if it has complained of anything.
    ///
    /// # Errors
    /// It has.
    pub fn judge(&self) -> Result<()> {
        self.0.judge(&["WARNING:", "ERROR:", "FATAL:", "PANIC:", "corrupt", "invalid page"])
    }

    /// Arguments of any client that connects to it.
    fn address(&self) -> [String; 4] {
        let dir = self.0.dir().to_string_lossy().into_owned();
        ["--host".into(), dir, "--username".into(), USER.into()]
    }

    /// Carries out statements; answers what the last one selects, a row a line, with `|` between columns.
    pub fn query(&self, statements: &str) -> Result<String> {
        let mut all: Vec<String> = ["-XqAt", "-v", "ON_ERROR_STOP=1"].map(String::from).to_vec();
        all.extend(self.address());
        all.extend(["--command".into(), statements.into()]);
        self.run("psql", &all)
    }

    /// Runs one of the database's own programs on it.
    pub fn tool(&self, name: &str, args: &[&str]) -> Result<String> {
        let all: Vec<String> =
            self.address().into_iter().chain(args.iter().map(|a| (*a).to_owned())).collect();
        self.run(name, &all)
    }

    /// Starts such a program beside the test.
    pub fn tool_beside(&self, name: &str, args: &[&str]) -> Result<Child> {
        let mut command = Command::new(programs()?.join(name));
        command.args(self.address()).args(args).env(ENVIRONMENT, "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().with_context(|| format!("cannot start {name}"))
    }

    fn run(&self, name: &str, args: &[String]) -> Result<String> {
        command::run(&programs()?.join(name).to_string_lossy(), args)
    }

    /// Makes the tables that [`Client`]s write to.
    pub fn make_tables(&self) -> Result<()> {
        self.query(&format!(
            "CREATE TABLE log (client int, number int, filler text, PRIMARY KEY (client, number));
             CREATE TABLE pair (id int, side int, value int, PRIMARY KEY (id, side));
             INSERT INTO pair SELECT id, side, {PAIR_SUM} / 2 FROM generate_series(0, {PAIRS} - 1) id, generate_series(0, 1) side;
             CREATE EXTENSION amcheck;"
        ))
        .map(drop)
    }

    /// Where its socket lies, with the usual port.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        self.0.dir()
    }

    /// A client of its own, who connects now.
    pub fn client(&self, number: usize) -> Result<Client> {
        self.client_with(number, "on")
    }

    /// The same, of which nothing is on disk when it is told that it is done.
    pub fn hasty_client(&self, number: usize) -> Result<Client> {
        self.client_with(number, "off")
    }

    fn client_with(&self, number: usize, synchronous: &str) -> Result<Client> {
        let mut command = Command::new(programs()?.join("psql"));
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1"]).args(self.address());
        let mut session = Session::start(command)?;
        session.carry_out(&format!("SET synchronous_commit = {synchronous};"))?;
        Ok(Client { number, session, random: Random::new(number as u64) })
    }

    /// How many records of each client are there: they must be the first ones without a gap, and no pair of rows may be torn.
    pub fn records(&self, clients: usize) -> Result<Vec<u64>> {
        let torn = self.query(&format!(
            "SELECT id, sum(value), count(*) FROM pair GROUP BY id HAVING sum(value) <> {PAIR_SUM} OR count(*) <> 2"
        ))?;
        ensure!(torn.is_empty(), "half a transaction: {torn}");
        let pairs = self.query("SELECT count(*) FROM pair")?;
        ensure!(pairs == (PAIRS * 2).to_string(), "{pairs} rows of {PAIRS} pairs");
        let mut records = vec![0; clients];
        let counted = format!("SELECT {COUNTED} FROM log GROUP BY client");
        for row in self.query(&counted)?.lines() {
            let (client, count) = sql::gapless(row, '|')?;
            *records.get_mut(client).context("a client that never was")? = count;
        }
        Ok(records)
    }

    /// Has it take no connections, or go on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.0.signal(signal)
    }

    /// Ends it as a crash would: nothing more is written.
    pub fn crash(self) -> Result<()> {
        self.0.crash()
    }
}

/// A connection that inserts numbered records, each in a transaction of its own; every second one also moves something within a
/// pair of rows.
pub struct Client {
    number: usize,
    session: Session,
    random: Random,
}

impl Writer for Client {
    fn write(&mut self, _: usize, number: u64) -> Result<()> {
        let filler = format!("{:016x}", self.random.next_u64()).repeat(1 + self.random.below(24) as usize);
        let insert = format!("INSERT INTO log VALUES ({}, {number}, '{filler}')", self.number);
        if number.is_multiple_of(2) {
            return self.session.carry_out(&format!("{insert};"));
        }
        let (id, amount) = (self.random.below(PAIRS), self.random.below(9));
        let update = |sign: char, side: u8| {
            format!("UPDATE pair SET value = value {sign} {amount} WHERE id = {id} AND side = {side};")
        };
        self.session.carry_out(&format!("BEGIN;\n{}\n{insert};\n{}\nCOMMIT;", update('+', 0), update('-', 1)))
    }
}

/// Where the newest version's programs lie; a distribution has only some of them in its path.
fn programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not installed: cargo xtask setup --for test")?;
    versions
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|dir| dir.join("initdb").exists())
        .max()
        .context("no initdb below /usr/lib/postgresql")
}

/// One of the programs, as the user; killed with the thread that starts it.
fn as_user(program: &str) -> Result<Command> {
    let mut command = Command::new(command::find("setpriv"));
    command.args(["--reuid", USER, "--regid", USER, "--init-groups", "--pdeathsig", "QUIT", "--"]);
    command.arg(programs()?.join(program));
    // Where it may be.
    command.current_dir("/");
    Ok(command)
}

fn own(path: &Path) -> Result<()> {
    command::run("chown", &[&format!("{USER}:"), &*path.to_string_lossy()]).map(drop)
}
