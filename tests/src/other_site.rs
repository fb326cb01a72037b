//! A collector of another site, as a process, that keeps the vault of the one under test.

use crate::command;
use crate::daemon::{Daemon, free_port, program};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(300);

/// Killed when it is dropped, and its log judged.
pub struct OtherSite {
    dir: PathBuf,
    ingest: SocketAddr,
    relay: String,
    daemon: Option<Daemon>,
    allowed: Vec<String>,
}

impl OtherSite {
    /// Makes and starts one in a directory, and joins it.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::start_at(dir, &text(&dir.join("vault")))
    }

    /// The same with its own vault at some location.
    pub fn start_at(dir: &Path, vault: &str) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let collector = text(&program("highwater-collector")?);
        let etc = text(&dir.join("etc"));
        command::run(&collector, &["init", "--dir", &etc, "--vault", vault, "--name", "127.0.0.1"])?;
        let [ingest, management, metrics] = [free_port()?, free_port()?, free_port()?];
        let config = dir.join("etc/collector.toml");
        let ports = format!(
            "\nlisten = \"127.0.0.1:{ingest}\"\nmanagement-listen = \"127.0.0.1:{management}\"\nmetrics-listen = \"127.0.0.1:{metrics}\"\n"
        );
        fs::write(&config, fs::read_to_string(&config)? + &ports)?;
        let ingest = SocketAddr::from(([127, 0, 0, 1], ingest));
        let mut site =
            Self { dir: dir.to_path_buf(), ingest, relay: String::new(), daemon: None, allowed: vec![] };
        site.restart()?;
        let config = text(&config);
        let token = command::run(&collector, &["--json", "relay", "token", "--config", &config])?;
        let token: Value = serde_json::from_str(&token)?;
        let file = dir.join("token");
        fs::write(&file, token["token"].as_str().context("no token")?)?;
        let (url, file, identity) =
            (format!("https://127.0.0.1:{management}"), text(&file), text(&dir.join("identity")));
        let join = ["--json", "relay", "join", &url, "--token-file", &file, "--identity", &identity];
        let joined: Value = serde_json::from_str(&command::run(&collector, &join)?)?;
        site.relay = joined["relay"].as_str().context("no relay")?.to_owned();
        Ok(site)
    }

    /// Where a vault lies that it keeps, reached through an address.
    #[must_use]
    pub fn location(&self, through: SocketAddr, prefix: &str) -> String {
        format!("highwater://{through}{prefix}?identity={}", self.dir.join("identity").display())
    }

    /// Where it listens for machines and relays.
    #[must_use]
    pub const fn ingest(&self) -> SocketAddr {
        self.ingest
    }

    /// The directory of what it keeps, if its own vault lies in one.
    #[must_use]
    pub fn kept(&self) -> PathBuf {
        self.dir.join("vault/relays").join(&self.relay)
    }

    /// Runs `highwater-collector` with its configuration.
    pub fn command(&self, args: &[&str]) -> Result<String> {
        let config = text(&self.dir.join("etc/collector.toml"));
        let all = [args, &["--config", &config]].concat();
        command::run(&text(&program("highwater-collector")?), &all)
    }

    /// Announces that it may warn with this text, from now on.
    pub fn allow(&mut self, text: &str) {
        self.allowed.push(text.to_owned());
        if let Some(daemon) = &mut self.daemon {
            daemon.allow(text);
        }
    }

    /// Kills it with no chance to do anything.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill_9())
    }

    /// Starts it again; it is ready on return.
    pub fn restart(&mut self) -> Result<()> {
        let mut command = Command::new(program("highwater-collector")?);
        command.arg("run").arg("--config").arg(self.dir.join("etc/collector.toml"));
        let mut daemon = Daemon::spawn("other-site", &self.dir, command)?;
        // What a client that is cut off, or one whose upload was interrupted by a kill, looks like from here.
        for expected in ["code=HW-1611", "code=HW-1607"] {
            daemon.allow(expected);
        }
        for text in &self.allowed {
            daemon.allow(text);
        }
        let until = Instant::now() + GUARD;
        while TcpStream::connect(self.ingest).is_err() {
            ensure!(Instant::now() < until && daemon.is_running()?, "it did not start:\n{}", daemon.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.daemon = Some(daemon);
        Ok(())
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
