//! How a vault's root key is kept: at random, once, and never but wrapped.
//!
//! # Contract
//!
//! - The root key ([`crate::VaultKey`]) is drawn when the vault is made and stays. What may change are its *wrappings*: any of several key
//!   files, passphrases and external commands opens the vault. No data is rewritten when they change.
//! - All wrappings lie together in one numbered document, `keys/<number>`; the highest number counts. It is created if absent, so
//!   of two operators at once one loses, is told ([`VaultError::KeysChanged`](crate::VaultError::KeysChanged)), and has changed nothing.
//! - A document is authenticated under the root key and names its vault and its number: whoever opens the vault finds every
//!   change that was not made by somebody who could open it. That it is not an *older* one cannot be seen from the vault alone,
//!   so older ones are deleted once a newer one is there.
//! - A crash leaves the old document, or the new one beside older ones, which the next change deletes.
//! - Everything read before it is authenticated is bounded before it costs anything: bytes, wrappings, the memory and time of a
//!   passphrase, the answer of a command.
//!
//! Layout: `docs/FORMAT.md`, section 4.

mod command;
mod document;
mod file;
mod passphrase;
mod ring;
mod source;
mod wrapping;

pub use command::KeyCommand;
pub use passphrase::Passphrase;
pub use ring::KeyRing;
pub use source::KeySource;
pub use wrapping::{Wrapping, WrappingId, WrappingKind};

#[cfg(feature = "fuzz")]
pub(crate) use document::DOCUMENT_BYTES_MAX;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use document::Document;
pub(crate) use file::{parse_hex, read_private, to_hex, write_private};
#[cfg(test)]
pub(crate) use passphrase::Cost;

/// A document with a wrapping of each kind, for fuzzers to begin with.
#[cfg(feature = "fuzz")]
pub(crate) fn sample() -> crate::Result<Vec<u8>> {
    use wrapping::{How, SEALED_BYTES};
    let sealed = || vec![7; SEALED_BYTES];
    let ways = [
        How::Root,
        How::File { sealed: sealed() },
        How::Passphrase { cost: passphrase::Cost::DEFAULT, salt: [8; 16], sealed: sealed() },
        How::Command { blob: b"a blob".to_vec(), sealed: sealed() },
    ];
    let numbered = (1..).zip(ways);
    let wrapping =
        |(n, how)| Wrapping { id: WrappingId([n; 4]), label: "x".to_owned(), created_at_ms: 9, how };
    let vault = highwater_delta::VaultId::from_bytes([5; 16]);
    let document = Document { vault, number: 3, wrappings: numbered.map(wrapping).collect() };
    document.encode(&crate::VaultKey::from_bytes(&[6; 32]))
}
