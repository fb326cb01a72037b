//! A collector on real sockets, with agents that are made up.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod access;
mod cache;
mod certificates;
mod command;
mod enrolment;
mod groups;
mod hostile;
mod ingest;
mod limits;
mod logs;
mod memory;
mod relays;
mod support;
mod verification;
