//! The mobility service: tracks the writes of a machine's protected disks with eBPF and ships them to a collector.
//!
//! Data flows one way: `tracker` (which blocks changed) → `engine` (what to send, and when a state is a recovery
//! point) → `source` (reads them) → the session of `highwater-wire`.

pub mod capture;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod error;
pub mod freeze;
pub mod group;
pub mod guardian;
pub mod guests;
pub mod hooks;
pub mod left;
mod memory;
pub mod metrics;
pub mod mounts;
pub mod pulse;
pub mod source;
pub mod throttle;
pub mod tracker;
pub mod units;
