//! One wrapping of the root key: sealed under a key that a file holds, a passphrase stands for, or a command knows.
//!
//! The root key is sealed as documents are (module `seal`: a fresh key for each sealing), bound to the vault and to the wrapping's id:
//! a wrapping moved to another vault, or in the place of another, does not open.

use super::{command::BLOB_BYTES_MAX, passphrase::Cost};
use crate::{
    Result, VaultError, VaultKey,
    key::{Secret, random},
    seal,
};
use highwater_delta::VaultId;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use zeroize::Zeroizing;

/// Bytes of a sealed root key.
pub(super) const SEALED_BYTES: usize = 32 + seal::OVERHEAD_BYTES as usize;
/// Most bytes of a label.
pub(super) const LABEL_BYTES_MAX: usize = 64;

/// Tells wrappings of a vault apart: 8 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WrappingId(pub(super) [u8; 4]);

impl WrappingId {
    /// Of the key of a vault that never had another.
    pub(crate) const ROOT: Self = Self([0; 4]);

    pub(super) fn new() -> Result<Self> {
        let mut id = [0; 4];
        while id == [0; 4] {
            random(&mut id)?;
        }
        Ok(Self(id))
    }
}

impl fmt::Display for WrappingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

impl FromStr for WrappingId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let id = u32::from_str_radix(text, 16).ok().filter(|_| digits);
        id.map(|id| Self(id.to_be_bytes())).ok_or_else(|| "8 hexadecimal digits are expected".to_owned())
    }
}

/// One of the ways to open a vault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrapping {
    /// Its identity.
    pub id: WrappingId,
    /// For people.
    pub label: String,
    /// When it was made, in milliseconds since 1970; 0 if that is not known.
    pub created_at_ms: u64,
    pub(super) how: How,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum How {
    /// Whoever has the root key itself may use it: a key file of the first release.
    Root,
    File {
        sealed: Vec<u8>,
    },
    Passphrase {
        cost: Cost,
        salt: [u8; 16],
        sealed: Vec<u8>,
    },
    Command {
        blob: Vec<u8>,
        sealed: Vec<u8>,
    },
}

/// What opens a wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WrappingKind {
    /// A key file with the root key itself.
    RootKeyFile,
    /// A key file.
    KeyFile,
    /// A passphrase.
    Passphrase,
    /// An external command.
    KeyCommand,
}

impl WrappingKind {
    /// For people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::RootKeyFile => "key file of the first release",
            Self::KeyFile => "key file",
            Self::Passphrase => "passphrase",
            Self::KeyCommand => "key command",
        }
    }
}

impl Wrapping {
    /// The root key itself, for a vault that has no document.
    pub(super) const fn implied() -> Self {
        Self { id: WrappingId::ROOT, label: String::new(), created_at_ms: 0, how: How::Root }
    }

    /// What opens it.
    #[must_use]
    pub const fn kind(&self) -> WrappingKind {
        match self.how {
            How::Root => WrappingKind::RootKeyFile,
            How::File { .. } => WrappingKind::KeyFile,
            How::Passphrase { .. } => WrappingKind::Passphrase,
            How::Command { .. } => WrappingKind::KeyCommand,
        }
    }

    /// Whether nothing in it exceeds what may be tried. What is wrong if not.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.label.len() > LABEL_BYTES_MAX || self.label.chars().any(char::is_control) {
            return Err("a label is too long, or has control characters");
        }
        let sealed = match &self.how {
            How::Root => return Ok(()),
            How::File { sealed } => sealed,
            How::Passphrase { cost, .. } if !cost.is_bounded() => {
                return Err("a passphrase would take more memory or time than is allowed");
            }
            How::Passphrase { sealed, .. } => sealed,
            How::Command { blob, .. } if blob.is_empty() || blob.len() > BLOB_BYTES_MAX => {
                return Err("what a command wrapped has no possible length");
            }
            How::Command { sealed, .. } => sealed,
        };
        if sealed.len() == SEALED_BYTES { Ok(()) } else { Err("a wrapped key has another length") }
    }
}

fn place(vault: VaultId, id: WrappingId) -> Path {
    Path::from(format!("wrapping/{vault}/{id}"))
}

/// The root key under another.
pub(super) fn seal_root(under: &Secret, vault: VaultId, id: WrappingId, root: &VaultKey) -> Result<Vec<u8>> {
    seal::seal(under, &place(vault, id), root.bytes())
}

/// The root key, if this is the key that it was sealed under.
pub(super) fn open_root(
    under: &Secret,
    vault: VaultId,
    id: WrappingId,
    sealed: &[u8],
) -> Result<Option<VaultKey>> {
    let plain = match seal::open(under, &place(vault, id), sealed) {
        Ok(plain) => plain,
        Err(VaultError::Crypto(what)) => return Err(VaultError::Crypto(what)),
        Err(_) => return Ok(None),
    };
    let bytes: Option<[u8; 32]> = plain.as_slice().try_into().ok();
    Ok(bytes.map(Zeroizing::new).map(|bytes| VaultKey::from_bytes(&bytes)))
}
