//! The agent's configuration: TOML, kebab-case, human units, a default for everything. Unknown keys are refused.
//!
//! [`Config::parse`] reports *all* problems of a file, each with its line, not only the first.

mod capture;
mod guest;
mod reader;

pub use capture::{Capture, CaptureMode};
pub use guest::Guest;

pub use crate::{
    engine::OnHookFailure,
    units::{Bandwidth, ByteSize, Interval},
};

use crate::error::Coded;
use reader::Reader;
use serde::Serialize;
use std::{
    fmt, fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Far more than any configuration; bounds what a wrong path can make the agent read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// What must outlive reboots: identity, disks, progress.
    pub state_dir: PathBuf,
    /// Sockets and records of the running agent; on a tmpfs.
    pub run_dir: PathBuf,
    /// Where programs and maps are pinned; on bpffs.
    pub bpf_dir: PathBuf,
    /// The guardian's program; by default beside the agent's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guardian_path: Option<PathBuf>,
    /// Where Prometheus scrapes.
    pub metrics_listen: SocketAddr,
    /// Logging.
    pub log: Log,
    /// Where to send.
    pub collector: Collector,
    /// How to replicate.
    pub replication: Replication,
    /// How writes are tracked.
    pub tracking: Tracking,
    /// How writes are captured in their order.
    pub capture: Capture,
    /// What to run around a freeze.
    pub freeze_hook: FreezeHook,
    /// How applications are made to stand still.
    pub application: Application,
    /// Where the other members of a group call.
    pub group: Group,
    /// How long others may take.
    pub limits: Limits,
    /// Guests of this KVM host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub guest: Vec<Guest>,
}

/// Where the other members of a replication group call. Nothing listens while the machine belongs to none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Group {
    /// Address and port.
    pub listen: SocketAddr,
    /// Name or address that the others call; by default the one from which the agent reaches its collector.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
}

impl Default for Group {
    fn default() -> Self {
        Self { listen: (Ipv4Addr::UNSPECIFIED, 20004).into(), advertise: None }
    }
}

/// How long others may take before something is done about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Limits {
    /// A collector that says nothing for so long is gone; it is asked three times as often.
    pub silence: Interval,
    /// A collector that lives and takes no chunk over for so long is given up.
    pub stall: Interval,
    /// A collector that lives and does not store what it took for so long is given up.
    pub stored: Interval,
    /// An engine that is not heard of for so long, without a reason that it gave, hangs: systemd's watchdog is fed no more.
    pub hang: Interval,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: Interval(Duration::from_secs(15)),
            stall: Interval(Duration::from_secs(180)),
            stored: Interval(Duration::from_secs(600)),
            hang: Interval(Duration::from_secs(30)),
        }
    }
}

/// Logging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Log {
    /// How lines look.
    pub format: LogFormat,
    /// From which severity on: `error`, `warn`, `info`, `debug`, `trace`, `off`.
    pub level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// Where to send.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Collector {
    /// `host:port`; enrolment sets it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The name in the collector's certificate, if it is not the endpoint's host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

/// How to replicate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Replication {
    /// Between recovery points.
    pub point_interval: Interval,
    /// Longest freeze; the guardian thaws after it.
    pub freeze_deadline: Interval,
    /// Most data read under a freeze.
    pub freeze_budget: ByteSize,
    /// Most rounds before a freeze; a disk that still has more than the budget then gets no point.
    pub rounds_max: u32,
    /// Of zstd, -7 to 19.
    pub compression_level: i32,
    /// Reads at once of each disk.
    pub readers: u32,
    /// Bound of all buffers.
    pub memory: ByteSize,
    /// Of all disks together, per second.
    pub bandwidth: Bandwidth,
    /// A long round is stored in parts of this size, so that an interruption loses little.
    pub partial_commit: ByteSize,
    /// The longest wait between attempts to reach a collector that does not answer; one that refuses is asked after five of
    /// these.
    pub retry_unit: Interval,
    /// What happens to a disk whose tracking is in doubt.
    pub resync: Resync,
    /// How much of the disks is compared with the vault each second, for ever; `0B`: nothing.
    pub compare_rate: ByteSize,
}

/// What happens to a disk whose tracking is in doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resync {
    /// It is compared with the vault at once; only differences are sent.
    #[default]
    Automatic,
    /// It stays suspect, without recovery points, until an operator asks for the comparison.
    Manual,
}

/// How writes are tracked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Tracking {
    /// Copies of each program; by default what the kernel needs. For tests of the proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
    /// Whether issues are noted too, so that a completion that the kernel does not show to tracing programs is found all the
    /// same. Costs a little for each write; without it such a write makes the disk suspect.
    pub net: bool,
    /// Bound of one disk's bitmaps (three of them); beyond it a bit stands for more than 4 KiB.
    pub bitmap_memory: ByteSize,
}

impl Default for Tracking {
    fn default() -> Self {
        Self { copies: None, net: true, bitmap_memory: ByteSize(96 << 20) }
    }
}

/// How applications are made to stand still for a point: by hooks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Application {
    /// Where the hooks lie.
    pub hooks_dir: PathBuf,
    /// Between application-consistent points, where there are hooks.
    pub interval: Interval,
    /// One call of a hook may take so long.
    pub hook_timeout: Interval,
    /// Applications stand still for so long at most.
    pub hold: Interval,
    /// What a hook that fails means for the point.
    pub on_failure: OnHookFailure,
}

impl Default for Application {
    fn default() -> Self {
        Self {
            hooks_dir: "/etc/highwater/freeze-hook.d".into(),
            interval: Interval(Duration::from_secs(3600)),
            hook_timeout: Interval(Duration::from_secs(60)),
            hold: Interval(Duration::from_secs(60)),
            on_failure: OnHookFailure::Degrade,
        }
    }
}

/// What to run around a freeze.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FreezeHook {
    /// Program and arguments; called with `freeze` before and `thaw` after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/highwater".into(),
            run_dir: "/run/highwater".into(),
            bpf_dir: "/sys/fs/bpf/highwater".into(),
            guardian_path: None,
            metrics_listen: (Ipv4Addr::LOCALHOST, 9465).into(),
            log: Log::default(),
            collector: Collector::default(),
            replication: Replication::default(),
            tracking: Tracking::default(),
            capture: Capture::default(),
            freeze_hook: FreezeHook::default(),
            application: Application::default(),
            group: Group::default(),
            limits: Limits::default(),
            guest: vec![],
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".into() }
    }
}

impl Default for Replication {
    fn default() -> Self {
        Self {
            point_interval: Interval(Duration::from_secs(300)),
            freeze_deadline: Interval(Duration::from_secs(10)),
            freeze_budget: ByteSize(32 << 20),
            rounds_max: 8,
            compression_level: 1,
            readers: 4,
            memory: ByteSize(64 << 20),
            bandwidth: Bandwidth(None),
            partial_commit: ByteSize(256 << 20),
            retry_unit: Interval(Duration::from_secs(60)),
            resync: Resync::Automatic,
            compare_rate: ByteSize(1 << 20),
        }
    }
}

/// Something wrong in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// From 1.
    pub line: usize,
    /// The key with its tables, `replication.readers`; empty if the text is no TOML there.
    pub key: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has problems.
    #[error("{} has {}:{}", path.display(), count(problems), list(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All of them, by line.
        problems: Vec<Problem>,
    },
}

fn count(problems: &[Problem]) -> String {
    if problems.len() == 1 { "a problem".to_owned() } else { format!("{} problems", problems.len()) }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl Coded for ConfigError {
    fn code(&self) -> u16 {
        match self {
            Self::Read { .. } => 1400,
            Self::Invalid { .. } => 1401,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::Read { .. } => "Check the path, or give another one with --config.".into(),
            Self::Invalid { .. } => "Correct it and check it with `highwater-agent config check`.".into(),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or has problems: all of them are told.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = || {
            let mut text = String::new();
            io::Read::read_to_string(&mut io::Read::take(fs::File::open(path)?, FILE_BYTES_MAX), &mut text)?;
            Ok(text)
        };
        let text = read().map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text).map_err(|problems| ConfigError::Invalid { path: path.into(), problems })
    }

    /// [`Config::load`], and whether what the configuration names is there. The agent itself starts without: it may come yet.
    ///
    /// # Errors
    /// All problems.
    pub fn check(path: &Path) -> Result<Self, ConfigError> {
        let config = Self::load(path)?;
        let Some(program) = config.freeze_hook.command.as_ref().and_then(|c| c.first()) else {
            return Ok(config);
        };
        let message = match fs::metadata(program) {
            Err(error) => format!("the program {program} cannot be used: {error}"),
            Ok(found) if !found.is_file() || found.permissions().mode() & 0o111 == 0 => {
                format!("{program} is no program that may be executed")
            }
            Ok(_) => return Ok(config),
        };
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().position(|line| line.contains(program.as_str())).map_or(1, |at| at + 1);
        let problem = Problem { line, key: "freeze-hook.command".into(), message };
        Err(ConfigError::Invalid { path: path.into(), problems: vec![problem] })
    }

    /// Reads and checks a text.
    ///
    /// # Errors
    /// All its problems, by line.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let mut reader = Reader::new(text);
        let config = reader.config();
        if reader.problems.is_empty() {
            return Ok(config);
        }
        let mut problems = reader.problems;
        problems.sort_by_key(|problem| problem.line);
        Err(problems)
    }

    /// The whole configuration with its defaults, as TOML.
    #[must_use]
    pub fn effective(&self) -> String {
        toml::to_string(self).expect("strings, numbers and tables have a TOML form")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_complete_and_survive_a_round_trip() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
        let text = Config::default().effective();
        assert!(text.contains("point-interval = \"5m\"") && text.contains("memory = \"64MiB\""), "{text}");
        assert_eq!(Config::parse(&text), Ok(Config::default()));
    }

    #[test]
    fn reads_everything() {
        let text = r#"
            state-dir = "/s"
            guardian-path = "/g"
            metrics-listen = "[::1]:1"
            log = { format = "json", level = "debug" }
            [collector]
            endpoint = "dr.example:9443"
            server-name = "dr"
            [replication]
            retry-unit = "100ms"
            bandwidth = "50MiB"
            compression-level = -3
            [freeze-hook]
            command = ["/usr/bin/hook", "x"]
            [limits]
            stall = "5m"
            [[guest]]
            name = "web"
            [[guest]]
            name = "mail"
            agent-socket = "/run/mail.qga"
            disks = ["/dev/vg0/mail", "/dev/vg0/spool"]
            freeze-timeout = "8s"
            application = true
        "#;
        let config = Config::parse(text).expect("valid");
        assert_eq!(config.replication.bandwidth, Bandwidth(Some(50 << 20)));
        assert_eq!(config.replication.retry_unit.0, Duration::from_millis(100));
        assert_eq!(config.replication.compression_level, -3);
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.limits.stall.0, Duration::from_secs(300));
        assert_eq!(config.guest[0], Guest { name: "web".into(), ..Guest::default() });
        assert_eq!((config.guest[1].disks.len(), config.guest[1].application), (2, true));
        assert_eq!(Config::parse(&config.effective()), Ok(config));
    }

    #[test]
    fn a_hook_that_is_not_there_is_told_by_the_check() {
        let dir = tempfile::tempdir().unwrap();
        let (path, hook) = (dir.path().join("agent.toml"), dir.path().join("hook"));
        fs::write(&path, format!("[freeze-hook]\ncommand = [{hook:?}]\n")).unwrap();
        Config::load(&path).expect("it may come yet");
        let told = |path: &Path| match Config::check(path) {
            Err(ConfigError::Invalid { problems, .. }) => problems,
            other => panic!("{other:?}"),
        };
        let missing = told(&path);
        assert_eq!((missing[0].line, missing[0].key.as_str()), (2, "freeze-hook.command"));
        fs::write(&hook, "").unwrap();
        assert!(told(&path)[0].message.contains("executed"));
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        Config::check(&path).expect("valid");
    }

    #[test]
    fn an_address_that_is_none_is_told_with_an_example() {
        let problems = Config::parse("metrics-listen = \"localhost\"").expect_err("no port");
        assert!(problems[0].message.contains("127.0.0.1:9465"), "{problems:?}");
    }

    #[test]
    fn what_is_wrong_with_guests_is_told() {
        let text = "[[guest]]\n[[guest]]\nname = \"a\"\ndisks = [\"sda\"]\n[[guest]]\nname = \"a\"\nfreeze-timeout = \"5m\"\n\
                    agent-socket = \"x\"\napplication = 1\nsocket = \"/y\"\n";
        let problems = Config::parse(text).expect_err("wrong throughout");
        let lines: Vec<(usize, &str)> = problems.iter().map(|p| (p.line, p.key.as_str())).collect();
        let expected = [
            (1, "guest.name"),
            (4, "guest.disks"),
            (6, "guest.name"),
            (7, "guest.freeze-timeout"),
            (8, "guest.agent-socket"),
            (9, "guest.application"),
            (10, "guest.socket"),
        ];
        assert_eq!(lines, expected, "{problems:#?}");
        assert!(Config::parse("guest = 1").is_err() && Config::parse("[guest]\nname = \"x\"").is_err());
    }

    #[test]
    fn tells_all_problems_with_their_lines() {
        let text = "run-dir = \"here\"\nstat-dir = \"/x\"\n[log]\nlevel = \"loud\"\n[replication]\nreaders = 0\nmemory = 5\n\
                    freeze-budget = \"1TiB\"\npoint-interval = \"soon\"\n[collector]\nendpoint = \"nowhere\"\n[extra]\n\
                    [limits]\nsilence = \"1ms\"\nstalled = \"1m\"\n\
                    [capture]\nmode = \"always\"\npoint-interval = \"100ms\"\nmemory = \"1MiB\"\nring = \"2GiB\"\n\
                    copies = 9\nverify-interval = \"0s\"\nsize = 1\n";
        let problems = Config::parse(text).expect_err("wrong throughout");
        let lines: Vec<(usize, &str)> = problems.iter().map(|p| (p.line, p.key.as_str())).collect();
        let expected = [
            (1, "run-dir"),
            (2, "stat-dir"),
            (4, "log.level"),
            (6, "replication.readers"),
            (7, "replication.memory"),
            (8, "replication.freeze-budget"),
            (9, "replication.point-interval"),
            (11, "collector.endpoint"),
            (12, "extra"),
            (14, "limits.silence"),
            (15, "limits.stalled"),
            (17, "capture.mode"),
            (18, "capture.point-interval"),
            (19, "capture.memory"),
            (20, "capture.ring"),
            (21, "capture.copies"),
            (22, "capture.verify-interval"),
            (23, "capture.size"),
        ];
        assert_eq!(lines, expected, "{problems:#?}");
        let broken = Config::parse("a = \nb = \"x\n").expect_err("no TOML");
        assert_eq!(broken[0].line, 1, "{broken:?}");
    }
}
