//! Sessions between an agent and a collector, and between members of a group: frames, messages, identities, TLS and enrolment.
//!
//! ```text
//! message ── codec ── frame ── session ── tls ── client
//!                                          │
//!                          identity ───────┴──── enroll
//! ```
//!
//! `frame`, `codec`, `version`, `window` and `backoff` are pure. Everything that a peer sends is bounded before it is
//! allocated, and every way it can be wrong is a [`WireError`]. `docs/PROTOCOL.md` describes bytes and order.

pub mod backoff;
pub mod certificate;
pub mod client;
pub mod codec;
pub mod credential;
pub mod enroll;
pub mod error;
pub mod files;
pub mod frame;
pub mod identity;
pub mod message;
pub mod papers;
pub mod peer;
pub mod printable;
pub mod roster;
pub mod session;
pub mod tls;
pub mod version;
pub mod window;

pub use backoff::{Backoff, Failure};
pub use client::{Identity, SessionReceiver, SessionSender, connect};
pub use credential::{Credential, RelayCredential};
pub use error::WireError;
pub use papers::RelayIdentity;
pub use peer::PeerMessage;
pub use roster::{Roster, RosterMember, SignedRoster};
pub use session::{Frame, FrameReader, FrameWriter, Timeouts};
pub use version::Version;
pub use window::SendWindow;
