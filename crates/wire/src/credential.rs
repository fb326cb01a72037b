//! What a machine's certificate says: who, of which generation, and for how long.
//!
//! A machine's certificates are numbered by generation. Every renewal keeps the generation; a machine that was revoked
//! and is enrolled again gets the next one. So a revocation ends whatever was issued up to some generation, and nothing
//! that is issued afterwards. A certificate that names no generation is of generation 0.
//!
//! Those of relays (collectors that keep their vault at another one) are made alike. A certificate is of one role: one that names
//! a machine and a relay is neither's.

use crate::WireError;
use crate::certificate::{MACHINE_URI_PREFIX, RELAY_URI_PREFIX, hex, parse, uris};
use highwater_delta::{MachineId, RelayId};
use rustls_pki_types::CertificateDer;
use std::time::Duration;

/// Beginning of the URI name that tells the generation; a decimal number follows.
pub const GENERATION_URI_PREFIX: &str = "urn:highwater:generation:";

/// A machine's certificate, taken apart. Says nothing about who issued it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// The machine it names.
    pub machine: MachineId,
    /// Its generation.
    pub generation: u32,
    /// Serial number, in lower-case hexadecimal.
    pub serial: String,
    /// Valid from, in milliseconds since 1970.
    pub not_before_ms: u64,
    /// Valid until, in milliseconds since 1970.
    pub expires_ms: u64,
}

impl Credential {
    /// Reads a certificate. It must name exactly one machine, and at most one generation.
    pub fn of(cert: &CertificateDer<'_>) -> Result<Self, WireError> {
        let what = "the machine's certificate";
        let said = Said::of(cert, MACHINE_URI_PREFIX, what, "it does not name exactly one machine")?;
        Ok(Self {
            machine: said.id.parse().map_err(|e| WireError::identity(what, e))?,
            generation: said.generation,
            serial: said.serial,
            not_before_ms: said.not_before_ms,
            expires_ms: said.expires_ms,
        })
    }

    /// The whole time for which it is valid.
    #[must_use]
    pub const fn validity(&self) -> Duration {
        Duration::from_millis(self.expires_ms.saturating_sub(self.not_before_ms))
    }

    /// From when on it should be renewed: a third of its validity is left.
    #[must_use]
    pub const fn renewal_due_ms(&self) -> u64 {
        renewal_due_ms(self.not_before_ms, self.expires_ms)
    }
}

/// A relay's certificate, taken apart. Says nothing about who issued it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayCredential {
    /// The relay it names.
    pub relay: RelayId,
    /// Its generation.
    pub generation: u32,
    /// Serial number, in lower-case hexadecimal.
    pub serial: String,
    /// Valid from, in milliseconds since 1970.
    pub not_before_ms: u64,
    /// Valid until, in milliseconds since 1970.
    pub expires_ms: u64,
}

impl RelayCredential {
    /// Reads a certificate. It must name exactly one relay, and at most one generation.
    pub fn of(cert: &CertificateDer<'_>) -> Result<Self, WireError> {
        let what = "the relay's certificate";
        let said = Said::of(cert, RELAY_URI_PREFIX, what, "it does not name exactly one relay")?;
        Ok(Self {
            relay: said.id.parse().map_err(|e| WireError::identity(what, e))?,
            generation: said.generation,
            serial: said.serial,
            not_before_ms: said.not_before_ms,
            expires_ms: said.expires_ms,
        })
    }

    /// From when on it should be renewed: a third of its validity is left.
    #[must_use]
    pub const fn renewal_due_ms(&self) -> u64 {
        renewal_due_ms(self.not_before_ms, self.expires_ms)
    }
}

const fn renewal_due_ms(not_before_ms: u64, expires_ms: u64) -> u64 {
    expires_ms - expires_ms.saturating_sub(not_before_ms) / 3
}

/// What certificates of both roles say.
struct Said {
    id: String,
    generation: u32,
    serial: String,
    not_before_ms: u64,
    expires_ms: u64,
}

impl Said {
    fn of(
        cert: &CertificateDer<'_>,
        prefix: &str,
        what: &'static str,
        not_one: &str,
    ) -> Result<Self, WireError> {
        let unusable = |cause: &str| WireError::identity(what, cause);
        let uris = uris(cert)?;
        let named = |prefix: &str| uris.iter().filter(|uri| uri.starts_with(prefix)).count();
        let ids = uris.iter().find_map(|uri| uri.strip_prefix(prefix));
        let Some(id) = ids.filter(|_| named(MACHINE_URI_PREFIX) + named(RELAY_URI_PREFIX) == 1) else {
            return Err(unusable(not_one));
        };
        let mut generations = uris.iter().filter_map(|uri| uri.strip_prefix(GENERATION_URI_PREFIX));
        let generation = match (generations.next(), generations.next()) {
            (None, _) => 0,
            (Some(number), None) => number.parse().map_err(|_| unusable("its generation is no number"))?,
            _ => return Err(unusable("it names several generations")),
        };
        let parsed = parse(cert)?;
        let ms = |seconds: i64| u64::try_from(seconds).unwrap_or(0).saturating_mul(1000);
        Ok(Self {
            id: id.to_owned(),
            generation,
            serial: hex(parsed.raw_serial()),
            not_before_ms: ms(parsed.validity().not_before.timestamp()),
            expires_ms: ms(parsed.validity().not_after.timestamp()),
        })
    }
}
