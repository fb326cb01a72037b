//! A Redis server of a test: a Unix socket, its data in one place, ended as by a crash.

use crate::{command, promises::Writer, server::Server};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// A client that is paused for longer fails.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// How it keeps its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// Each write is appended to a file, which is synced every second.
    Log,
    /// Now and then all is saved; in a test, only when asked to.
    Snapshots,
}

/// A running server. Dropped: killed.
pub struct Redis(Server);

impl Redis {
    /// Starts a server on what there is in a directory of its own on a file system; on nothing at first.
    pub fn start(place: &Path, keeping: Keeping, more: &[&str]) -> Result<Self> {
        let dir = Server::directory("redis")?;
        let data = place.join("redis");
        fs::create_dir_all(&data)?;
        let mut command = Command::new(command::find("setpriv"));
        // What Debian's redis-tools brings is the server under another name, by which it tells what it is to do. Its package of the server
        // would also start one.
        let program = dir.path().join("redis-server");
        symlink(command::find("redis-check-rdb"), &program)?;
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).arg("--dir").arg(data);
        command.args(["--port", "0", "--daemonize", "no", "--unixsocket"]).arg(dir.path().join("socket"));
        match keeping {
            Keeping::Log => command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]),
            Keeping::Snapshots => command.args(["--save", "86400 1", "--appendonly", "no"]),
        };
        command.args(more);
        Ok(Self(Server::start(dir, command, "ready to accept connections", Signal::SIGKILL)?))
    }

    /// All it has logged since it was started.
    #[must_use]
    pub fn log(&self) -> String {
        self.0.log()
    }

    /// Fails if what it began with was not whole.
    ///
    /// # Errors
    /// It was not.
    pub fn judge(&self) -> Result<()> {
        self.0.judge(&["Bad file format", "runcated", "Short read", "rror", "orrupt"])
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.dir().join("socket")
    }

    /// A client of its own, who connects now.
    pub fn client(&self, number: usize) -> Result<Client> {
        Client::connect(&self.socket(), number)
    }

    /// How many records of each client are there: they must be the first ones without a gap.
    pub fn records(&self, clients: usize) -> Result<Vec<u64>> {
        let mut asking = self.client(0)?;
        let mut records = vec![];
        for client in 0..clients {
            let answer = asking.ask(&format!("LRANGE client:{client} 0 -1"))?;
            let count: u64 = answer.strip_prefix('*').context("no list")?.parse()?;
            for number in 1..=count {
                asking.hear()?;
                let there = asking.hear()?;
                ensure!(there == number.to_string(), "client {client} has {there} in place {number}");
            }
            records.push(count);
        }
        Ok(records)
    }

    /// Ends it as a crash would.
    pub fn crash(self) -> Result<()> {
        self.0.crash()
    }
}

/// A connection that appends numbered records to a list of its own.
pub struct Client {
    number: usize,
    say: UnixStream,
    hear: BufReader<UnixStream>,
}

impl Client {
    fn connect(socket: &Path, number: usize) -> Result<Self> {
        let say = UnixStream::connect(socket)?;
        say.set_read_timeout(Some(ANSWER_MAX))?;
        Ok(Self { number, hear: BufReader::new(say.try_clone()?), say })
    }

    /// Says a command; answers the first line of what it is told.
    pub fn ask(&mut self, words: &str) -> Result<String> {
        write!(self.say, "{words}\r\n")?;
        self.hear()
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        self.hear.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

impl Writer for Client {
    fn write(&mut self, _: usize, number: u64) -> Result<()> {
        let answer = self.ask(&format!("RPUSH client:{} {number}", self.number))?;
        ensure!(answer == format!(":{number}"), "the server said {answer:?}");
        Ok(())
    }
}
