//! The side that keeps the objects: answers a relay's requests out of a store of its own.
//!
//! **Order.** Requests of one connection are answered one after another; those of one upload too, whatever connections they come on.
//! **Cancellation.** Work on the store that has begun goes on when the connection ends, so that no object is left half done by that;
//! its memory is given back only then. **Limits.** See the constants, and [`Relays::new`].

mod area;
mod body;
mod guard;
mod serve;
mod uploads;

pub use area::{CONNECTIONS_MAX, Relays};
pub use body::{BODY_BYTES_A_SECOND, BODY_IDLE_MAX};
pub use uploads::{UPLOAD_IDLE_MAX, UPLOADS_MAX};

use crate::RelayError;
use async_trait::async_trait;
use highwater_delta::RelayId;

/// What the server tells of its work. All of it is called often, and must not block.
pub trait Meter: Send + Sync {
    /// A request was understood; `kind` is one of few.
    fn request(&self, kind: &'static str);
    /// So much of a body came.
    fn received(&self, bytes: u64);
    /// So much of an object goes out.
    fn sent(&self, bytes: u64);
    /// A request was refused, or failed. Objects that are not there, or there already, are no refusals.
    fn refused(&self, relay: RelayId, error: &RelayError);
}

/// Who may go on, and with which certificate: of one connection.
#[async_trait]
pub trait Gate: Send + Sync {
    /// Whether the connection's certificate still holds. Asked before each request, and now and then.
    ///
    /// # Errors
    /// Why not.
    fn admits(&self) -> Result<(), RelayError>;
    /// A new certificate for the relay, as PEM.
    ///
    /// # Errors
    /// Why not.
    async fn renew(&self, csr_pem: &str) -> Result<String, RelayError>;
}
