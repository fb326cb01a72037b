//! A Redis server of a test: a Unix socket, its data in one place, ended as by a crash.

use crate::{census::ENVIRONMENT, command, promises::Writer};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const START_MAX: Duration = Duration::from_secs(60);
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
pub struct Redis {
    child: Child,
    dir: TempDir,
}

impl Redis {
    /// Starts a server on what there is in a directory of its own on a file system; on nothing at first.
    pub fn start(place: &Path, keeping: Keeping, more: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hwtest-redis-").tempdir_in("/var/tmp")?;
        let data = place.join("redis");
        fs::create_dir_all(&data)?;
        let log = File::create(dir.path().join("log"))?;
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
        command.args(more).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env(ENVIRONMENT, "1");
        let child = command.spawn().context("cannot start the server")?;
        let mut server = Self { child, dir };
        let until = Instant::now() + START_MAX;
        while !server.log().contains("ready to accept connections") {
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

    /// Fails if what it began with was not whole.
    ///
    /// # Errors
    /// It was not.
    pub fn judge(&self) -> Result<()> {
        let log = self.log();
        let bad = ["Bad file format", "runcated", "Short read", "rror", "orrupt"];
        let complaints: Vec<&str> = log.lines().filter(|l| bad.iter().any(|word| l.contains(word))).collect();
        ensure!(complaints.is_empty(), "the server complains: {}", complaints.join("\n"));
        Ok(())
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
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
    pub fn crash(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        crate::device::report(self.end());
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
