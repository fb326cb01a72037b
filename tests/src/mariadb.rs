//! A MariaDB server of a test: all in one place, no TCP, ended as by a crash.
//!
//! Nothing is repaired when it starts, so that tables that are not whole are seen.

use crate::{census::ENVIRONMENT, command, promises::Writer, random::Random, sql::Session};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Much longer than it takes.
const START_MAX: Duration = Duration::from_secs(60);
/// The kinds of tables that each client writes to, in this order: with transactions, and two without.
const TABLES: [(&str, &str); 3] =
    [("inno", "InnoDB"), ("isam", "MyISAM"), ("aria", "Aria TRANSACTIONAL = 0 PAGE_CHECKSUM = 1")];

/// Little of everything. What InnoDB acknowledges lies in its memory for up to a second.
const SETTINGS: &str = "skip-networking
user = root
performance-schema = off
innodb-buffer-pool-size = 16M
innodb-log-file-size = 8M
innodb-flush-log-at-trx-commit = 0
key-buffer-size = 1M
aria-log-file-size = 8M
aria-pagecache-buffer-size = 1M
open-files-limit = 1000
myisam-recover-options = OFF
aria-recover-options = OFF
";

/// A running server. Dropped: killed.
pub struct MariaDb {
    child: Child,
    dir: TempDir,
}

impl MariaDb {
    /// Makes a database in a directory of its own on a file system, and starts its server.
    pub fn create(place: &Path) -> Result<Self> {
        let dir = Self::prepare(place)?;
        let options = format!("--defaults-file={}", dir.path().join("my.cnf").display());
        command::run(
            "mariadb-install-db",
            &[&options, "--auth-root-authentication-method=socket", "--skip-test-db"],
        )?;
        let server = Self::start(dir)?;
        server.query("CREATE DATABASE hw")?;
        for (table, engine) in TABLES {
            server.query(&format!(
                "CREATE TABLE hw.{table} (client int, number int, filler text, PRIMARY KEY (client, number)) ENGINE = {engine}"
            ))?;
        }
        Ok(server)
    }

    /// Starts a server on a copy. Answers when it has recovered.
    pub fn recover(place: &Path) -> Result<Self> {
        ensure!(place.join("mysql").is_dir(), "the copy has no database");
        Self::start(Self::prepare(place)?)
    }

    fn prepare(place: &Path) -> Result<TempDir> {
        let dir = tempfile::Builder::new().prefix("hwtest-mariadb-").tempdir_in("/var/tmp")?;
        let (data, socket) = (place.join("mysql"), dir.path().join("socket"));
        let settings = format!(
            "[mariadbd]\n{SETTINGS}datadir = {}\nsocket = {}\npid-file = {}\n[client]\nsocket = {}\n",
            data.display(),
            socket.display(),
            dir.path().join("pid").display(),
            socket.display()
        );
        fs::write(dir.path().join("my.cnf"), settings)?;
        Ok(dir)
    }

    fn start(dir: TempDir) -> Result<Self> {
        let log = File::create(dir.path().join("log"))?;
        // Killed with the thread that starts it.
        let mut command = Command::new(command::find("setpriv"));
        command.args(["--pdeathsig", "KILL", "--"]).arg(command::find("mariadbd"));
        command.arg(format!("--defaults-file={}", dir.path().join("my.cnf").display()));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env(ENVIRONMENT, "1");
        let child =
            command.spawn().context("cannot start the server: is MariaDB installed (cargo xtask setup)?")?;
        let mut server = Self { child, dir };
        let until = Instant::now() + START_MAX;
        while !server.log().contains("ready for connections") {
            let ended = server.child.try_wait()?;
            if ended.is_some() || Instant::now() > until {
                bail!("the server did not start ({ended:?}):\n{}", server.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// All it has logged since it was started.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Fails if it has complained of anything.
    ///
    /// # Errors
    /// It has.
    pub fn judge(&self) -> Result<()> {
        let log = self.log();
        let bad = ["[ERROR]", "corrupt", "crashed", "Missing", "does not exist"];
        let complaints: Vec<&str> = log.lines().filter(|l| bad.iter().any(|word| l.contains(word))).collect();
        ensure!(complaints.is_empty(), "the server complains: {}", complaints.join("\n"));
        Ok(())
    }

    /// What tells clients where it is.
    #[must_use]
    pub fn option_file(&self) -> PathBuf {
        self.dir.path().join("my.cnf")
    }

    fn client_command(&self) -> Command {
        let mut command = Command::new(command::find("mariadb"));
        command.arg(format!("--defaults-file={}", self.option_file().display()));
        command.args(["--batch", "--skip-column-names", "--unbuffered", "--skip-reconnect"]);
        command
    }

    /// Carries out statements; answers what they select, a row a line, with tabs between columns.
    pub fn query(&self, statements: &str) -> Result<String> {
        let said = self.client_command().args(["--execute", statements]).stdin(Stdio::null()).output()?;
        ensure!(said.status.success(), "{statements}: {}", String::from_utf8_lossy(&said.stderr).trim());
        Ok(String::from_utf8(said.stdout)?.trim().to_owned())
    }

    /// A connection of its own.
    pub fn session(&self) -> Result<Session> {
        Session::start(self.client_command())
    }

    /// A client that writes, who connects now.
    pub fn client(&self, number: usize) -> Result<Client> {
        Ok(Client { number, session: self.session()?, random: Random::new(number as u64) })
    }

    /// How many records of each client are in each kind of table: they must be the first ones without a gap, and the tables whole.
    pub fn records(&self, clients: usize) -> Result<Vec<u64>> {
        let tables = TABLES.map(|(table, _)| format!("hw.{table}")).join(", ");
        let checked = self.query(&format!("CHECK TABLE {tables} EXTENDED"))?;
        let whole = checked.lines().all(|line| line.ends_with("status\tOK"));
        ensure!(whole && checked.lines().count() == TABLES.len(), "tables are not whole: {checked}");
        let mut records = vec![0; clients * TABLES.len()];
        for (at, (table, _)) in TABLES.iter().enumerate() {
            let counted = format!(
                "SELECT client, count(*), min(number), max(number), count(DISTINCT number) FROM hw.{table} GROUP BY client"
            );
            for row in self.query(&counted)?.lines() {
                let numbers: Vec<u64> = row.split('\t').map(str::parse).collect::<Result<_, _>>()?;
                let [client, count, least, most, distinct] = numbers[..] else { bail!("a row of {row:?}") };
                ensure!(least == 1 && most == count && distinct == count, "{table}: client {client}: {row}");
                let column = client as usize * TABLES.len() + at;
                *records.get_mut(column).context("a client that never was")? = count;
            }
        }
        Ok(records)
    }

    /// Has it stand still, or go on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Ends it as a crash would: nothing more is written.
    pub fn crash(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        crate::device::report(self.end());
    }
}

/// A connection that inserts numbered records, each into one table of each kind after the other.
pub struct Client {
    number: usize,
    session: Session,
    random: Random,
}

impl Writer for Client {
    fn places(&self) -> usize {
        TABLES.len()
    }

    fn write(&mut self, place: usize, number: u64) -> Result<()> {
        let filler = format!("{:016x}", self.random.next_u64()).repeat(1 + self.random.below(24) as usize);
        let table = TABLES[place].0;
        self.session
            .carry_out(&format!("INSERT INTO hw.{table} VALUES ({}, {number}, '{filler}');", self.number))
    }
}
