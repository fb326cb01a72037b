//! Keys: the vault's root key; everything else is derived from it or wrapped under it. How it is kept itself: module `keys`.
//!
//! ```text
//! root key ─────── HKDF ─────┬─ check value (keys/<n>; vault.json of format 1)
//!                            ├─ documents key  → authenticates keys/<n>
//!                            ├─ control key    → control documents
//!                            └─ wrapping key   → machines/<id>/key: a random machine key
//! machine key ──── HKDF ─────┬─ manifest key   → records, checkpoints
//!                            ├─ segment keys   → one for each segment
//!                            └─ hash key       → block hashes
//! ```
//!
//! A machine's key object deleted makes everything stored of that machine unreadable, whoever holds copies of the rest.

use crate::{
    Result, VaultError,
    keys::{parse_hex, read_private, to_hex, write_private},
};
use aws_lc_rs::hkdf;
use highwater_delta::{HashKey, VaultId};
use std::path::Path;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const FILE_PREFIX: &str = "highwater-vault-key-1 ";
const FILE_BYTES_MAX: usize = 256;

/// The root key of a vault: 32 random bytes. Wiped from memory when dropped; never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct VaultKey([u8; 32]);

impl std::fmt::Debug for VaultKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VaultKey(…)")
    }
}

impl VaultKey {
    /// A new random key.
    pub fn generate() -> Result<Self> {
        let mut bytes = [0; 32];
        random(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a file with a root key itself, as the first release made it. Refuses one that group or others may read: the key
    /// opens everything.
    pub fn load(path: &Path) -> Result<Self> {
        let refuse =
            |cause: &dyn ToString| VaultError::KeyFile { path: path.to_owned(), cause: cause.to_string() };
        let text = read_private(path, FILE_BYTES_MAX).map_err(|e| refuse(&e))?;
        let text = std::str::from_utf8(&text).map_err(|_| refuse(&"not a vault key"))?;
        Self::parse(text).map_err(|cause| refuse(&cause))
    }

    /// From a key file's text, or what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let digits = text.trim_end().strip_prefix(FILE_PREFIX).ok_or("not a vault key")?;
        let key = parse_hex(digits).ok_or("not a vault key: 64 hexadecimal digits expected")?;
        Ok(Self(*key))
    }

    /// Writes a new file with the root key itself, readable by its owner only, and syncs it and its directory. Whoever has it
    /// needs no wrapping: for vaults that are made and read by one program.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX));
        text.push_str(FILE_PREFIX);
        text.push_str(&to_hex(&self.0));
        text.push('\n');
        write_private(path, text.as_bytes())
            .map_err(|e| VaultError::KeyFile { path: path.to_owned(), cause: e.to_string() })
    }

    pub(crate) const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
    pub(crate) const fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self(*bytes)
    }

    /// A value that tells whether a key belongs to a vault, and nothing about the key.
    pub(crate) fn check_value(&self, vault: VaultId) -> Result<[u8; 32]> {
        Ok(*derive(&self.0, vault.as_bytes(), &[b"highwater/1 check"])?)
    }
    /// Authenticates the documents that hold the wrappings.
    pub(crate) fn documents_key(&self, vault: VaultId) -> Result<Secret> {
        derive(&self.0, vault.as_bytes(), &[b"highwater/2 keys documents"]).map(Secret)
    }
    pub(crate) fn control_key(&self, vault: VaultId) -> Result<Secret> {
        derive(&self.0, vault.as_bytes(), &[b"highwater/1 control"]).map(Secret)
    }
    pub(crate) fn wrapping_key(&self, vault: VaultId) -> Result<Secret> {
        derive(&self.0, vault.as_bytes(), &[b"highwater/1 machine keys"]).map(Secret)
    }
}

/// Thirty-two bytes that nobody else may know.
#[derive(Clone)]
pub(crate) struct Secret(pub(crate) Zeroizing<[u8; 32]>);

impl Secret {
    pub(crate) fn derive(&self, info: &[&[u8]]) -> Result<Self> {
        derive(&self.0, b"", info).map(Secret)
    }
}

/// The keys of one machine.
#[derive(Clone)]
pub(crate) struct MachineKeys {
    machine: Secret,
    pub(crate) manifest: Secret,
    pub(crate) hash: HashKey,
}

impl MachineKeys {
    pub(crate) fn new(machine: Secret) -> Result<Self> {
        Ok(Self {
            manifest: machine.derive(&[b"highwater/1 manifest"])?,
            hash: HashKey::new(*machine.derive(&[b"highwater/1 hash"])?.0),
            machine,
        })
    }
    pub(crate) fn segment(&self, id: highwater_delta::SegmentId, salt: &[u8; 16]) -> Result<Secret> {
        self.machine.derive(&[b"highwater/1 segment", id.as_bytes(), salt])
    }
}

fn derive(secret: &[u8; 32], salt: &[u8], info: &[&[u8]]) -> Result<Zeroizing<[u8; 32]>> {
    let mut out = Zeroizing::new([0; 32]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(info, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(out.as_mut()))
        .map_err(|_| VaultError::Crypto("key derivation"))?;
    Ok(out)
}

/// Fills `out` from the system's random number generator.
pub(crate) fn random(out: &mut [u8]) -> Result<()> {
    aws_lc_rs::rand::fill(out).map_err(|_| VaultError::Crypto("random numbers"))
}
