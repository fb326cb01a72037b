//! Everything that is wrong with a configuration's text, each with its line: who corrects a file wants to do it once.

use super::{Config, KEY_SETTINGS};
use highwater_vault::{Location, Store};
use rustls_pki_types::ServerName;
use serde::{Deserialize, Serialize};
use std::fmt;
use toml::{Table, Value};

/// Something wrong in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// From 1; none of a setting that is missing.
    pub line: Option<usize>,
    /// The setting; empty if it is about none.
    pub key: String,
    /// What is wrong.
    pub message: String,
}

impl Problem {
    /// One about no line.
    pub fn new(key: &str, message: impl fmt::Display) -> Self {
        Self { line: None, key: key.to_owned(), message: message.to_string() }
    }

    fn within(text: &str, key: &str, message: impl fmt::Display) -> Self {
        Self { line: line_of(text, key), ..Self::new(key, message) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "`{}`: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// Settings without a default, and one each that is no problem.
const REQUIRED: [(&str, &str); 2] = [("names", "localhost"), ("vault", "/")];

/// The configuration that a text says, or all that is wrong with it.
pub(super) fn read(text: &str) -> Result<Config, Vec<Problem>> {
    let table: Table = text.parse().map_err(|e: toml::de::Error| vec![syntax(text, &e)])?;
    let mut problems = Vec::new();
    let mut good = Table::new();
    for (key, placeholder) in REQUIRED {
        let placeholder = Value::String(placeholder.to_owned());
        good.insert(key.to_owned(), if key == "names" { vec![placeholder].into() } else { placeholder });
        if !table.contains_key(key) {
            problems.push(Problem::new(key, "is missing"));
        }
    }
    for (key, value) in table {
        let before = good.insert(key.clone(), value);
        if let Err(error) = Config::deserialize(good.clone()) {
            problems.push(said(text, &key, error.message()));
            match before {
                Some(before) => good.insert(key, before),
                None => good.remove(&key),
            };
        }
    }
    let config = Config::deserialize(good).map_err(|e| vec![Problem::new("", e.message())])?;
    // Of a key that is wrong it has been said what is; it is not missing.
    let is_key = |key: &str| KEY_SETTINGS.contains(&key);
    let said_of_key = problems.iter().any(|problem| is_key(&problem.key));
    let of_values = config.problems().into_iter().filter(|(key, _)| !(said_of_key && is_key(key)));
    problems.extend(of_values.map(|(key, cause)| Problem::within(text, key, cause)));
    problems.sort_by_key(|problem| problem.line);
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

fn syntax(text: &str, error: &toml::de::Error) -> Problem {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let message = error.message().lines().next().unwrap_or("it is no TOML");
    Problem { line: Some(line), ..Problem::new("", message) }
}

fn said(text: &str, key: &str, message: &str) -> Problem {
    let message = message.lines().next().unwrap_or_default();
    if message.starts_with("unknown field") {
        let message = "is no setting; `highwater-collector config show --effective` shows all";
        return Problem::within(text, key, message);
    }
    Problem::within(text, key, message)
}

fn line_of(text: &str, key: &str) -> Option<usize> {
    let found = text.lines().position(|line| {
        line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
    });
    found.map(|line| line + 1)
}

/// Why a text is no name or address under which a collector can be reached.
pub fn check_name(name: &str) -> Result<(), String> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.contains("://") {
        "it is a URL; only its host is wanted"
    } else if name
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.contains(':') && port.parse::<u16>().is_ok())
    {
        "no port is wanted"
    } else if ServerName::try_from(name).is_err() {
        "letters, digits, `-` and `.` are expected, or an IP address"
    } else {
        return Ok(());
    };
    Err(format!(
        "{name:?} is no host name or address: {why}, like \"collector.example.com\" or \"192.0.2.7\""
    ))
}

/// What is wrong with what a configuration names: the key, the vault, and the cache. Nothing is made: this may be another user than
/// the collector's.
pub(super) fn of_what_is_named(config: &Config) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (key, source) in config.key_sources() {
        if let Err(error) = source.check() {
            problems.push(Problem::new(key, error));
        }
    }
    if let Err(cause) = vault(&config.vault) {
        problems.push(Problem::new("vault", cause));
    }
    if let Some(dir) = config.cache.as_ref().filter(|dir| dir.exists() && !dir.is_dir()) {
        problems.push(Problem::new("cache", format!("{} is no directory", dir.display())));
    }
    problems
}

fn vault(location: &Location) -> Result<(), String> {
    let dir = match location {
        Location::Directory(dir) => dir,
        // Whether it can be reached is seen at the start.
        Location::Bucket(_) | Location::Relay(_) => {
            return Store::open(location).map(drop).map_err(|e| e.to_string());
        }
    };
    let file = dir.join("vault.json");
    match std::fs::File::open(&file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("there is no vault in {}; `highwater-collector init` makes one", dir.display()))
        }
        Err(e) => Err(format!("{}: {e}; {}", file.display(), crate::access::advice(dir))),
        // Names the directory in it that cannot be used.
        Ok(_) => Store::open(location).map(drop).map_err(|e| e.to_string()),
    }
}
