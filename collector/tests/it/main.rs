//! A collector on real sockets, with agents that are made up.

mod command;
mod enrolment;
mod hostile;
mod ingest;
mod support;
