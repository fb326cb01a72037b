//! The collector: receives deltas of many machines and keeps them in a vault.
//!
//! ```text
//! port 9443  accept ── TLS ── session (one owner task a machine) ── MachineWriter ── vault
//!                         relay (another collector's objects) ── the vault's store
//! port  443  management: enrolment, health
//! port 9464  metrics
//! ```
//!
//! The collector has no state of its own: authority, tokens, certificates, revocations and claims of disks are sealed documents in the vault, so
//! that it may be killed at any time and replaced by another one with the same key.

pub mod access;
pub mod authority;
pub mod bucket;
pub mod cache;
pub mod certificates;
pub mod clock;
pub mod config;
pub mod error;
pub mod groups;
pub mod holder;
pub mod init;
pub mod lock;
mod log_limit;
pub mod maintenance;
pub mod management;
pub mod memory;
pub mod metrics;
mod per_peer;
pub mod relays;
pub mod rounds;
pub mod server;
pub mod session;
pub mod shared;
pub mod state_dir;
pub mod tokens;
pub mod units;
pub mod verification;
pub mod visits;

pub use config::Config;
pub use error::CollectorError;
pub use server::{Collector, Running};
