//! A relay: a collector that keeps its vault at another collector, which so is its object store.
//!
//! ```text
//! site A: vault ── client (ObjectStore) ── mutual TLS, ALPN highwater-store/1, HTTP/1.1 ── server ── site B's own store
//! ```
//!
//! # Contract
//!
//! - What is put, or completed, is answered after the other side's store has it durably: *stored* means stored there.
//! - A relay reaches the objects beneath `relays/<its id>/` of the other side's store, and no others: names are checked by both sides
//!   ([`Name`]), and whose area it is, is said by the certificate alone. What the objects hold is opaque to the other side.
//! - An object appears wholly or not at all. A body that breaks off is thrown away; an upload that nobody goes on with is given up
//!   after [`server::UPLOAD_IDLE_MAX`]; one that a crash of the other side interrupts is lost, and its client told so.
//! - A request that fails is tried again for [`client::RETRY_MAX`]. So a create may be made twice, and the second finds the first: it is
//!   told as existing, and whoever asked compares, as with buckets. A delete that is repeated succeeds.
//! - Memory of the server: bodies of requests and pages of listings are taken out of a budget before they are read; besides, a
//!   connection costs its buffers of 64 KiB each way. A relay has [`server::CONNECTIONS_MAX`] connections and [`server::UPLOADS_MAX`] uploads.
//!
//! `docs/PROTOCOL.md` describes the requests.

pub mod client;
mod error;
mod headers;
mod name;
mod page;
pub mod request;
pub mod server;

#[cfg(test)]
mod tests;

pub use client::Client;
pub use error::{Refusal, RelayError};
pub use name::Name;
pub use request::Request;

/// Most bytes of a request's body that is no object: a signing request.
pub const SMALL_BODY_BYTES_MAX: u64 = 16 * 1024;
/// Most bytes of an answer that is no object.
pub(crate) const ANSWER_BYTES_MAX: usize = 8 << 20;
