//! wire
pub mod message;
