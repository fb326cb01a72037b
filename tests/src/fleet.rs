//! Several machines of one collector, each with an agent in a network of its own and a disk with a file system.

use crate::{
    Arena, Backing, FileSystem, Headquarters, Lan, LoopDisk, Mounted,
    daemon::{Daemon, program},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const GUARD: Duration = Duration::from_secs(120);

/// What agents and collector may warn of while machines are killed, cut off and slowed.
pub const DISTURBED: &[&str] = &[
    "HW-1101",
    "HW-1102",
    "HW-1104",
    "HW-1307",
    "HW-1376",
    "HW-1430",
    "HW-1433",
    "HW-1434",
    "HW-1458",
    "HW-1463",
    "HW-1465",
    "HW-1475",
    "HW-1485",
    "HW-1489",
    "HW-1494",
    "session ended",
    "no recovery point this time",
    "thawed by the guardian",
];
/// Whenever a connection ends.
pub const DISCONNECTED: [&str; 3] =
    ["peer closed connection", "disconnected from the collector", "no connection to the collector"];

/// What a test may choose.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// Machines.
    pub machines: usize,
    /// Of each disk.
    pub disk_bytes: u64,
    /// Machines in write-ordered mode; the others are in bitmap mode.
    pub ordered: Vec<usize>,
    /// What the agents log, as `HIGHWATER_LOG`.
    pub log: Option<&'static str>,
    /// More lines for each agent's configuration, by machine.
    pub agent: fn(usize) -> String,
}

impl Default for FleetOptions {
    fn default() -> Self {
        Self { machines: 5, disk_bytes: 64 << 20, ordered: vec![], log: None, agent: |_| String::new() }
    }
}

/// A machine.
pub struct Node {
    dir: PathBuf,
    /// Its id, once enrolled.
    pub id: String,
    /// Its file system.
    pub mounted: Mounted,
    disk: LoopDisk,
    /// Its agent, while it runs.
    pub agent: Option<Daemon>,
}

/// See the module. Dropped: all daemons are killed, and their logs judged.
pub struct Fleet {
    dir: PathBuf,
    /// All machines.
    pub nodes: Vec<Node>,
    /// Their collector.
    pub hq: Headquarters,
    allowed: Vec<String>,
    log: Option<&'static str>,
    /// The network between them.
    pub lan: Lan,
}

impl Fleet {
    /// Starts collector and agents, and waits until all disks are replicated.
    pub fn new(arena: &Arena, options: &FleetOptions) -> Result<Self> {
        let lan = Lan::new(options.machines)?;
        let mut hq = Headquarters::new(arena.dir(), lan.host())?;
        DISCONNECTED.iter().for_each(|text| hq.allow(text));
        let mut fleet = Self {
            dir: arena.dir().to_owned(),
            nodes: vec![],
            hq,
            allowed: DISCONNECTED.map(String::from).to_vec(),
            log: options.log,
            lan,
        };
        for at in 0..options.machines {
            fleet.add(arena, options, at)?;
        }
        for at in 0..options.machines {
            let state = if options.ordered.contains(&at) { "write-ordered" } else { "bitmap" };
            fleet.wait_state(at, state)?;
        }
        Ok(fleet)
    }

    fn add(&mut self, arena: &Arena, options: &FleetOptions, at: usize) -> Result<()> {
        let dir = self.dir.join(format!("m{at}"));
        fs::create_dir(&dir)?;
        let disk = LoopDisk::new(Backing::Tmpfs, options.disk_bytes)?;
        let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
        let mut toml = String::new();
        writeln!(toml, "state-dir = {:?}\nrun-dir = {:?}", dir.join("state"), dir.join("run"))?;
        writeln!(toml, "bpf-dir = {:?}", arena.bpf_dir().join(format!("m{at}")))?;
        writeln!(
            toml,
            "[replication]\npoint-interval = \"1h\"\nretry-unit = \"20ms\"\ncompare-rate = \"0B\""
        )?;
        if options.ordered.contains(&at) {
            writeln!(toml, "[capture]\nmemory = \"64MiB\"\npoint-interval = \"2s\"")?;
        } else {
            writeln!(toml, "[capture]\nmode = \"off\"")?;
        }
        writeln!(toml, "[application]\nhooks-dir = {:?}", dir.join("freeze-hook.d"))?;
        toml.push_str(&(options.agent)(at));
        fs::write(dir.join("agent.toml"), toml)?;
        fs::write(dir.join("token"), self.hq.token()?)?;
        self.nodes.push(Node { dir, id: String::new(), mounted, disk, agent: None });
        let (url, token) = (self.hq.management_url(), text(&self.nodes[at].dir.join("token")));
        self.agent(at, &["enroll", &url, "--token-file", &token])?;
        self.start_agent(at)?;
        let device = text(self.nodes[at].disk.path());
        self.agent(at, &["protect", &device, "--name", "data"])?;
        self.nodes[at].id = self.status(at)?["machine"].as_str().context("no machine")?.to_owned();
        Ok(())
    }

    /// Starts a machine's agent; its control socket answers on return.
    pub fn start_agent(&mut self, at: usize) -> Result<()> {
        let agent = program("highwater-agent")?;
        let mut command = self.lan.command(at, &text(&agent));
        command.arg("--config").arg(self.nodes[at].dir.join("agent.toml")).arg("run");
        command.envs(self.log.map(|log| ("HIGHWATER_LOG", log)));
        let mut daemon = Daemon::spawn("agent", &self.nodes[at].dir, command)?;
        for text in &self.allowed {
            daemon.allow(text);
        }
        self.nodes[at].agent = Some(daemon);
        let until = Instant::now() + GUARD;
        while self.status(at).is_err() {
            let agent = self.nodes[at].agent.as_mut().context("no agent")?;
            ensure!(Instant::now() < until && agent.is_running()?, "no agent:\n{}", agent.log());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Kills a machine's agent with no chance to do anything.
    pub fn kill_agent(&mut self, at: usize) -> Result<()> {
        self.nodes[at].agent.take().map_or(Ok(()), |mut agent| agent.kill_9())
    }

    /// Announces that daemons may warn with this text, from now on.
    pub fn allow(&mut self, text: &str) {
        self.allowed.push(text.to_owned());
        let agents = self.nodes.iter_mut().filter_map(|node| node.agent.as_mut());
        agents.for_each(|agent| {
            agent.allow(text);
        });
        self.hq.allow(text);
    }

    /// Runs `highwater-agent` on a machine.
    pub fn agent(&self, at: usize, args: &[&str]) -> Result<String> {
        let mut command = self.lan.command(at, &text(&program("highwater-agent")?));
        command.arg("--config").arg(self.nodes[at].dir.join("agent.toml")).args(args);
        let out = command.output()?;
        ensure!(out.status.success(), "{args:?} on machine {at}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }

    /// What a machine's agent says of itself.
    pub fn status(&self, at: usize) -> Result<Value> {
        Ok(serde_json::from_str(&self.agent(at, &["status", "--json"])?)?)
    }

    /// What a machine's agent has logged.
    #[must_use]
    pub fn agent_log(&self, at: usize) -> String {
        fs::read_to_string(self.nodes[at].dir.join("agent.log")).unwrap_or_default()
    }

    /// A machine's hooks of applications; the directory is not there at first.
    #[must_use]
    pub fn hooks_dir(&self, at: usize) -> PathBuf {
        self.nodes[at].dir.join("freeze-hook.d")
    }

    /// Has the kernel count a disk's I/O, or not.
    pub fn count_io(&self, at: usize, count: bool) -> Result<()> {
        let name = self.nodes[at].disk.path().file_name().context("a device has a name")?;
        let path = Path::new("/sys/block").join(name).join("queue/iostats");
        Ok(fs::write(path, if count { "1" } else { "0" })?)
    }

    /// Waits until a machine's disk is in a state.
    pub fn wait_state(&self, at: usize, state: &str) -> Result<()> {
        self.wait(at, &format!("the disk being {state}"), |status| status["disks"][0]["state"] == state)
    }

    /// Waits until a machine's status is as wanted.
    pub fn wait(&self, at: usize, what: &str, is: impl Fn(&Value) -> bool) -> Result<()> {
        let until = Instant::now() + GUARD;
        loop {
            let status = self.status(at)?;
            if is(&status) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "machine {at}: waited in vain for {what}: {status:#}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Makes a group of these machines.
    pub fn group(&self, name: &str, machines: &[usize], more: &[&str]) -> Result<()> {
        let ids: Vec<&str> = machines.iter().map(|at| self.nodes[*at].id.as_str()).collect();
        self.hq.group(name, &ids, more)
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
