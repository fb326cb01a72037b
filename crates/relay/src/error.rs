//! What can go wrong between a relay and the collector that keeps its objects, each with a stable code, a cause and what to do.

use crate::Name;
use highwater_wire::WireError;
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Why a request of a relay was refused, or failed.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Of the connection, or of an identity.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Not the name of an object.
    #[error("{0:?} is no name of an object")]
    Name(String),
    /// Not a request.
    #[error("the request is not understood: {0}")]
    BadRequest(&'static str),
    /// A body is too long.
    #[error("{bytes} bytes at once; {bytes_max} are allowed")]
    TooLarge {
        /// As announced.
        bytes: u64,
        /// Allowed.
        bytes_max: u64,
    },
    /// No such object.
    #[error("there is no object {0}")]
    NotFound(String),
    /// An object is there already.
    #[error("object {0} exists already")]
    Exists(String),
    /// The store behind does not delete an object yet.
    #[error("the store of the other collector keeps object {0}")]
    Kept(String),
    /// Nothing of an object lies there.
    #[error("the range lies behind the end of object {0}")]
    Range(String),
    /// The upload is not known, or was given up.
    #[error("the upload of {0} is not known: it was interrupted")]
    UploadGone(String),
    /// A part that is not the next one.
    #[error("a part of an upload is out of turn: {0}")]
    OutOfTurn(&'static str),
    /// Too much at once.
    #[error("the collector is at its limit for relays: {0}")]
    Busy(&'static str),
    /// The peer is too slow.
    #[error("the peer was too slow: nothing, or too little, came for {0:?}")]
    Slow(Duration),
    /// The body was not what was announced.
    #[error("the body broke off")]
    BrokenOff,
    /// The store behind.
    #[error("the store of the other collector failed: {0}")]
    Store(String),
    /// An answer that cannot be one.
    #[error("the answer of the other collector is not understood: {0}")]
    BadAnswer(&'static str),
    /// Refused by the other side.
    #[error("refused by the other collector ({}): {}", .0.code, .0.cause)]
    Refused(Refusal),
    /// It was tried for long enough.
    #[error("tried in vain for {for_:?}: {last}")]
    GivenUp {
        /// How long.
        for_: Duration,
        /// The last error.
        last: Box<RelayError>,
    },
}

/// What the server answers when it refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// `HW-1234`.
    pub code: String,
    /// What is wrong.
    pub cause: String,
    /// What to do.
    pub action: String,
    /// Whether trying again, unchanged, can succeed.
    pub retry: bool,
}

impl RelayError {
    /// Stable number, shown as `HW-1234`.
    #[must_use]
    pub fn code(&self) -> u16 {
        match self {
            Self::Wire(error) => error.code(),
            Self::Name(_) => 1601,
            Self::BadRequest(_) => 1602,
            Self::TooLarge { .. } => 1603,
            Self::NotFound(_) => 1604,
            Self::Exists(_) => 1605,
            Self::Range(_) => 1606,
            Self::UploadGone(_) => 1607,
            Self::OutOfTurn(_) => 1608,
            Self::Busy(_) => 1609,
            Self::Slow(_) => 1610,
            Self::BrokenOff => 1611,
            Self::Store(_) => 1612,
            Self::BadAnswer(_) => 1613,
            Self::Kept(_) => 1614,
            Self::Refused(refusal) => {
                refusal.code.strip_prefix("HW-").and_then(|code| code.parse().ok()).unwrap_or(1613)
            }
            Self::GivenUp { last, .. } => last.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn action(&self) -> String {
        match self {
            Self::Wire(error) => return error.action(),
            Self::Refused(refusal) => return refusal.action.clone(),
            Self::GivenUp { last, .. } => return last.action(),
            Self::Name(_) | Self::BadRequest(_) | Self::BadAnswer(_) | Self::Range(_) | Self::OutOfTurn(_) => {
                "check that both collectors are releases that belong together"
            }
            Self::TooLarge { .. } => "raise `relay-memory` in collector.toml of the collector that keeps the objects",
            Self::NotFound(_) | Self::Exists(_) | Self::Kept(_) => "nothing; whoever asked knows what to do",
            Self::UploadGone(_) => "the delta is sent anew by itself",
            Self::Busy(_) => {
                "it is tried again by itself; if it repeats, raise `relay-memory` in collector.toml of the collector that keeps the objects"
            }
            Self::Slow(_) | Self::BrokenOff => "check the network between the two collectors; it is tried again by itself",
            Self::Store(_) => "look into the log and at the storage of the collector that keeps the objects",
        }
        .to_owned()
    }

    /// Whether trying again, unchanged, can succeed.
    #[must_use]
    pub fn retry(&self) -> bool {
        match self {
            // Whoever is at the address has another certificate: that does not pass by itself.
            Self::Wire(WireError::Handshake(_)) => false,
            Self::Wire(error) => error.retry(),
            Self::Refused(refusal) => refusal.retry,
            Self::Busy(_) | Self::Slow(_) | Self::BrokenOff | Self::Store(_) => true,
            _ => false,
        }
    }

    pub(crate) const fn status(&self) -> StatusCode {
        match self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Exists(_) => StatusCode::CONFLICT,
            Self::Kept(_) => StatusCode::LOCKED,
            Self::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::UploadGone(_) => StatusCode::GONE,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Slow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Store(_) => StatusCode::BAD_GATEWAY,
            Self::Wire(_) => StatusCode::FORBIDDEN,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    pub(crate) fn refusal(&self) -> Refusal {
        if let Self::Refused(refusal) = self {
            return refusal.clone();
        }
        Refusal {
            code: format!("HW-{:04}", self.code()),
            cause: self.to_string().chars().take(1000).collect(),
            action: self.action(),
            retry: self.retry(),
        }
    }

    /// As an object store's error of this name.
    pub(crate) fn of_store(self, name: &Name) -> object_store::Error {
        use object_store::Error;
        let path = name.to_string();
        match &self {
            Self::NotFound(_) => Error::NotFound { path, source: self.into() },
            Self::Exists(_) => Error::AlreadyExists { path, source: self.into() },
            Self::Kept(_) | Self::Wire(WireError::RelayRevoked(_)) => {
                Error::PermissionDenied { path, source: self.into() }
            }
            _ => Error::Generic { store: "relay", source: self.into() },
        }
    }
}
