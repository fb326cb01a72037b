//! A second collector, as a process, of the same vault as a site's own.

use crate::daemon::{Daemon, free_port, program};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(300);

/// Killed when it is dropped, and its log judged.
pub struct Twin {
    dir: PathBuf,
    ingest: SocketAddr,
    metrics: SocketAddr,
    allowed: Vec<String>,
    daemon: Option<Daemon>,
}

impl Twin {
    /// Starts one in a directory, with the configuration of a site's collector but for its ports. Nothing else has to be done: the vault
    /// holds all that both need.
    pub fn start(dir: &Path, config: &Path, allowed: &[&str]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let [ingest, management, metrics] = [free_port()?, free_port()?, free_port()?];
        let text = fs::read_to_string(config)?;
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| !line.contains("listen = ") && !line.starts_with("state-dir"))
            .map(str::to_owned)
            .collect();
        lines.push(format!("state-dir = {:?}", dir.join("state")));
        for (name, port) in
            [("listen", ingest), ("management-listen", management), ("metrics-listen", metrics)]
        {
            lines.push(format!("{name} = \"127.0.0.1:{port}\""));
        }
        fs::write(dir.join("collector.toml"), lines.join("\n"))?;
        let [ingest, metrics] = [ingest, metrics].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let allowed = allowed.iter().map(|text| (*text).to_owned()).collect();
        let mut twin = Self { dir: dir.to_path_buf(), ingest, metrics, allowed, daemon: None };
        twin.restart()?;
        Ok(twin)
    }

    /// Where it listens for machines.
    #[must_use]
    pub const fn ingest(&self) -> SocketAddr {
        self.ingest
    }
    /// Where it tells its metrics.
    #[must_use]
    pub const fn metrics(&self) -> SocketAddr {
        self.metrics
    }
    /// All that it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.as_ref().map(Daemon::log).unwrap_or_default()
    }

    /// Stops it for a while, or lets it go on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.daemon.as_ref().map_or(Ok(()), |daemon| daemon.signal(signal))
    }
    /// Kills it with no chance to do anything.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill_9())
    }
    /// Starts it again; it is ready on return.
    pub fn restart(&mut self) -> Result<()> {
        let mut command = Command::new(program("highwater-collector")?);
        command.arg("run").arg("--config").arg(self.dir.join("collector.toml"));
        let mut daemon = Daemon::spawn("twin", &self.dir, command)?;
        for text in &self.allowed {
            daemon.allow(text);
        }
        let until = Instant::now() + GUARD;
        while TcpStream::connect(self.ingest).is_err() {
            ensure!(Instant::now() < until && daemon.is_running()?, "it did not start:\n{}", daemon.log());
            thread::sleep(Duration::from_millis(10));
        }
        self.daemon = Some(daemon);
        Ok(())
    }
    /// Asks it to stop, and judges its log.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.take().context("it does not run")?.stop()
    }
}
