//! The vault: everything kept of the protected machines, as objects in a bucket or a directory.
//!
//! # Contract
//!
//! - The objects and one of the vault's keys (module [`keys`]) are enough to recover everything; nothing else is kept anywhere.
//! - Objects are never changed. A commit is one manifest record, created if absent: a delta is in the vault wholly
//!   or not at all, and whoever finds its number taken has been fenced and writes no more.
//! - [`MachineWriter::commit`] returns after the store has everything: with [`local_store`], after files and
//!   directories were synced.
//! - Points expire by policies, and what lay between them is merged ([`maintain`], [`policy`]), beside writers and readers.
//! - A crash leaves at most segments that no record names; the next writer takes the machine over and deletes them.
//! - Cancelling a future of a writer leaves its delta unfinished; call [`MachineWriter::abort`] or drop the writer.
//! - Everything but the objects' names is encrypted and authenticated, bound to its place; corrupted objects are
//!   typed errors, never a panic and never an allocation of a length that was not checked.
//! - Memory: a writer keeps what is stored of its machine ([`MachineState::memory_bytes`]) and, while a delta is open,
//!   [`Vault::delta_bytes_max`]; a block map keeps references to the objects it looks through ([`Vault::block_map_bytes`]); all block
//!   maps of a vault share one cache of index pages ([`Vault::with_page_cache`]) and one of chunks ([`Vault::with_chunk_cache`]).
//!
//! `docs/FORMAT.md` describes every byte.

mod clock;
pub mod erase;
mod error;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod groups;
mod hint;
mod journal;
mod key;
pub mod keys;
mod location;
pub mod maintain;
mod map;
mod maps;
pub mod pace;
mod pages;
pub mod policy;
mod record;
pub mod recover;
pub mod repair;
mod runs;
mod seal;
mod segment;
mod state;
mod store;
mod vault;
pub mod verify;
mod writer;

#[cfg(test)]
mod tests;

pub use clock::Clock;
pub use error::VaultError;
pub use key::VaultKey;
pub use keys::{KeyRing, KeySource};
pub use location::{Bucket, Location, Provider, Relay};
pub use map::BlockMap;
pub use pace::Pace;
pub use record::{DiskRecord, DiskSpan, Hold, HoldRecord, PointRecord, SegmentRef};
pub use runs::{Content, Held, Kind, ObjectName, Run, Shortcut, Trashed};
pub use state::MachineState;
pub use store::{Store, left_over, local_store, remove_left_over};
pub use vault::{Index, STATE_BYTES_MAX, Vault};
pub use writer::{DISKS_EVER_MAX, MachineWriter};

/// What this crate's functions answer.
pub type Result<T, E = VaultError> = std::result::Result<T, E>;

/// Most disks of one machine.
pub const DISKS_MAX: usize = 256;
/// Most bytes of a disk's or host's name.
pub const NAME_BYTES_MAX: usize = 255;
