//! The collector that a test's machines share: its vault, its daemon, and what an operator asks of it.

use crate::{
    command,
    daemon::{Daemon, program},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const GUARD: Duration = Duration::from_secs(120);

/// See the module. Dropped: the daemon is killed, and its log judged.
pub struct Headquarters {
    dir: PathBuf,
    listen: SocketAddr,
    allowed: Vec<String>,
    /// Its daemon, while it runs.
    pub daemon: Option<Daemon>,
}

impl Headquarters {
    /// Makes a vault and starts a collector at this address.
    pub fn new(dir: &Path, host: Ipv4Addr) -> Result<Self> {
        let etc = dir.join("collector");
        let vault = dir.join("vault");
        run(
            "highwater-collector",
            &["init", "--dir", &text(&etc), "--vault", &text(&vault), "--name", &host.to_string()],
        )?;
        let config = etc.join("collector.toml");
        let mut lines: Vec<String> = (fs::read_to_string(&config)?.lines())
            .filter(|line| !line.contains("listen"))
            .map(str::to_owned)
            .collect();
        let listen = SocketAddr::from((host, 9443));
        lines.push(format!(
            "listen = \"{listen}\"\nmanagement-listen = \"{host}:8443\"\nmetrics-listen = \"{host}:9464\""
        ));
        lines.push(format!("state-dir = {:?}\ncommits-per-minute = 6000", etc.join("state")));
        fs::write(&config, lines.join("\n"))?;
        let mut new = Self { dir: dir.to_owned(), listen, allowed: vec![], daemon: None };
        new.start()?;
        Ok(new)
    }

    /// Starts the collector; it is ready on return.
    pub fn start(&mut self) -> Result<()> {
        let mut command = std::process::Command::new(program("highwater-collector")?);
        command.arg("run").arg("--config").arg(self.dir.join("collector/collector.toml"));
        let mut daemon = Daemon::spawn("collector", &self.dir, command)?;
        for text in &self.allowed {
            daemon.allow(text);
        }
        let until = Instant::now() + GUARD;
        while TcpStream::connect(self.listen).is_err() {
            ensure!(Instant::now() < until && daemon.is_running()?, "no collector:\n{}", daemon.log());
            thread::sleep(Duration::from_millis(10));
        }
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Kills the collector with no chance to do anything.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill_9())
    }

    /// Announces that the daemon may warn with this text, from now on.
    pub fn allow(&mut self, text: &str) {
        self.allowed.push(text.to_owned());
        if let Some(daemon) = &mut self.daemon {
            daemon.allow(text);
        }
    }

    /// Where machines enrol.
    #[must_use]
    pub fn management_url(&self) -> String {
        format!("https://{}:8443", self.listen.ip())
    }

    /// A token with which one machine enrols.
    pub fn token(&self) -> Result<String> {
        let config = text(&self.dir.join("collector/collector.toml"));
        let said = run("highwater-collector", &["token", "create", "--config", &config, "--json"])?;
        let said: Value = serde_json::from_str(&said)?;
        Ok(said["token"].as_str().context("no token")?.to_owned())
    }

    /// Runs `highwater` on the vault.
    pub fn operator(&self, args: &[&str]) -> Result<String> {
        let (vault, key) = (text(&self.dir.join("vault")), text(&self.dir.join("collector/vault.key")));
        let mut all = vec!["--vault", &vault, "--key", &key];
        all.extend(args);
        run("highwater", &all)
    }

    /// The same, as JSON; so is an error.
    pub fn asked(&self, args: &[&str]) -> Result<Value> {
        let mut command = std::process::Command::new(program("highwater")?);
        command.arg("--vault").arg(self.dir.join("vault"));
        command.arg("--key").arg(self.dir.join("collector/vault.key")).args(args).arg("--json");
        let out = command.output()?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(out.status.success(), "highwater {}: {said}", args.join(" "));
        Ok(serde_json::from_str(&said)?)
    }

    /// Makes a group of these machines.
    pub fn group(&self, name: &str, machines: &[&str], more: &[&str]) -> Result<()> {
        let mut args = vec!["group", "create", name];
        for id in machines {
            args.extend(["--machine", id]);
        }
        args.extend(more);
        self.operator(&args).map(drop)
    }

    /// The points of a group: each its marker, and its machines' own points.
    pub fn group_points(&self, name: &str) -> Result<Vec<Value>> {
        let said = self.asked(&["group", "points", name])?;
        Ok(said["points"].as_array().context("no points")?.clone())
    }
}

fn run(name: &str, args: &[&str]) -> Result<String> {
    command::run(&program(name)?.to_string_lossy(), args)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
