//! Who belongs to a replication group, where each member is reached, and how often markers are made: signed by the vault's authority, so
//! that members believe it whoever hands it to them.
//!
//! Of two rosters of one group the one with the greater (epoch, issue time) holds. The epoch is that of the membership and changes with it;
//! addresses, revocations and times change without.

use crate::codec::at_most;
use crate::identity::Authority;
use crate::message::MAX_NAME_BYTES;
use crate::{WireError, certificate, tls};
use highwater_delta::{GroupId, MachineId};
use highwater_group::{MEMBERS_MAX, Membership, Timing};
use rustls::SignatureScheme;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Most bytes of a roster.
pub const ROSTER_BYTES_MAX: usize = 128 * 1024;
/// Most bytes of its signature.
const SIGNATURE_BYTES_MAX: usize = 256;
/// What is signed begins with this, so that no signature for anything else serves here, nor this one elsewhere.
const DOMAIN: &[u8] = b"highwater roster 1\0";

/// A group as its members know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// Which.
    pub group: GroupId,
    /// For people.
    pub name: String,
    /// Raised whenever members come or go.
    pub epoch: u64,
    /// When it was signed, by the collector's clock, in milliseconds since 1970.
    pub issued_ms: u64,
    /// All members.
    pub members: Vec<RosterMember>,
    /// Between crash-consistent points, in milliseconds; none: none by themselves.
    pub crash_every_ms: Option<u64>,
    /// Between application-consistent points.
    pub application_every_ms: Option<u64>,
    /// How long a member's hooks may take to be prepared.
    pub prepare_max_ms: u64,
    /// How long a member may be frozen for a marker.
    pub hold_max_ms: u64,
}

/// A member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RosterMember {
    /// Which machine.
    pub machine: MachineId,
    /// For people.
    pub host_name: String,
    /// `host:port`; none: not known yet, and others must be called by it.
    pub address: Option<String>,
    /// Certificates of an earlier generation are revoked.
    pub generation_min: u32,
}

/// A roster with the authority's signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRoster {
    /// [`Roster`], in postcard.
    pub roster: Vec<u8>,
    /// ECDSA P-256 with SHA-256, as in certificates.
    pub signature: Vec<u8>,
}

impl Roster {
    /// Signs it.
    ///
    /// # Errors
    /// It is beyond a limit, or cannot be signed.
    pub fn sign(&self, authority: &Authority) -> Result<SignedRoster, WireError> {
        self.check()?;
        let roster = postcard::to_stdvec(self)
            .map_err(|_| WireError::BadMessage("a roster that cannot be encoded"))?;
        at_most(roster.len() as u64, ROSTER_BYTES_MAX as u64, "a roster that is too long")?;
        let signature = authority.sign(&signed_bytes(&roster))?;
        Ok(SignedRoster { roster, signature })
    }

    /// Reads one, whoever has signed it.
    ///
    /// # Errors
    /// It is none, or beyond a limit.
    pub fn read(bytes: &[u8]) -> Result<Self, WireError> {
        let (roster, rest) = postcard::take_from_bytes::<Self>(bytes)
            .map_err(|_| WireError::BadMessage("a roster of another version"))?;
        if !rest.is_empty() {
            return Err(WireError::BadMessage("bytes follow a roster"));
        }
        roster.check()?;
        Ok(roster)
    }

    /// The members, for the protocol.
    ///
    /// # Errors
    /// None, too many, or one twice.
    pub fn membership(&self) -> Result<Membership, WireError> {
        Membership::new(self.epoch, self.members.iter().map(|member| member.machine).collect())
            .map_err(|_| WireError::BadMessage("a roster without members, with too many, or with one twice"))
    }

    /// A member.
    #[must_use]
    pub fn member(&self, machine: MachineId) -> Option<&RosterMember> {
        self.members.iter().find(|member| member.machine == machine)
    }

    /// Which of two of one group holds: the greater.
    #[must_use]
    pub fn order(&self) -> (u64, u64) {
        (self.epoch, self.issued_ms)
    }

    /// The times of the protocol.
    #[must_use]
    pub fn timing(&self) -> Timing {
        let usual = Timing::default();
        let hold_max = self.hold_max_ms;
        Timing {
            crash_every: self.crash_every_ms,
            application_every: self.application_every_ms,
            prepare_max: self.prepare_max_ms,
            hold_max,
            // Who is frozen first waits for the last: half of its time, so that the mark comes in time.
            freeze_max: (hold_max / 2).max(1),
            mark_max: hold_max.max(usual.mark_max),
            ..usual
        }
    }

    fn check(&self) -> Result<(), WireError> {
        at_most(self.members.len() as u64, MEMBERS_MAX as u64, "too many members")?;
        self.membership()?;
        let texts = self.members.iter().map(|m| &m.host_name).chain(std::iter::once(&self.name));
        for text in texts.chain(self.members.iter().filter_map(|m| m.address.as_ref())) {
            at_most(text.len() as u64, MAX_NAME_BYTES as u64 + 8, "a name is too long")?;
        }
        let times = [self.crash_every_ms, self.application_every_ms].into_iter().flatten();
        let day = Duration::from_secs(86_400).as_millis() as u64;
        if times.clone().any(|every| every < 1000)
            || times.chain([self.prepare_max_ms, self.hold_max_ms]).any(|time| time == 0 || time > 366 * day)
            || self.hold_max_ms > 60_000
        {
            return Err(WireError::BadMessage("a roster with times beyond their limits"));
        }
        Ok(())
    }
}

impl SignedRoster {
    /// Reads it, if the authority with this certificate has signed it.
    ///
    /// # Errors
    /// It has not, or what it signed is no roster.
    pub fn open(&self, ca: &CertificateDer<'_>) -> Result<Roster, WireError> {
        let refuse = || WireError::BadMessage("a roster that the vault's authority has not signed");
        let parsed = certificate::parse(ca)?;
        let key = &parsed.public_key().subject_public_key.data;
        let provider = tls::provider();
        let mapping = provider.signature_verification_algorithms.mapping;
        let algorithms = mapping.iter().find(|(scheme, _)| *scheme == SignatureScheme::ECDSA_NISTP256_SHA256);
        // Of the several for this scheme, the one for this key is first.
        let algorithm = algorithms.and_then(|(_, all)| all.first()).ok_or_else(refuse)?;
        algorithm
            .verify_signature(key, &signed_bytes(&self.roster), &self.signature)
            .map_err(|_| refuse())?;
        Roster::read(&self.roster)
    }

    pub(crate) fn check(&self) -> Result<(), WireError> {
        at_most(self.roster.len() as u64, ROSTER_BYTES_MAX as u64, "a roster that is too long")?;
        at_most(self.signature.len() as u64, SIGNATURE_BYTES_MAX as u64, "a signature that is too long")
    }
}

fn signed_bytes(roster: &[u8]) -> Vec<u8> {
    [DOMAIN, roster].concat()
}

#[cfg(test)]
mod tests;
