//! What agent and collector have in common where they listen: connections with bounded places, and HTTP on top.
//!
//! **Limits.** A port has so many places; a newcomer beyond them takes the place of the one that has had its own longest, so
//! those who only hold places cannot keep anybody out. An HTTP connection must send each header within
//! [`Limits::header`] and lasts [`Limits::connection`] at most, whatever it does; its buffers are 64 KiB at most.

mod http;
mod places;

pub use http::{Limits, Metrics, Reply, http, reply, serve_metrics};
pub use places::{Place, accept};
