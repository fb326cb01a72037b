//! A database server of a test: started, waited for, held to what it logs, and ended as by a crash. What it serves lies elsewhere; its socket, its log
//! and what tells clients of it lie in a directory of its own.

use crate::{census::ENVIRONMENT, device::report};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Much longer than either takes.
const START_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(20);

/// See the module. Dropped: ended.
pub struct Server {
    child: Child,
    dir: TempDir,
    end: Signal,
}

impl Server {
    /// A directory for one of this kind.
    pub fn directory(kind: &str) -> Result<TempDir> {
        Ok(tempfile::Builder::new().prefix(&format!("hwtest-{kind}-")).tempdir_in("/var/tmp")?)
    }

    /// Starts it; it has logged this on return. `end`: the signal at which it leaves at once, and writes nothing more.
    pub fn start(dir: TempDir, mut command: Command, ready: &str, end: Signal) -> Result<Self> {
        let log = File::create(dir.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env(ENVIRONMENT, "1");
        let child = command
            .spawn()
            .context("cannot start the server: is it installed (cargo xtask setup --for test)?")?;
        let mut server = Self { child, dir, end };
        let until = Instant::now() + START_MAX;
        while !server.log().contains(ready) {
            let ended = server.child.try_wait()?;
            if ended.is_some() || Instant::now() > until {
                bail!("the server did not start ({ended:?}):\n{}", server.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// All it has logged since it was started.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Fails if it has logged a line with one of these.
    ///
    /// # Errors
    /// It has.
    pub fn judge(&self, bad: &[&str]) -> Result<()> {
        let log = self.log();
        let complaints: Vec<&str> = log.lines().filter(|l| bad.iter().any(|word| l.contains(word))).collect();
        ensure!(complaints.is_empty(), "the server complains: {}", complaints.join("\n"));
        Ok(())
    }

    /// Has it stand still, or go on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Ends it as a crash would.
    pub fn crash(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        self.signal(self.end)?;
        let until = Instant::now() + STOP_MAX;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                self.child.kill()?;
                self.child.wait()?;
                bail!("the server did not end");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        report(self.end());
    }
}
