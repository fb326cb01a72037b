//! What can go wrong between an agent and a collector, each with a stable code, a cause and what to do.

use crate::message::Refusal;
use highwater_delta::{MachineId, RelayId};
use std::time::Duration;

/// An error of a session, of an identity or of an enrolment.
///
/// The text is the cause; [`WireError::code`], [`WireError::action`] and [`WireError::retry`] say the rest.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The network failed.
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// Nothing came or went for too long.
    #[error("the peer was silent for {after:?} while {what}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The peer went away in the middle of a frame.
    #[error("the connection ended in the middle of a frame")]
    Truncated,
    /// The peer went away between frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The bytes are no frame.
    #[error("the peer sent something that is no frame: {0}")]
    BadFrame(&'static str),
    /// A frame is longer than its kind may be.
    #[error("a frame of {bytes} bytes exceeds the limit of {bytes_max}")]
    Oversized {
        /// As announced.
        bytes: u64,
        /// The limit of its kind.
        bytes_max: u64,
    },
    /// A frame was lost or repeated.
    #[error("frame {expected} was due, frame {found} came: one was lost, repeated or replayed")]
    Sequence {
        /// What was due.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// A control body is no message.
    #[error("a message could not be read: {0}")]
    BadMessage(&'static str),
    /// A message that may not come now.
    #[error("an unexpected message: {0}")]
    Unexpected(&'static str),
    /// No version in common.
    #[error(
        "no common protocol version: the peer speaks {peer_min} to {peer_max}, this side {own_min} to {own_max}"
    )]
    NoCommonVersion {
        /// Lowest of the peer.
        peer_min: u16,
        /// Highest of the peer.
        peer_max: u16,
        /// Lowest of this side.
        own_min: u16,
        /// Highest of this side.
        own_max: u16,
    },
    /// The collector refused.
    #[error("refused by the collector (HW-{:04}): {}", .0.code, .0.cause)]
    Refused(Refusal),
    /// The TLS handshake failed.
    #[error("the TLS handshake failed: {0}")]
    Handshake(String),
    /// The name or address of the collector is unusable.
    #[error("{0:?} is no usable address: {1}")]
    Address(String, &'static str),
    /// A certificate, key or request is unusable.
    #[error("{what} is unusable: {cause}")]
    Identity {
        /// Which.
        what: String,
        /// Why.
        cause: String,
    },
    /// A file of an identity.
    #[error("{path}: {source}")]
    File {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The enrolment token is malformed.
    #[error("the enrolment token is malformed: {0}")]
    BadToken(&'static str),
    /// The collector's management endpoint refused the enrolment.
    #[error("the enrolment was refused with HTTP status {status}: {cause}")]
    EnrolRefused {
        /// HTTP status.
        status: u16,
        /// What the collector said.
        cause: String,
        /// What it said to do.
        action: Option<String>,
    },
    /// The collector shown does not belong to the token.
    #[error("the collector's certificate does not belong to this token: {0}")]
    WrongCollector(String),
    /// What answers at the address is no collector's management endpoint.
    #[error("no Highwater collector answers at {0}: it does not speak its protocol")]
    NoCollector(String),
    /// The machine was locked out.
    #[error("the certificate of machine {0} has been revoked")]
    Revoked(MachineId),
    /// The relay was locked out.
    #[error("the certificate of relay {0} has been revoked")]
    RelayRevoked(RelayId),
    /// An earlier write was cancelled or failed: the stream's state is unknown.
    #[error("the session was broken by an earlier failed or cancelled write")]
    Poisoned,
}

impl WireError {
    /// Stable number, shown as `HW-1234`. A refusal carries the collector's own.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Io(_) => 1101,
            Self::TimedOut { .. } => 1102,
            Self::Truncated => 1103,
            Self::Closed => 1104,
            Self::BadFrame(_) => 1105,
            Self::Oversized { .. } => 1106,
            Self::Sequence { .. } => 1107,
            Self::BadMessage(_) => 1108,
            Self::Unexpected(_) => 1109,
            Self::NoCommonVersion { .. } => 1110,
            Self::Refused(refusal) => refusal.code,
            Self::Handshake(_) => 1111,
            Self::Address(..) => 1112,
            Self::Identity { .. } => 1113,
            Self::File { .. } => 1114,
            Self::BadToken(_) => 1115,
            Self::EnrolRefused { .. } => 1116,
            Self::WrongCollector(_) => 1117,
            Self::Poisoned => 1118,
            Self::Revoked(_) => 1119,
            Self::NoCollector(_) => 1120,
            Self::RelayRevoked(_) => 1121,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn action(&self) -> String {
        match self {
            Self::Io(_) | Self::TimedOut { .. } | Self::Truncated | Self::Closed => {
                "check that the collector runs and that its port can be reached; it is tried again by itself"
            }
            Self::BadFrame(_) | Self::Oversized { .. } | Self::Sequence { .. } => {
                "the connection is closed and opened anew; if this repeats, something between the two alters the data"
            }
            Self::BadMessage(_) | Self::Unexpected(_) => {
                "check that agent and collector are releases that belong together"
            }
            Self::NoCommonVersion { .. } => "upgrade the older of the two",
            Self::Refused(refusal) => return refusal.action.clone(),
            Self::Handshake(_) => {
                "check the clocks of both machines, and that the agent was enrolled with this collector's vault"
            }
            Self::Address(..) => "give HOST:PORT, or https://HOST[:PORT] for an enrolment",
            Self::Identity { .. } => "enrol the machine again with a new token",
            Self::File { .. } => "check that the file exists and may be read and written by root",
            Self::BadToken(_) => "copy the whole token as `highwater-collector token create` printed it",
            Self::EnrolRefused { action: Some(action), .. } => return action.clone(),
            Self::EnrolRefused { .. } => "create a new token with `highwater-collector token create`",
            Self::WrongCollector(_) => "check the address; use a token of the collector that answers there",
            Self::NoCollector(_) => "give the address and the port of the collector's `management-listen`",
            Self::Poisoned => "the connection is opened anew by itself",
            Self::RelayRevoked(relay) => {
                return format!(
                    "if it is to come back: `highwater-collector relay token --relay {relay}` at the collector that keeps its \
                     objects, then `highwater-collector relay join --again URL - --identity DIR` at the other"
                );
            }
            Self::Revoked(machine) => {
                return format!(
                    "if the machine is to come back: `highwater-collector token create --machine {machine}` at the \
                     collector, then `highwater-agent enroll --again URL -` on the machine, and restart its agent"
                );
            }
        }
        .to_owned()
    }

    /// Whether trying again, unchanged, can succeed.
    #[must_use]
    pub const fn retry(&self) -> bool {
        match self {
            Self::Io(_)
            | Self::TimedOut { .. }
            | Self::Truncated
            | Self::Closed
            | Self::BadFrame(_)
            | Self::Oversized { .. }
            | Self::Sequence { .. }
            | Self::Handshake(_)
            | Self::Poisoned => true,
            Self::Refused(refusal) => refusal.retry,
            Self::EnrolRefused { status, .. } => *status == 429 || *status >= 500,
            Self::BadMessage(_)
            | Self::Unexpected(_)
            | Self::NoCommonVersion { .. }
            | Self::Address(..)
            | Self::Identity { .. }
            | Self::File { .. }
            | Self::BadToken(_)
            | Self::WrongCollector(_)
            | Self::NoCollector(_)
            | Self::Revoked(_)
            | Self::RelayRevoked(_) => false,
        }
    }

    /// The error as a refusal that ends the session.
    #[must_use]
    pub fn to_refusal(&self) -> Refusal {
        Refusal {
            code: self.code(),
            cause: self.to_string(),
            action: self.action(),
            retry: self.retry(),
            fatal: true,
        }
    }

    pub(crate) fn identity(what: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self::Identity { what: what.into(), cause: cause.to_string() }
    }
}
