//! The address of a vault at another collector: `highwater://HOST:PORT[/PREFIX]?identity=DIR`.

use super::prefix_of;
use highwater_relay::client::Address;
use highwater_wire::enroll::split_endpoint;
use std::{fmt, path::PathBuf};

/// Another collector, and where in what it keeps for this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relay {
    /// Where it is, and how this one shows who it is.
    pub address: Address,
    /// What all names begin with; empty, or parts separated by `/`.
    pub prefix: String,
}

impl Relay {
    pub(super) const SCHEME: &str = "highwater";

    pub(super) fn parse(rest: &str) -> Result<Self, String> {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (endpoint, prefix) = path.split_once('/').unwrap_or((path, ""));
        let (host, port) = split_endpoint(endpoint)
            .map_err(|_| format!("{endpoint:?} is no HOST:PORT, like dr.example.com:9443"))?;
        let identity = query.strip_prefix("identity=").filter(|identity| !identity.is_empty());
        let identity = identity.ok_or("`identity` is missing: the directory that `relay join` wrote")?;
        if !identity.starts_with('/')
            || identity.contains(['&', '?', '#'])
            || identity.contains(char::is_control)
        {
            return Err("`identity` must be one absolute path, without `&`, `?` and `#`".to_owned());
        }
        let address = Address { host, port, identity: PathBuf::from(identity) };
        Ok(Self { address, prefix: prefix_of(prefix)? })
    }
}

impl fmt::Display for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { host, port, identity } = &self.address;
        match host.contains(':') {
            true => write!(f, "{}://[{host}]:{port}", Self::SCHEME)?,
            false => write!(f, "{}://{host}:{port}", Self::SCHEME)?,
        }
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        write!(f, "?identity={}", identity.display())
    }
}
