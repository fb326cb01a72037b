//! Where a vault lies, as an operator writes it: a directory, a bucket of an object store, or another collector. Pure.
//!
//! | written | meaning |
//! |---|---|
//! | `/srv/vault`, `file:///srv/vault` | a directory of this machine |
//! | `s3://BUCKET/PREFIX?region=…&endpoint=…&profile=…&lock=…` | Amazon S3, or a server that speaks it |
//! | `az://CONTAINER/PREFIX?account=…&endpoint=…` | Azure Blob Storage |
//! | `gs://BUCKET/PREFIX?endpoint=…` | Google Cloud Storage |
//! | `highwater://HOST:PORT/PREFIX?identity=DIR` | another collector, which knows this one by the identity in that directory |
//!
//! No location holds a secret: credentials come from the environment and the files of each store's own tools. An `endpoint` that
//! begins with `http://` is used without TLS; everything in a vault but its names is encrypted, credentials are not sent as they
//! are, but who can change what is on the way can delete.

use crate::{Result, VaultError};
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf, str::FromStr};

mod relay;

pub use relay::Relay;

/// Most bytes of a location.
const TEXT_BYTES_MAX: usize = 2048;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Location {
    /// A directory of this machine.
    Directory(PathBuf),
    /// In an object store.
    Bucket(Bucket),
    /// At another collector.
    Relay(Relay),
}

/// A bucket, and where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Whose.
    pub provider: Provider,
    /// Its name: a bucket, or a container of an account.
    pub name: String,
    /// What all names begin with; empty, or parts separated by `/`.
    pub prefix: String,
    /// The server, if not the provider's own.
    pub endpoint: Option<String>,
    /// Amazon's region.
    pub region: Option<String>,
    /// Section of Amazon's files that has the credentials.
    pub profile: Option<String>,
    /// Azure's account.
    pub account: Option<String>,
    /// How Amazon's Object Lock is used; none: not at all, but for what the bucket does by itself.
    pub lock: Option<LockMode>,
}

/// Who may end a lock on an object before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Whom the bucket's owner allows to.
    Governance,
    /// Nobody.
    Compliance,
}

impl LockMode {
    const ALL: [Self; 2] = [Self::Governance, Self::Compliance];

    /// As it is written.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Governance => "governance",
            Self::Compliance => "compliance",
        }
    }
}

/// Whose protocol is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// Amazon S3, and what speaks like it.
    S3,
    /// Azure Blob Storage.
    Azure,
    /// Google Cloud Storage.
    Google,
}

impl Provider {
    const ALL: [Self; 3] = [Self::S3, Self::Azure, Self::Google];

    const fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Azure => "az",
            Self::Google => "gs",
        }
    }

    /// The settings that it takes, in the order in which they are written.
    const fn settings(self) -> &'static [&'static str] {
        match self {
            Self::S3 => &["region", "endpoint", "profile", "lock"],
            Self::Azure => &["account", "endpoint"],
            Self::Google => &["endpoint"],
        }
    }
}

impl Bucket {
    fn setting(&self, name: &str) -> Option<&str> {
        match name {
            "region" => self.region.as_deref(),
            "endpoint" => self.endpoint.as_deref(),
            "profile" => self.profile.as_deref(),
            "lock" => self.lock.map(LockMode::text),
            _ => self.account.as_deref(),
        }
    }

    fn parse(provider: Provider, rest: &str) -> Result<Self, String> {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (name, prefix) = path.split_once('/').unwrap_or((path, ""));
        let mut bucket = Self {
            provider,
            name: name.to_owned(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            profile: None,
            account: None,
            lock: None,
        };
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
            return Err(format!("{name:?} is no bucket: letters, digits, `-`, `.` and `_` are expected"));
        }
        bucket.prefix = prefix_of(prefix)?;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !provider.settings().contains(&key) {
                let known = provider.settings().join("`, `");
                return Err(format!(
                    "`{key}` is no setting of {}://; there are `{known}`",
                    provider.scheme()
                ));
            }
            if value.is_empty() || value.chars().any(|c| c.is_control() || c.is_whitespace()) {
                return Err(format!("`{key}` has no value"));
            }
            if key == "lock" {
                let mode = LockMode::ALL.into_iter().find(|mode| mode.text() == value);
                let refuse = || "`lock` is `governance` or `compliance`".to_owned();
                if bucket.lock.replace(mode.ok_or_else(refuse)?).is_some() {
                    return Err("`lock` is given twice".to_owned());
                }
                continue;
            }
            let value = value.to_owned();
            let place = match key {
                "region" => &mut bucket.region,
                "endpoint" => &mut bucket.endpoint,
                "profile" => &mut bucket.profile,
                _ => &mut bucket.account,
            };
            if place.replace(value).is_some() {
                return Err(format!("`{key}` is given twice"));
            }
        }
        if let Some(endpoint) = &bucket.endpoint {
            let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
            let host = host.and_then(|rest| rest.split('/').next()).unwrap_or_default();
            if host.is_empty() {
                return Err("`endpoint` must begin with https:// or http://, and name a host".to_owned());
            }
            if host.contains('@') {
                return Err("`endpoint` must not hold credentials".to_owned());
            }
        }
        Ok(bucket)
    }
}

/// What all names are to begin with.
fn prefix_of(text: &str) -> Result<String, String> {
    let prefix = text.trim_end_matches('/');
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let part_is_good = |part: &str| !matches!(part, "" | "." | "..") && part.chars().all(plain);
    if !prefix.is_empty() && !prefix.split('/').all(part_is_good) {
        return Err(format!(
            "{text:?} is no prefix: letters, digits, `-`, `.` and `_` are expected, in parts separated by `/`"
        ));
    }
    Ok(prefix.to_owned())
}

impl FromStr for Location {
    type Err = VaultError;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |cause: String| VaultError::Location { location: shown(text), cause };
        if text.len() > TEXT_BYTES_MAX {
            return Err(refuse(format!("it is longer than {TEXT_BYTES_MAX} bytes")));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return match text.is_empty() {
                true => Err(refuse("it is empty".to_owned())),
                false => Ok(Self::Directory(text.into())),
            };
        };
        if scheme == "file" {
            return match rest.starts_with('/') {
                true => Ok(Self::Directory(rest.into())),
                false => Err(refuse("file:// wants an absolute path, like file:///srv/vault".to_owned())),
            };
        }
        if scheme == Relay::SCHEME {
            return Relay::parse(rest).map(Self::Relay).map_err(refuse);
        }
        let Some(provider) = Provider::ALL.into_iter().find(|provider| provider.scheme() == scheme) else {
            return Err(refuse(format!(
                "{scheme}:// is not known; there are s3://, az://, gs://, highwater://, file:// and plain paths"
            )));
        };
        Bucket::parse(provider, rest).map(Self::Bucket).map_err(refuse)
    }
}

/// Without what might be a secret that somebody put there.
fn shown(text: &str) -> String {
    let path = text.split('?').next().unwrap_or_default();
    path.chars().filter(|c| !c.is_control()).take(200).collect()
}

impl TryFrom<String> for Location {
    type Error = VaultError;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Location> for String {
    fn from(location: Location) -> Self {
        location.to_string()
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Bucket(bucket) => bucket.fmt(f),
            Self::Relay(relay) => relay.fmt(f),
        }
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.provider.scheme(), self.name)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        let mut before = '?';
        for name in self.provider.settings() {
            if let Some(value) = self.setting(name) {
                write!(f, "{before}{name}={value}")?;
                before = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(text: &str) -> Location {
        text.parse().unwrap()
    }

    fn refusal(text: &str) -> String {
        text.parse::<Location>().unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_understood_and_written_alike() {
        assert_eq!(location("/srv/vault"), Location::Directory("/srv/vault".into()));
        assert_eq!(location("vault"), Location::Directory("vault".into()));
        assert_eq!(location("file:///srv/vault"), Location::Directory("/srv/vault".into()));
        let texts = [
            "s3://dr",
            "s3://dr/site-a/vault?region=eu-central-1",
            "s3://dr?region=garage&endpoint=http://127.0.0.1:3900&profile=dr",
            "s3://dr?lock=governance",
            "s3://dr/vault?region=eu-central-1&lock=compliance",
            "az://dr/vault?account=highwater&endpoint=http://127.0.0.1:10000/devstoreaccount1",
            "gs://dr/vault",
            "highwater://b.example:9443?identity=/etc/highwater/relay",
            "highwater://[::1]:9443/site-a/vault?identity=/etc/highwater/relay",
        ];
        for text in texts {
            assert_eq!(location(text).to_string(), text);
            let json = serde_json::to_string(&location(text)).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Location>(&json).unwrap(), location(text));
        }
        assert_eq!(location("s3://dr/vault/"), location("s3://dr/vault"));
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_cause() {
        let refused = [
            ("", "it is empty"),
            ("ftp://x/y", "ftp:// is not known"),
            ("file://srv", "wants an absolute path"),
            ("s3://", "is no bucket"),
            ("s3://b/a//b", "is no prefix"),
            ("s3://b/../c", "is no prefix"),
            ("s3://b?account=x", "`account` is no setting of s3://"),
            ("s3://b?region=", "`region` has no value"),
            ("s3://b?region=a&region=b", "given twice"),
            ("s3://b?lock=none", "`governance` or `compliance`"),
            ("s3://b?lock=governance&lock=compliance", "given twice"),
            ("az://b?lock=governance", "`lock` is no setting of az://"),
            ("s3://b?endpoint=127.0.0.1:9000", "must begin with https://"),
            ("s3://b?endpoint=http:///", "must begin with https://"),
            ("s3://b?endpoint=https://me:secret@host", "must not hold credentials"),
            ("highwater://b:9443", "`identity` is missing"),
            ("highwater://b?identity=/i", "HOST:PORT"),
            ("highwater://b:x?identity=/i", "HOST:PORT"),
            ("highwater://:9443?identity=/i", "HOST:PORT"),
            ("highwater://b/c:9443?identity=/i", "HOST:PORT"),
            ("highwater://b:9443/..?identity=/i", "is no prefix"),
            ("highwater://b:9443?identity=", "`identity` is missing"),
            ("highwater://b:9443?identity=i", "absolute path"),
            ("highwater://b:9443?identity=/i&identity=/j", "identity"),
            ("highwater://b:9443?region=x", "`identity` is missing"),
        ];
        for (text, cause) in refused {
            assert!(refusal(text).contains(cause), "{text}: {}", refusal(text));
        }
        assert!(!refusal("s3://b?endpoint=https://me:secret@host").contains("secret"));
        assert!(!refusal("s3://b?secret-access-key=hunter2").contains("hunter2"));
        assert!(refusal(&"x".repeat(3000)).contains("longer than"));
    }
}
