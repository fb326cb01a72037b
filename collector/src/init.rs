//! `highwater-collector init`: vault, key, authority and a configuration with comments.
//!
//! The vault's root key is drawn here and kept nowhere but wrapped: under a new key file, or under a passphrase or a command that the
//! operator has.

use crate::config::{Problem, check_name};
use crate::{CollectorError, Config, authority};
use highwater_delta::VaultId;
use highwater_vault::{KeyRing, KeySource, Location, Store, VaultError, keys::KeyCommand};
use highwater_wire::files::write_secret;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Name of the configuration within its directory.
pub const CONFIG_FILE: &str = "collector.toml";
/// Name of the vault's key within the same directory.
pub const KEY_FILE: &str = "vault.key";

/// What was made.
#[derive(Debug)]
pub struct Made {
    /// The configuration.
    pub config: PathBuf,
    /// The key file, if one was made: to be copied to a safe place.
    pub key_file: Option<PathBuf>,
    /// The vault.
    pub vault: VaultId,
}

/// What is to open the new vault.
#[derive(Clone, Debug, Default)]
pub enum Key {
    /// A key file, which is made beside the configuration.
    #[default]
    NewFile,
    /// The passphrase in a file.
    PassphraseFile(PathBuf),
    /// An external command.
    Command(KeyCommand),
}

/// Makes everything a collector needs. What exists is never overwritten; the configuration comes last, so that an
/// interrupted init leaves none. What it makes has the same modes under every umask: directories can be entered, but the vault by its
/// owner only; so with the key, and the configuration can be read by its group too.
pub async fn init(
    dir: &Path,
    vault: &Location,
    names: Vec<String>,
    key: Key,
) -> Result<Made, CollectorError> {
    let config_file = dir.join(CONFIG_FILE);
    let key_file = matches!(key, Key::NewFile).then(|| dir.join(KEY_FILE));
    let vault_dir = if let Location::Directory(dir) = vault { Some(dir) } else { None };
    for path in [Some(config_file.clone()), key_file.clone(), vault_dir.map(|dir| dir.join("vault.json"))] {
        if let Some(path) = path.filter(|path| path.exists()) {
            return Err(CollectorError::Exists(path));
        }
    }
    for name in &names {
        check_name(name).map_err(CollectorError::Name)?;
    }
    if let Some(dir) = vault_dir.filter(|dir| holds_something(dir)) {
        return Err(CollectorError::NotEmpty(dir.clone()));
    }
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|e| CollectorError::Config {
            path: path.to_owned(),
            problems: vec![Problem::new("", e)],
        })
    };
    let lies_at = match vault_dir {
        Some(dir) => Location::Directory(absolute(dir)?),
        None => vault.clone(),
    };
    let (setting, source) = match (&key_file, key) {
        (Some(file), _) => ("key-file", KeySource::File(absolute(file)?)),
        (None, Key::PassphraseFile(file)) => ("passphrase-file", KeySource::PassphraseFile(absolute(&file)?)),
        (None, Key::Command(command)) => ("key-command", KeySource::Command(command)),
        (None, Key::NewFile) => return Err(CollectorError::Exists(dir.join(KEY_FILE))),
    };
    if key_file.is_none() {
        source.check()?;
    }
    let text = config_text(&names, &lies_at, &key_setting(setting, &source));
    toml::from_str::<Config>(&text).map_err(|e| CollectorError::Config {
        path: config_file.clone(),
        problems: vec![Problem::new("", e)],
    })?;
    for (dir, mode) in std::iter::once((dir, 0o755)).chain(vault_dir.map(|dir| (dir.as_path(), 0o700))) {
        make_dir(dir, mode).map_err(|(dir, e)| VaultError::Io { path: dir, source: e })?;
    }
    let store = Store::open(vault)?;
    let made = match KeyRing::create(store, &source, "init").await {
        Ok(ring) => ring.vault()?,
        Err(error) => {
            // The key of no vault, as a rule; left there, it would be in the way of the next try. An answer that was lost may have been
            // that there is one: then it is needed.
            if let Some(file) = key_file.filter(|_| !error.is_retryable()) {
                let _ = std::fs::remove_file(file);
            }
            return Err(error.into());
        }
    };
    let authority = authority::create(&made).await?;
    authority.issue_server(&names)?;
    write_secret(&config_file, text.as_bytes())?;
    set_mode(&config_file, 0o640).map_err(|source| VaultError::Io { path: config_file.clone(), source })?;
    Ok(Made { config: config_file, key_file, vault: made.id() })
}

/// Whether a directory is there with something in it; an own file system's `lost+found` is nothing.
fn holds_something(dir: &Path) -> bool {
    std::fs::read_dir(dir)
        .is_ok_and(|mut found| found.any(|entry| entry.is_ok_and(|entry| entry.file_name() != "lost+found")))
}

/// Makes a directory with this mode, and those above it so that they can be entered, under every umask. One that is there stays as
/// it is.
fn make_dir(dir: &Path, mode: u32) -> Result<(), (PathBuf, std::io::Error)> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(above) = dir.parent().filter(|above| !above.as_os_str().is_empty()) {
        make_dir(above, 0o755)?;
    }
    let made = std::fs::create_dir(dir).and_then(|()| set_mode(dir, mode));
    made.map_err(|e| (dir.to_owned(), e))
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// The line that says what opens the vault.
fn key_setting(setting: &str, source: &KeySource) -> String {
    let value = match source {
        KeySource::File(path) | KeySource::PassphraseFile(path) => quoted(&path.to_string_lossy()),
        KeySource::Command(command) => {
            let words: Vec<String> = Vec::from(command.clone()).iter().map(|word| quoted(word)).collect();
            format!("[{}]", words.join(", "))
        }
        KeySource::Root(_) | KeySource::Passphrase(_) => String::new(),
    };
    format!("{setting} = {value}")
}

fn config_text(names: &[String], vault: &Location, key: &str) -> String {
    let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    format!(
        r#"# Configuration of highwater-collector. Check it with `highwater-collector config check`.

# Names and addresses under which agents reach this collector. Its certificate is for these.
names = [{names}]

# Where the vault lies: a directory, or a bucket like "s3://BUCKET/PREFIX?region=REGION". And what opens it: a key file (key-file), a
# file with a passphrase (passphrase-file), or a command (key-command, a list of words). Without any of the vault's keys nothing in it can
# be read: keep a copy elsewhere, or add a second one (`highwater vault key add`).
vault = {vault}
{key}

# Where agents connect.
#listen = "0.0.0.0:9443"
# Where machines enrol.
#management-listen = "0.0.0.0:443"
# Where Prometheus reads metrics; without TLS, so keep it local or behind a proxy.
#metrics-listen = "127.0.0.1:9464"
# What enrolled machines are told to connect to, if it is not one of the names and the port above.
#endpoint = "dr.example.com:9443"

# Bytes that one machine may have under way; and bytes of memory for all sessions: half for windows, the rest for states of
# machines, open deltas and comparisons. When it runs short, windows get smaller and sessions wait.
#window = "4MiB"
#memory = "1GiB"
# The same for other collectors that keep their vaults here (`relay`), besides. No object of theirs that is put at once can be larger.
#relay-memory = "128MiB"
# A directory of a local disk where up to so much of what machines send waits, sealed, while the vault is slow or away for a moment. For a
# vault in a bucket; one on the same disk is no faster for it. Nothing is lost with it. Without it, machines wait.
#cache = "/var/cache/highwater-collector"
#cache-bytes = "1GiB"
# How often recovery points expire as policies say, and what lay between them is merged ("0s": never by this collector); how many
# bytes a second that may read and write ("0": as many as it can); and how long what is not needed any more stays for readers.
#maintenance-every = "10m"
#maintenance-rate = "64MiB"
#trash-grace = "6h"
# How often the vault is read back and checked, as `highwater verify` does ("0s": never by this collector; of several collectors of a
# vault one is enough); how many bytes a second that may read; how many percent of the objects it reads each time, chosen at
# random (100 in a directory, 2 elsewhere, since a bucket may charge for what is read); and where it is kept how far it is, and
# as whom this collector maintains the vault (each needs a directory of its own).
#verify-every = "7days"
#verify-rate = "16MiB"
#verify-sample = 5
#state-dir = "/var/lib/highwater-collector/state"
# Commits of one machine, averaged. One that makes more is slowed down.
#commits-per-minute = 300
# Sessions, and handshakes on each port, at once.
#sessions-max = 1024
#handshakes-max = 64
#handshake-timeout = "10s"
# A machine that is silent for so long is disconnected; agents say something every 5 s.
#idle-timeout = "90s"
# Enrolments a second from one address (of IPv6: one /64), averaged; those beyond are refused. Raise it where many machines
# come from one address, as through a NAT.
#enrolments-per-second = 5
# How long a machine's certificate is valid. Machines renew it by themselves when a third is left; one that is off for longer
# must be enrolled again.
#certificate-validity = "365days"

# "text" or "json"; and as in RUST_LOG.
#log-format = "text"
#log-level = "info"
"#,
        names = names.join(", "),
        vault = quoted(&vault.to_string()),
    )
}
