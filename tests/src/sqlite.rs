//! A SQLite database of a test, in each of the two ways in which SQLite makes a commit durable.

use crate::{command, promises::Writer, random::Random, sql::Session};
use anyhow::{Context, Result, bail, ensure};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// How a commit is made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// Pages are appended to a log, which is synced; now and then they go to the database.
    WriteAhead,
    /// The pages of before are put aside and synced, then the database is changed and synced; that the journal is deleted is the commit.
    Rollback,
}

impl Journal {
    fn pragmas(self) -> &'static str {
        match self {
            // A small log, so that it is often begun anew.
            Self::WriteAhead => {
                ".output /dev/null\nPRAGMA synchronous = FULL;\nPRAGMA wal_autocheckpoint = 40;\n.output"
            }
            // Only EXTRA also syncs the directory that the journal is deleted from: with FULL a power cut may undo the last commit.
            Self::Rollback => "PRAGMA synchronous = EXTRA;",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::WriteAhead => "wal",
            Self::Rollback => "delete",
        }
    }
}

/// A database and its way.
pub struct Sqlite {
    path: PathBuf,
    journal: Journal,
}

impl Sqlite {
    /// Makes a database in a directory.
    pub fn create(dir: &Path, journal: Journal) -> Result<Self> {
        let made = Self { path: path(dir), journal };
        let mode = run(&made.path, &format!("PRAGMA journal_mode = {};", journal.name()))?;
        ensure!(mode == journal.name(), "the journal's mode is {mode}");
        let tables = "CREATE TABLE log (number INTEGER PRIMARY KEY, filler TEXT);
             CREATE INDEX fillers ON log (filler);
             CREATE TABLE total (sum INTEGER);
             INSERT INTO total VALUES (0);";
        run(&made.path, tables)?;
        Ok(made)
    }

    /// A program that inserts numbered records, each in a transaction that also changes their sum.
    pub fn client(&self) -> Result<Client> {
        let mut command = Command::new(command::find("sqlite3"));
        command.arg("-batch").arg("-bail").arg(&self.path);
        let mut session = Session::start(command)?;
        session.carry_out(self.journal.pragmas())?;
        Ok(Client { session, random: Random::new(3) })
    }
}

/// Opens a copy, which rolls back or forward what it finds; answers how many records are there, which must be the first
/// ones without a gap.
pub fn records(dir: &Path) -> Result<u64> {
    let path = path(dir);
    // The first to open it puts right what a crash left.
    let said = run(&path, "PRAGMA integrity_check;")?;
    ensure!(said == "ok", "the database is damaged: {said}");
    let row = run(
        &path,
        "SELECT count(*), ifnull(min(number), 1), ifnull(max(number), 0), (SELECT sum FROM total) FROM log;",
    )?;
    let numbers: Vec<u64> = row.split('|').map(str::parse).collect::<Result<_, _>>().context(row.clone())?;
    let [count, least, most, sum] = numbers[..] else { bail!("a row of {row:?}") };
    ensure!(least == 1 && most == count, "there is a gap: {row}");
    ensure!(sum == count * (count + 1) / 2, "half a transaction: {row}");
    Ok(count)
}

fn path(dir: &Path) -> PathBuf {
    dir.join("database")
}

fn run(path: &Path, statements: &str) -> Result<String> {
    command::run("sqlite3", &["-batch", "-bail", &*path.to_string_lossy(), statements])
}

/// See [`Sqlite::client`].
pub struct Client {
    session: Session,
    random: Random,
}

impl Writer for Client {
    fn write(&mut self, _: usize, number: u64) -> Result<()> {
        let filler = format!("{:016x}", self.random.next_u64()).repeat(1 + self.random.below(40) as usize);
        self.session.carry_out(&format!(
            "BEGIN;\nINSERT INTO log VALUES ({number}, '{filler}');\nUPDATE total SET sum = sum + {number};\nCOMMIT;"
        ))
    }
}
