//! `collector.toml`. Unknown keys are refused; what is not given has a default that is shown by
//! `config show --effective`.

mod problems;

pub use problems::{Problem, check_name};

use crate::{CollectorError, units};
use highwater_vault::{KeySource, Location, Store, Vault, VaultError, keys::KeyCommand};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Least window: some chunks must be able to be under way.
pub const WINDOW_BYTES_MIN: u64 = 512 * 1024;
/// Least validity of a machine's certificate. So short ones are for trials; a machine that is off for longer must be
/// enrolled again.
pub const CERTIFICATE_VALIDITY_MIN: Duration = Duration::from_secs(10);
/// Least memory of all sessions.
pub const MEMORY_MIN: u64 = 32 << 20;
/// Least memory of relays: a part of an upload for each of several.
pub const RELAY_MEMORY_MIN: u64 = 16 << 20;
/// Least cache.
pub const CACHE_BYTES_MIN: u64 = 16 << 20;
/// Largest window.
pub const WINDOW_BYTES_MAX: u64 = 1 << 30;

/// The settings of which one says what opens the vault.
pub const KEY_SETTINGS: [&str; 3] = ["key-file", "passphrase-file", "key-command"];

/// The whole configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// Names and addresses under which agents reach this collector; its certificate is for these.
    pub names: Vec<String>,
    /// Where the vault lies: a directory, or a bucket by its address.
    pub vault: Location,
    /// What opens the vault, exactly one of these three: a key file,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// a file with a passphrase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passphrase_file: Option<PathBuf>,
    /// or an external command: a program and its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_command: Option<KeyCommand>,
    /// Where agents connect.
    #[serde(default = "default_listen", deserialize_with = "units::address::deserialize")]
    pub listen: SocketAddr,
    /// Where machines enrol.
    #[serde(default = "default_management_listen", deserialize_with = "units::address::deserialize")]
    pub management_listen: SocketAddr,
    /// Where metrics are read, without TLS.
    #[serde(default = "default_metrics_listen", deserialize_with = "units::address::deserialize")]
    pub metrics_listen: SocketAddr,
    /// `host:port` told to enrolled machines, if another than the first name and the port listened on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Bytes that a machine may have under way.
    #[serde(default = "default_window", with = "units")]
    pub window: u64,
    /// Bytes that all sessions together may use: see [`crate::memory`]. When it runs short, windows get smaller and
    /// sessions wait.
    #[serde(default = "default_memory", with = "units")]
    pub memory: u64,
    /// Bytes that bodies of all relays' requests may use, besides.
    #[serde(default = "default_relay_memory", with = "units")]
    pub relay_memory: u64,
    /// A local directory where chunks wait while the vault lags: see [`crate::cache`]. None: machines wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Bytes that all sessions together may have there.
    #[serde(default = "default_cache_bytes", with = "units")]
    pub cache_bytes: u64,
    /// How often points expire and what lay between them is merged ([`crate::maintenance`]); zero: never, here.
    #[serde(default = "default_maintenance_every", with = "units::time")]
    pub maintenance_every: Duration,
    /// Bytes that this reads and writes a second, averaged; zero: as fast as it goes.
    #[serde(default = "default_maintenance_rate", with = "units")]
    pub maintenance_rate: u64,
    /// How long objects stay that nothing refers to any more, for readers that began before.
    #[serde(default = "default_trash_grace", with = "units::time")]
    pub trash_grace: Duration,
    /// How often the vault is read back and checked ([`crate::verification`]); zero: never, here.
    #[serde(default = "default_verify_every", with = "units::time")]
    pub verify_every: Duration,
    /// Bytes that this reads a second, averaged; zero: as fast as it goes.
    #[serde(default = "default_verify_rate", with = "units")]
    pub verify_rate: u64,
    /// Percent of the segments and maps that it reads each time, chosen at random. None: all of a vault in a directory,
    /// 2 of one elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_sample: Option<f32>,
    /// A local directory where it is kept how far that is. None: what systemd has made, or nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Commits of one machine a minute, averaged; five minutes' worth may come at once, further ones wait.
    #[serde(default = "default_commits_per_minute")]
    pub commits_per_minute: u32,
    /// Sessions at once.
    #[serde(default = "default_sessions_max")]
    pub sessions_max: usize,
    /// Handshakes at once, on each port.
    #[serde(default = "default_handshakes_max")]
    pub handshakes_max: usize,
    /// A handshake and a hello, each, must be done within this time.
    #[serde(default = "default_handshake_timeout", with = "units::time")]
    pub handshake_timeout: Duration,
    /// A machine may be silent for so long.
    #[serde(default = "default_idle_timeout", with = "units::time")]
    pub idle_timeout: Duration,
    /// How long a machine's certificate is valid; machines renew it by themselves when a third is left.
    #[serde(default = "default_certificate_validity", with = "units::time")]
    pub certificate_validity: Duration,
    /// Enrolment requests a second from one address (of IPv6: one /64), averaged; eight times as many may be granted to all together.
    #[serde(default = "default_enrolments_per_second")]
    pub enrolments_per_second: u32,
    /// `text` or `json`.
    #[serde(default)]
    pub log_format: LogFormat,
    /// As in `RUST_LOG`.
    #[serde(default = "default_log_level")]
    pub log_level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

fn default_listen() -> SocketAddr {
    ([0, 0, 0, 0], 9443).into()
}
fn default_management_listen() -> SocketAddr {
    ([0, 0, 0, 0], 443).into()
}
fn default_metrics_listen() -> SocketAddr {
    ([127, 0, 0, 1], 9464).into()
}
const fn default_window() -> u64 {
    4 << 20
}
const fn default_memory() -> u64 {
    1 << 30
}
const fn default_relay_memory() -> u64 {
    128 << 20
}
const fn default_cache_bytes() -> u64 {
    1 << 30
}
const fn default_maintenance_every() -> Duration {
    Duration::from_secs(600)
}
const fn default_maintenance_rate() -> u64 {
    64 << 20
}
const fn default_trash_grace() -> Duration {
    Duration::from_secs(6 * 3600)
}
const fn default_verify_every() -> Duration {
    Duration::from_secs(7 * 86_400)
}
const fn default_verify_rate() -> u64 {
    16 << 20
}
const fn default_commits_per_minute() -> u32 {
    300
}
const fn default_sessions_max() -> usize {
    1024
}
const fn default_handshakes_max() -> usize {
    64
}
const fn default_handshake_timeout() -> Duration {
    Duration::from_secs(10)
}
const fn default_idle_timeout() -> Duration {
    Duration::from_secs(90)
}
const fn default_certificate_validity() -> Duration {
    highwater_wire::identity::CLIENT_VALIDITY
}
const fn default_enrolments_per_second() -> u32 {
    5
}
fn default_log_level() -> String {
    "info".to_owned()
}

/// Whether two listeners would be in each other's way.
fn is_same(one: SocketAddr, other: SocketAddr) -> bool {
    let is_one_ip = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && is_one_ip
}

/// Whether a text says what is logged: a word alone that is no level would be taken for a part of the program, and nothing else be logged.
fn is_filter(text: &str) -> bool {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = |word: &str| LEVELS.iter().any(|level| word.trim().eq_ignore_ascii_case(level));
    let part = |part: &str| match part.rsplit_once('=') {
        Some((target, level)) => !target.trim().is_empty() && is_level(level),
        None => is_level(part),
    };
    !text.trim().is_empty()
        && text.split(',').all(part)
        && tracing_subscriber::EnvFilter::try_new(text).is_ok()
}

impl Config {
    /// Settings without a value, and what holds then.
    #[must_use]
    pub fn unset(&self) -> Vec<(&'static str, &'static str)> {
        let elsewhere = match self.vault {
            Location::Directory(_) => "all of it is read",
            _ => "2 percent are read, as the vault is not in a directory",
        };
        [
            (
                self.endpoint.is_none(),
                "endpoint",
                "machines are told the first name, with the port of `listen`",
            ),
            (self.cache.is_none(), "cache", "machines wait while the vault lags"),
            (self.verify_sample.is_none(), "verify-sample", elsewhere),
            (self.state_dir.is_none(), "state-dir", "what systemd has made, or nowhere"),
        ]
        .into_iter()
        .filter_map(|(unset, name, meaning)| unset.then_some((name, meaning)))
        .collect()
    }

    /// With defaults for everything that has one.
    #[must_use]
    pub fn new(names: Vec<String>, vault: Location, key_file: PathBuf) -> Self {
        Self {
            names,
            vault,
            key_file: Some(key_file),
            passphrase_file: None,
            key_command: None,
            listen: default_listen(),
            management_listen: default_management_listen(),
            metrics_listen: default_metrics_listen(),
            endpoint: None,
            window: default_window(),
            memory: default_memory(),
            relay_memory: default_relay_memory(),
            cache: None,
            cache_bytes: default_cache_bytes(),
            maintenance_every: default_maintenance_every(),
            maintenance_rate: default_maintenance_rate(),
            trash_grace: default_trash_grace(),
            verify_every: default_verify_every(),
            verify_rate: default_verify_rate(),
            verify_sample: None,
            state_dir: None,
            commits_per_minute: default_commits_per_minute(),
            sessions_max: default_sessions_max(),
            handshakes_max: default_handshakes_max(),
            handshake_timeout: default_handshake_timeout(),
            idle_timeout: default_idle_timeout(),
            certificate_validity: default_certificate_validity(),
            enrolments_per_second: default_enrolments_per_second(),
            log_format: LogFormat::Text,
            log_level: default_log_level(),
        }
    }

    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, CollectorError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CollectorError::ConfigUnreadable { path: path.to_owned(), source })?;
        problems::read(&text).map_err(|problems| CollectorError::Config { path: path.to_owned(), problems })
    }

    /// Reads and checks a file, and whether key and vault that it names can be used. Tells everything that is wrong.
    pub fn check(path: &Path) -> Result<Self, CollectorError> {
        let config = Self::load(path)?;
        let problems = problems::of_what_is_named(&config);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(CollectorError::Config { path: path.to_owned(), problems })
        }
    }

    /// What opens the vault, by the setting that says it.
    fn key_sources(&self) -> Vec<(&'static str, KeySource)> {
        let file = self.key_file.clone().map(|path| (KEY_SETTINGS[0], KeySource::File(path)));
        let text =
            self.passphrase_file.clone().map(|path| (KEY_SETTINGS[1], KeySource::PassphraseFile(path)));
        let command = self.key_command.clone().map(|command| (KEY_SETTINGS[2], KeySource::Command(command)));
        file.into_iter().chain(text).chain(command).collect()
    }

    /// Opens the vault. A directory that is not there is no vault, and is not made.
    pub async fn open_vault(&self) -> Result<Vault, CollectorError> {
        let (_, source) = self.key_sources().pop().ok_or(VaultError::WrongKey)?;
        // One that is mistyped, or not mounted, would be made.
        if let Location::Directory(dir) = &self.vault
            && matches!(std::fs::symlink_metadata(dir), Err(e) if e.kind() == std::io::ErrorKind::NotFound)
        {
            return Err(VaultError::NotAVault.into());
        }
        Ok(Vault::unlock(Store::open(&self.vault)?, &source).await?)
    }

    /// What is wrong with its values, each with its key.
    fn problems(&self) -> Vec<(&'static str, String)> {
        let wrong = [
            (self.names.is_empty(), "names", "wants at least one name"),
            (
                !(WINDOW_BYTES_MIN..=WINDOW_BYTES_MAX).contains(&self.window),
                "window",
                "must be 512KiB to 1GiB",
            ),
            (self.memory < MEMORY_MIN, "memory", "must be at least 32MiB"),
            (self.memory / 2 < self.window, "memory", "must be at least twice `window`"),
            (
                !(RELAY_MEMORY_MIN..=1 << 40).contains(&self.relay_memory),
                "relay-memory",
                "must be 16MiB to 1024GiB",
            ),
            (
                self.cache.as_ref().is_some_and(|dir| !dir.is_absolute()),
                "cache",
                "must be an absolute path, like \"/var/cache/highwater-collector\"",
            ),
            (
                !(CACHE_BYTES_MIN..=1 << 50).contains(&self.cache_bytes),
                "cache-bytes",
                "must be 16MiB to 1048576GiB",
            ),
            (
                !self.maintenance_every.is_zero() && self.maintenance_every < Duration::from_secs(1),
                "maintenance-every",
                "must be \"0s\" (never) or at least 1s",
            ),
            (
                !self.verify_every.is_zero() && self.verify_every < Duration::from_secs(1),
                "verify-every",
                "must be \"0s\" (never) or at least 1s",
            ),
            (
                self.verify_sample.is_some_and(|percent| !(percent > 0.0 && percent <= 100.0)),
                "verify-sample",
                "must be above 0 and at most 100, in percent",
            ),
            (
                self.state_dir.as_ref().is_some_and(|dir| !dir.is_absolute()),
                "state-dir",
                "must be an absolute path, like \"/var/lib/highwater-collector/state\"",
            ),
            (self.commits_per_minute == 0, "commits-per-minute", "must be at least 1"),
            (self.memory > 1 << 40, "memory", "must be at most 1024GiB"),
            (self.sessions_max == 0 || self.sessions_max > 1 << 20, "sessions-max", "must be 1 to 1048576"),
            (
                self.handshakes_max == 0 || self.handshakes_max > 1 << 16,
                "handshakes-max",
                "must be 1 to 65536",
            ),
            (
                self.handshake_timeout < Duration::from_millis(100),
                "handshake-timeout",
                "must be at least 100ms",
            ),
            (self.idle_timeout < Duration::from_secs(1), "idle-timeout", "must be at least 1s"),
            (
                !(CERTIFICATE_VALIDITY_MIN..=highwater_wire::identity::CA_VALIDITY)
                    .contains(&self.certificate_validity),
                "certificate-validity",
                "must be 10s to 3652days",
            ),
            (
                self.key_sources().is_empty(),
                KEY_SETTINGS[0],
                "is missing; `passphrase-file` or `key-command` would do as well",
            ),
            (
                self.key_sources().len() > 1,
                self.key_sources().last().map_or("", |(key, _)| key),
                "is one too many: only one of `key-file`, `passphrase-file` and `key-command` may be given",
            ),
            (self.enrolments_per_second == 0, "enrolments-per-second", "must be at least 1"),
            (
                self.endpoint.as_ref().is_some_and(|e| highwater_wire::enroll::split_endpoint(e).is_err()),
                "endpoint",
                "must be host:port, like \"dr.example.com:9443\"",
            ),
        ];
        let more = [
            (self.is_in_vault(self.state_dir.as_deref()), "state-dir", "must not lie in the vault"),
            (self.is_in_vault(self.cache.as_deref()), "cache", "must not lie in the vault"),
            (
                is_same(self.listen, self.management_listen),
                "management-listen",
                "must not be where `listen` is",
            ),
            (is_same(self.listen, self.metrics_listen), "metrics-listen", "must not be where `listen` is"),
            (
                is_same(self.management_listen, self.metrics_listen),
                "metrics-listen",
                "must not be where `management-listen` is",
            ),
            (
                !is_filter(&self.log_level),
                "log-level",
                "must be `error`, `warn`, `info`, `debug` or `trace`, or such of parts, like \"info,highwater_vault=debug\"",
            ),
        ];
        let values =
            wrong.into_iter().chain(more).filter(|(is, ..)| *is).map(|(_, key, why)| (key, why.to_owned()));
        let names = self.names.iter().filter_map(|name| check_name(name).err());
        values.chain(names.map(|why| ("names", why))).collect()
    }

    /// Whether a directory lies in the vault's.
    fn is_in_vault(&self, dir: Option<&Path>) -> bool {
        match (&self.vault, dir) {
            (Location::Directory(vault), Some(dir)) => dir.starts_with(vault),
            _ => false,
        }
    }

    /// `host:port` that enrolled machines are told; `asked` is the host that the request came for.
    #[must_use]
    pub fn endpoint_for(&self, asked: Option<&str>, ingest_port: u16) -> String {
        if let Some(endpoint) = &self.endpoint {
            return endpoint.clone();
        }
        let host = asked
            .and_then(|asked| self.names.iter().find(|name| name.eq_ignore_ascii_case(asked)))
            .or(self.names.first())
            .map_or("localhost", String::as_str);
        if host.contains(':') { format!("[{host}]:{ingest_port}") } else { format!("{host}:{ingest_port}") }
    }

    /// The URL that machines enrol at.
    #[must_use]
    pub fn enrol_url(&self) -> String {
        let host = self.names.first().map_or("localhost", String::as_str);
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        match self.management_listen.port() {
            443 => format!("https://{host}"),
            port => format!("https://{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, CollectorError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn defaults_and_refusals() {
        let least = "names = [\"a\"]\nvault = \"/v\"\nkey-file = \"/k\"\n";
        let config = load(least).unwrap();
        assert_eq!(
            (config.listen.port(), config.management_listen.port(), config.window),
            (9443, 443, 4 << 20)
        );
        assert_eq!(config.endpoint_for(None, 9443), "a:9443");
        for bad in [
            "windows = \"4MiB\"",
            "window = \"1KiB\"",
            "window = 4",
            "memory = \"31MiB\"",
            "relay-memory = \"15MiB\"",
            "memory = \"1GiB\"\nwindow = \"513MiB\"",
            "commits-per-minute = 0",
            "maintenance-every = \"10ms\"",
            "maintenance-rate = \"fast\"",
            "verify-every = \"10ms\"",
            "verify-rate = \"fast\"",
            "verify-sample = 0",
            "verify-sample = 100.5",
            "state-dir = \"here\"",
            "cache = \"here\"",
            "cache-bytes = \"1MiB\"",
            "idle-timeout = \"x\"",
            "certificate-validity = \"1s\"",
            "certificate-validity = \"20years\"",
            "passphrase-file = \"/p\"",
            "key-command = [\"/bin/kms\"]",
        ] {
            assert_eq!(load(&format!("{least}{bad}\n")).unwrap_err().code(), 1313, "{bad}");
        }
        for (bad, part) in
            [("", "is missing"), ("key-command = []", "no program"), ("key-command = [\"kms\"]", "absolute")]
        {
            let refused = load(&format!("names = [\"a\"]\nvault = \"/v\"\n{bad}\n")).unwrap_err();
            let CollectorError::Config { problems, .. } = &refused else { panic!("{refused}") };
            assert_eq!(problems.len(), 1, "{refused}");
            assert!(problems[0].message.contains(part), "{bad}: {refused}");
        }
        for good in ["passphrase-file = \"/p\"", "key-command = [\"/bin/kms\", \"--key\", \"a b\"]"] {
            let config = load(&format!("names = [\"a\"]\nvault = \"/v\"\n{good}\n")).unwrap();
            assert!(toml::to_string(&config).unwrap().contains(good), "{good}");
        }
        let shown = toml::to_string(&config).unwrap();
        assert_eq!(
            toml::to_string(&load(&shown).unwrap()).unwrap(),
            shown,
            "what is shown can be read again"
        );
    }
}
