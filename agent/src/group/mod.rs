//! The machine as a member of a replication group: port 20004.
//!
//! ```text
//!  collector ──(9443)── link ──► owner ◄──► peers ──(20004, TLS)── other members
//!                                  │ ▲
//!                      ToEngine    ▼ │ FromEngine
//!                                engine (freezes, makes the point)
//! ```
//!
//! One task owns the protocol's state ([`highwater_group::Machine`]) and does what it says; connections are tasks of their own, which move
//! messages and decide nothing. Who belongs to the group, and where, is told by a roster that the vault's authority has signed.
//!
//! **What a peer can do.** Whoever has no certificate of the authority, or is no member by the roster, is not listened to. A member can ask for
//! markers, but not keep this machine frozen beyond its limits, nor for most of the time, and not speak for another member. Frames are bounded before
//! they are allocated; what cannot be sent at once is dropped, and said again by the protocol.
//!
//! **What an end of the process leaves.** Nothing: the next life has another number, and takes part in no marker of this one.

mod owner;
mod peers;
mod status;
#[cfg(test)]
mod tests;

pub use owner::{Options, Told, run};
pub use status::{GroupStatus, MarkerStatus, SharedStatus};

use highwater_delta::CommitId;
use highwater_group::{Kind, Marker};
use highwater_wire::message::AgentMessage;
use std::time::Duration;

/// How long a freeze for the group may take, and last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreezeLimits {
    /// All members together may take so long to be frozen.
    pub within: Duration,
    /// A member stays frozen for so long at most.
    pub hold: Duration,
}

/// What the engine is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToEngine {
    /// Prepare for a freeze; answered by [`FromEngine::Prepared`].
    Prepare {
        /// For this.
        marker: Marker,
        /// What.
        kind: Kind,
    },
    /// Freeze; answered by [`FromEngine::Frozen`].
    Freeze {
        /// For this.
        marker: Marker,
        /// Within these.
        limits: FreezeLimits,
    },
    /// Thaw, and make the point; answered by [`FromEngine::Kept`].
    Keep {
        /// Of this.
        marker: Marker,
    },
    /// End it, whatever has been done.
    Drop {
        /// Of this.
        marker: Marker,
    },
    /// Say this to the collector, if there is a session.
    Tell(AgentMessage),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromEngine {
    /// See [`ToEngine::Prepare`].
    Prepared {
        /// Of this.
        marker: Marker,
        /// Whether it is.
        done: bool,
    },
    /// See [`ToEngine::Freeze`].
    Frozen {
        /// For this.
        marker: Marker,
        /// Whether it is.
        done: bool,
    },
    /// See [`ToEngine::Keep`].
    Kept {
        /// Of this.
        marker: Marker,
        /// Everything stood still until the word came.
        intact: bool,
    },
    /// What was kept will not be a point.
    Lost {
        /// Of this.
        marker: Marker,
    },
    /// The point is stored.
    Stored {
        /// Of this.
        marker: Marker,
        /// As this commit.
        commit: CommitId,
        /// Taken then, ms since 1970.
        taken_at_ms: u64,
    },
}
