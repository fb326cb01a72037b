//! A MariaDB server of a test: all in one place, no TCP, ended as by a crash.
//!
//! Nothing is repaired when it starts, so that tables that are not whole are seen.

use crate::{
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
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tempfile::TempDir;

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
pub struct MariaDb(Server);

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
        let dir = Server::directory("mariadb")?;
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
        // Killed with the thread that starts it.
        let mut command = Command::new(command::find("setpriv"));
        command.args(["--pdeathsig", "KILL", "--"]).arg(command::find("mariadbd"));
        command.arg(format!("--defaults-file={}", dir.path().join("my.cnf").display()));
        Ok(Self(Server::start(dir, command, "ready for connections", Signal::SIGKILL)?))
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
        self.0.judge(&["[ERROR]", "corrupt", "crashed", "Missing", "does not exist"])
    }

    /// What tells clients where it is.
    #[must_use]
    pub fn option_file(&self) -> PathBuf {
        self.0.dir().join("my.cnf")
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
            let counted = format!("SELECT {COUNTED} FROM hw.{table} GROUP BY client");
            for row in self.query(&counted)?.lines() {
                let (client, count) = sql::gapless(row, '\t').with_context(|| table.to_string())?;
                let column = client * TABLES.len() + at;
                *records.get_mut(column).context("a client that never was")? = count;
            }
        }
        Ok(records)
    }

    /// Has it stand still, or go on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.0.signal(signal)
    }

    /// Ends it as a crash would: nothing more is written.
    pub fn crash(self) -> Result<()> {
        self.0.crash()
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
