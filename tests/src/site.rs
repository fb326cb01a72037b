//! A whole installation for one test: a collector with its vault and an agent, as separate processes over real sockets,
//! and the operator's command.
//!
//! Every freeze of the agent is caught by a hook that copies the protected devices while they are frozen, so that each
//! recovery point can be compared byte for byte with what the device was.

use crate::{
    arena::Arena,
    command,
    compare::{compare_devices, copy_device, difference},
    daemon::{Daemon, free_port, program},
    free_space::only_free_differs,
    mount::FileSystem,
};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

mod watch;

pub use watch::write_all_within;

/// For what takes no time worth speaking of, on any machine: it only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(300);

/// What a test may choose.
#[derive(Debug, Clone)]
pub struct SiteOptions {
    /// `point-interval`; long by default, so that points are made when the test asks.
    pub point_interval: String,
    /// Lines for the agent's `[replication]`.
    pub replication: Vec<String>,
    /// Lines for `collector.toml`.
    pub collector: Vec<String>,
    /// Lines for the agent's `[tracking]`.
    pub tracking: Vec<String>,
    /// Lines for the agent's `[capture]`; it is off by default, so that tests of bitmap mode are such.
    pub capture: Vec<String>,
    /// Lines for the agent's `[limits]`.
    pub limits: Vec<String>,
    /// Lines for the agent's `[application]`. Its hooks lie in [`Site::hooks_dir`], wherever those of this machine lie.
    pub application: Vec<String>,
    /// Whether devices are copied while frozen.
    pub copy_frozen: bool,
    /// Where the agent connects, if not straight to the collector.
    pub through: Option<SocketAddr>,
    /// The collector's port, where something stands before it; free ones otherwise.
    pub ingest_port: Option<u16>,
    /// Where the vault lies, if not in the arena.
    pub vault: Option<PathBuf>,
    /// The bucket that it lies in, if it does.
    pub bucket: Option<String>,
    /// Where the agent keeps its state, if not in the arena.
    pub state_dir: Option<PathBuf>,
    /// Where all of it lies, if not in the arena itself: for a second site of one test.
    pub dir: Option<PathBuf>,
}

impl SiteOptions {
    /// With capture on, and a crash-consistent point so often (`5s`).
    #[must_use]
    pub fn ordered(point_interval: &str) -> Self {
        let capture = vec!["memory = \"256MiB\"".into(), format!("point-interval = \"{point_interval}\"")];
        Self { capture, ..Self::default() }
    }
}

impl Default for SiteOptions {
    fn default() -> Self {
        Self {
            point_interval: "1h".into(),
            replication: vec![],
            collector: vec![],
            tracking: vec![],
            capture: vec!["mode = \"off\"".into()],
            limits: vec![],
            application: vec![],
            copy_frozen: true,
            through: None,
            ingest_port: None,
            vault: None,
            bucket: None,
            state_dir: None,
            dir: None,
        }
    }
}

/// The installation. Dropped: both daemons are killed and their logs judged.
pub struct Site {
    dir: PathBuf,
    vault: PathBuf,
    /// As programs are told where it is.
    location: String,
    key: PathBuf,
    agent_config: PathBuf,
    agent_program: PathBuf,
    agent_variables: Vec<(&'static str, PathBuf)>,
    ingest: SocketAddr,
    management: u16,
    agent_metrics: u16,
    collector_metrics: u16,
    copies: CopiesDir,
    /// The agent, while it runs.
    pub agent: Option<Daemon>,
    /// The collector, while it runs.
    pub collector: Option<Daemon>,
    devices: BTreeMap<String, PathBuf>,
    allowed: Vec<String>,
}

impl Drop for Site {
    /// `HIGHWATER_TEST_LOGS=DIR` keeps the daemons' logs of the last site.
    fn drop(&mut self) {
        if let Some(to) = std::env::var_os("HIGHWATER_TEST_LOGS") {
            for name in ["agent.log", "collector.log"] {
                fs::copy(self.dir.join(name), Path::new(&to).join(name)).ok();
            }
        }
    }
}

/// Copies go to memory: the disk under test must not wait for them longer than needed.
struct CopiesDir(PathBuf);
impl Drop for CopiesDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

impl Site {
    /// Initialises and starts the collector, enrols the machine; the agent does not run yet.
    pub fn new(arena: &Arena, options: &SiteOptions) -> Result<Self> {
        let dir = options.dir.clone().unwrap_or_else(|| arena.dir().to_path_buf());
        let vault = options.vault.clone().unwrap_or_else(|| dir.join("vault"));
        let location = options.bucket.clone().unwrap_or_else(|| text(&vault));
        let [management, collector_metrics, agent_metrics] = [free_port()?, free_port()?, free_port()?];
        let ingest = options.ingest_port.map_or_else(free_port, Ok)?;
        let etc = dir.join("collector");
        let collector = program("highwater-collector")?;
        command::run(
            &collector.to_string_lossy(),
            &["init", "--dir", &text(&etc), "--vault", &location, "--name", "127.0.0.1"],
        )?;
        let config = etc.join("collector.toml");
        let mut lines: Vec<String> = (fs::read_to_string(&config)?.lines())
            .filter(|l| {
                !l.starts_with("listen")
                    && !l.starts_with("management-listen")
                    && !l.starts_with("metrics-listen")
            })
            .map(str::to_owned)
            .collect();
        lines.push(format!("listen = \"127.0.0.1:{ingest}\""));
        lines.push(format!("management-listen = \"127.0.0.1:{management}\""));
        lines.push(format!("metrics-listen = \"127.0.0.1:{collector_metrics}\""));
        lines.push(format!("state-dir = {:?}", etc.join("state")));
        lines.extend(options.collector.iter().cloned());
        fs::write(&config, lines.join("\n"))?;

        let copies = CopiesDir(PathBuf::from(format!("/dev/shm/hwtest-copies-{}", std::process::id())));
        fs::create_dir_all(&copies.0)?;
        let ingest = SocketAddr::from(([127, 0, 0, 1], ingest));
        let mut site = Self {
            vault,
            location,
            key: etc.join("vault.key"),
            agent_config: dir.join("agent.toml"),
            agent_program: program("highwater-agent")?,
            agent_variables: vec![],
            ingest,
            management,
            agent_metrics,
            collector_metrics,
            copies,
            agent: None,
            collector: None,
            devices: BTreeMap::new(),
            // How a killed agent looks from the other side, and a collector that is away.
            allowed: [
                "peer closed connection",
                "disconnected from the collector",
                "no connection to the collector",
            ]
            .map(String::from)
            .to_vec(),
            dir,
        };
        site.write_agent_config(arena, options, agent_metrics)?;
        site.start_collector()?;
        let (token, url) = (site.dir.join("token"), site.management_url());
        fs::write(&token, site.new_token()?)?;
        site.agent_command(&["enroll", &url, "--token-file", &text(&token)])?;
        Ok(site)
    }

    /// An enrolment token of this site's collector.
    pub fn new_token(&self) -> Result<String> {
        let config = text(&self.dir.join("collector/collector.toml"));
        let collector = program("highwater-collector")?;
        let said =
            command::run(&collector.to_string_lossy(), &["token", "create", "--config", &config, "--json"])?;
        let said: Value = serde_json::from_str(&said)?;
        Ok(said["token"].as_str().context("no token")?.to_owned())
    }

    /// Where machines enrol.
    pub fn management_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.management)
    }

    /// The agent's configuration.
    pub fn agent_config(&self) -> &Path {
        &self.agent_config
    }

    fn write_agent_config(&self, arena: &Arena, options: &SiteOptions, metrics: u16) -> Result<()> {
        let mut toml = String::new();
        let state = options.state_dir.clone().unwrap_or_else(|| self.dir.join("state"));
        writeln!(toml, "state-dir = {:?}\nrun-dir = {:?}", state, self.dir.join("run"))?;
        writeln!(toml, "bpf-dir = {:?}\nmetrics-listen = \"127.0.0.1:{metrics}\"", arena.bpf_dir())?;
        if let Some(through) = options.through {
            writeln!(toml, "[collector]\nendpoint = \"{through}\"\nserver-name = \"127.0.0.1\"")?;
        }
        writeln!(
            toml,
            "[replication]\npoint-interval = \"{}\"\nretry-unit = \"20ms\"",
            options.point_interval
        )?;
        if !options.replication.iter().any(|line| line.starts_with("compare-rate")) {
            // Tests count what is read and asked.
            writeln!(toml, "compare-rate = \"0B\"")?;
        }
        for line in &options.replication {
            writeln!(toml, "{line}")?;
        }
        writeln!(toml, "[tracking]")?;
        for line in &options.tracking {
            writeln!(toml, "{line}")?;
        }
        writeln!(toml, "[capture]")?;
        for line in &options.capture {
            writeln!(toml, "{line}")?;
        }
        writeln!(toml, "[application]\nhooks-dir = {:?}", self.hooks_dir())?;
        for line in &options.application {
            writeln!(toml, "{line}")?;
        }
        writeln!(toml, "[limits]")?;
        for line in &options.limits {
            writeln!(toml, "{line}")?;
        }
        if options.copy_frozen {
            writeln!(toml, "[freeze-hook]\ncommand = [{:?}]", self.dir.join("hook"))?;
        }
        fs::write(&self.agent_config, toml)?;
        self.write_hook()
    }

    /// Copies every protected device while it is frozen, into a directory named by the time.
    fn write_hook(&self) -> Result<()> {
        let mut script = String::from("#!/bin/sh\n[ \"$1\" = frozen ] || exit 0\nset -e\n");
        writeln!(script, "d={}/$(date +%s%3N)\nmkdir -p $d.new", self.copies.0.display())?;
        for (name, device) in &self.devices {
            writeln!(
                script,
                "dd if={} of=$d.new/{name} bs=1M iflag=direct conv=sparse status=none",
                device.display()
            )?;
            writeln!(script, "truncate -s $(blockdev --getsize64 {}) $d.new/{name}", device.display())?;
        }
        script.push_str("mv $d.new $d\n");
        let (new, hook) = (self.dir.join("hook.new"), self.dir.join("hook"));
        fs::write(&new, script)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::rename(new, hook)?;
        Ok(())
    }

    /// Announces that both daemons may warn with this text, from now on.
    pub fn allow(&mut self, text: &str) {
        self.allowed.push(text.to_owned());
        for daemon in [&mut self.agent, &mut self.collector].into_iter().flatten() {
            daemon.allow(text);
        }
    }

    /// Starts the collector; it is ready on return.
    pub fn start_collector(&mut self) -> Result<()> {
        let mut command = Command::new(program("highwater-collector")?);
        command.arg("run").arg("--config").arg(self.dir.join("collector/collector.toml"));
        let mut daemon = Daemon::spawn("collector", &self.dir, command)?;
        for text in &self.allowed {
            daemon.allow(text);
        }
        let until = Instant::now() + GUARD;
        while std::net::TcpStream::connect(self.ingest).is_err() {
            ensure!(
                Instant::now() < until && daemon.is_running()?,
                "the collector did not start:\n{}",
                daemon.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
        self.collector = Some(daemon);
        Ok(())
    }

    /// Uses another executable of the agent from its next start on.
    pub fn use_agent_program(&mut self, path: &Path) {
        self.agent_program = path.to_path_buf();
    }

    /// Gives the agent an environment variable from its next start on.
    pub fn agent_variable(&mut self, name: &'static str, value: &Path) {
        self.agent_variables.push((name, value.to_path_buf()));
    }

    /// Starts the agent; its control socket answers on return.
    pub fn start_agent(&mut self) -> Result<()> {
        self.spawn_agent()?;
        let until = Instant::now() + GUARD;
        while self.status().is_err() {
            let agent = self.agent.as_mut().context("no agent")?;
            ensure!(
                Instant::now() < until && agent.is_running()?,
                "the agent did not start:\n{}",
                agent.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Starts the agent and does not wait.
    pub fn spawn_agent(&mut self) -> Result<()> {
        let mut command = Command::new(&self.agent_program);
        command.arg("--config").arg(&self.agent_config).arg("run");
        command.envs(self.agent_variables.iter().map(|(name, value)| (name, value)));
        let mut daemon = Daemon::spawn("agent", &self.dir, command)?;
        for text in &self.allowed {
            daemon.allow(text);
        }
        self.agent = Some(daemon);
        Ok(())
    }

    /// Kills the agent with no chance to do anything. Its guardian lives until it has thawed.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.agent.take().map_or(Ok(()), |mut a| a.kill_9())
    }
    /// Kills the collector likewise.
    pub fn kill_collector(&mut self) -> Result<()> {
        self.collector.take().map_or(Ok(()), |mut c| c.kill_9())
    }
    /// Stops the collector for a while, or lets it go on.
    pub fn signal_collector(&self, signal: Signal) -> Result<()> {
        self.collector.as_ref().map_or(Ok(()), |collector| collector.signal(signal))
    }
    /// Asks the agent to stop, and judges its log.
    pub fn stop_agent(&mut self) -> Result<()> {
        self.agent.take().map_or(Ok(()), Daemon::stop)
    }

    /// Where agents connect.
    pub fn ingest(&self) -> SocketAddr {
        self.ingest
    }
    /// Where the agent tells its metrics.
    pub fn agent_metrics(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.agent_metrics))
    }
    /// Where the collector tells its metrics.
    pub fn collector_metrics(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.collector_metrics))
    }
    /// The agent's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }
    /// The vault's directory, if it is one.
    pub fn vault(&self) -> &Path {
        &self.vault
    }
    /// The vault's key.
    pub fn key(&self) -> &Path {
        &self.key
    }

    /// Runs `highwater-agent` with this site's configuration.
    pub fn agent_command(&self, args: &[&str]) -> Result<String> {
        let config = text(&self.agent_config);
        let mut all = vec!["--config", &config];
        all.extend(args);
        command::run(&self.agent_program.to_string_lossy(), &all)
    }
    /// Starts an agent's command that lasts; it ends with the agent at the latest.
    pub fn agent_command_started(&self, args: &[&str]) -> Result<std::process::Child> {
        let mut command = Command::new(&self.agent_program);
        command.arg("--config").arg(&self.agent_config).args(args);
        Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
    }
    /// Runs `highwater` on this site's vault, collector or no.
    pub fn operator(&self, args: &[&str]) -> Result<String> {
        let key = text(&self.key);
        let mut all = vec!["--vault", &self.location, "--key", &key];
        all.extend(args);
        command::run(&program("highwater")?.to_string_lossy(), &all)
    }

    /// What the agent says of itself.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.agent_command(&["status", "--json"])?)?)
    }
    /// What it says of one disk.
    pub fn disk_status(&self, name: &str) -> Result<Value> {
        let status = self.status()?;
        let disks = status["disks"].as_array().context("no disks")?;
        disks.iter().find(|d| d["name"] == name).cloned().with_context(|| format!("no disk {name}"))
    }

    /// Protects a device under a name.
    pub fn protect(&mut self, device: &Path, name: &str) -> Result<()> {
        self.devices.insert(name.to_owned(), device.to_path_buf());
        self.write_hook()?;
        self.agent_command(&["protect", &text(device), "--name", name])?;
        Ok(())
    }

    /// Waits until a disk is in a state.
    pub fn wait_state(&self, name: &str, state: &str, timeout: Duration) -> Result<()> {
        let until = Instant::now() + timeout;
        loop {
            let disk = self.disk_status(name)?;
            if disk["state"] == state {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("disk {name} is not {state} after {timeout:?}: {disk:#}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
    /// Waits until all disks are replicated in the order of their writes.
    pub fn wait_ordered(&self) -> Result<()> {
        self.devices.keys().try_for_each(|name| self.wait_state(name, "write-ordered", GUARD))
    }
    /// Waits until the first copy of all disks is complete.
    pub fn wait_replicated(&self) -> Result<()> {
        self.devices.keys().try_for_each(|name| self.wait_state(name, "bitmap", GUARD))
    }

    /// Makes a point and waits until it is stored; answers its number. Retries while the connection comes and goes.
    pub fn point(&self) -> Result<u64> {
        self.point_within(GUARD)
    }
    /// Where the agent looks for the applications' hooks. It is not there at first.
    pub fn hooks_dir(&self) -> PathBuf {
        self.dir.join("freeze-hook.d")
    }
    /// The same, with a limit of one's own.
    pub fn point_within(&self, limit: Duration) -> Result<u64> {
        let until = Instant::now() + limit;
        loop {
            match self.agent_command(&["point"]) {
                Ok(said) => {
                    let number = said.split_ascii_whitespace().find_map(|w| w.parse().ok());
                    return number.with_context(|| format!("no number in: {said}"));
                }
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// The points in the vault: number, and when each was taken (ms since 1970).
    pub fn points(&self) -> Result<Vec<(u64, u64)>> {
        let machine = self.machine()?;
        let said: Value = serde_json::from_str(&self.operator(&["points", &machine, "--json"])?)?;
        let rows = said["points"].as_array().context("no points")?;
        rows.iter()
            .map(|p| Ok((p["point"].as_u64().context("number")?, p["taken-at-ms"].as_u64().context("time")?)))
            .collect()
    }
    /// The machine's id.
    pub fn machine(&self) -> Result<String> {
        let said: Value = serde_json::from_str(&self.operator(&["machines", "--json"])?)?;
        Ok(said["machines"][0]["machine"].as_str().context("no machine")?.to_owned())
    }

    /// Recovers a point into a new directory; answers the images by disk name.
    pub fn recover(&self, point: u64) -> Result<Recovered> {
        let dir = tempfile::Builder::new().prefix("hwtest-recovered-").tempdir_in("/dev/shm")?;
        let machine = self.machine()?;
        self.operator(&["recover", &machine, "--point", &point.to_string(), "--to", &text(dir.path())])?;
        Ok(Recovered(dir))
    }

    /// The copy that was made while the filesystems were frozen for this point.
    fn frozen_copy(&self, point: u64) -> Result<PathBuf> {
        let points = self.points()?;
        let taken = points.iter().find(|p| p.0 == point).with_context(|| format!("no point {point}"))?.1;
        let mut copies: Vec<u64> = fs::read_dir(&self.copies.0)?
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        copies.sort_unstable();
        let copy =
            copies.into_iter().find(|c| *c >= taken).with_context(|| format!("no copy of point {point}"))?;
        Ok(self.copies.0.join(copy.to_string()))
    }

    /// Recovers a point and compares every disk of it, byte for byte, with the copy made under its freeze.
    pub fn assert_exact(&self, point: u64) -> Result<()> {
        let compared = self.exact_disks(point)?;
        ensure!(compared == self.devices.len(), "point {point} has only {compared} disks");
        Ok(())
    }

    /// Answers how many disks the point has, all of them exact.
    fn exact_disks(&self, point: u64) -> Result<usize> {
        self.compare(point, |frozen, recovered, differing| {
            let Some(first) = differing.first() else { return Ok(()) };
            bail!(
                "{} blocks differ from the frozen device, the first: {:?}; in it {}",
                differing.len(),
                &differing[..differing.len().min(8)],
                difference(frozen, recovered, *first)?
            );
        })
    }

    /// The same for disks with a file system, of whose free space it is told only how many blocks differ (see [`free_space`]).
    ///
    /// [`free_space`]: crate::free_space
    pub fn assert_exact_in_use(&self, point: u64, kind: FileSystem) -> Result<usize> {
        let mut free = 0;
        let compared = self.compare(point, |frozen, recovered, differing| {
            free += only_free_differs(kind, frozen, recovered, differing)?;
            Ok(())
        })?;
        ensure!(compared == self.devices.len(), "point {point} has only {compared} disks");
        Ok(free)
    }

    /// Hands over the frozen copy and the recovered image of each disk, and the blocks that differ. Answers how many disks the point has.
    fn compare(&self, point: u64, mut each: impl FnMut(&Path, &Path, &[u64]) -> Result<()>) -> Result<usize> {
        let recovered = self.recover(point)?;
        let copy = self.frozen_copy(point)?;
        let in_point: Vec<&String> = self.devices.keys().filter(|n| recovered.image(n).exists()).collect();
        for name in &in_point {
            let (frozen, image) = (copy.join(name), recovered.image(name));
            let differing = compare_devices(&frozen, &image, &[])?;
            each(&frozen, &image, &differing).with_context(|| format!("point {point}, disk {name}"))?;
        }
        Ok(in_point.len())
    }

    /// Forgets the copies made so far (they lie in memory).
    pub fn forget_copies(&self) -> Result<()> {
        for entry in fs::read_dir(&self.copies.0)? {
            fs::remove_dir_all(entry?.path())?;
        }
        Ok(())
    }

    /// A copy of a device that the test itself holds still.
    pub fn copy_now(&self, name: &str) -> Result<PathBuf> {
        let to = self.copies.0.join(format!("now-{name}"));
        copy_device(&self.devices[name], &to)?;
        Ok(to)
    }

    /// Everything in the vault is authentic and whole.
    pub fn verify(&self) -> Result<()> {
        self.operator(&["verify"]).map(drop)
    }
}

/// What was recovered; gone when dropped.
pub struct Recovered(tempfile::TempDir);

impl Recovered {
    /// The image of a disk.
    pub fn image(&self, name: &str) -> PathBuf {
        self.0.path().join(format!("{name}.img"))
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
