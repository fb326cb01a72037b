//! Keys: the vault's, from a file; everything else is derived from it or wrapped under it.
//!
//! ```text
//! vault key (file) ── HKDF ──┬─ check value (vault.json)
//!                            ├─ control key    → control documents
//!                            └─ wrapping key   → machines/<id>/key: a random machine key
//! machine key ──── HKDF ─────┬─ manifest key   → records, checkpoints
//!                            ├─ segment keys   → one for each segment
//!                            └─ hash key       → block hashes
//! ```
//!
//! A machine's key object deleted makes everything stored of that machine unreadable, whoever holds copies.

use crate::{Result, VaultError};
use aws_lc_rs::hkdf;
use highwater_delta::{HashKey, VaultId};
use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const FILE_PREFIX: &str = "highwater-vault-key-1 ";
const FILE_BYTES_MAX: u64 = 256;

/// The key of a vault: 32 random bytes. Wiped from memory when dropped; never printed.
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

    /// Reads a key file. Refuses one that group or others may read: the key opens everything.
    pub fn load(path: &Path) -> Result<Self> {
        let refuse =
            |cause: &dyn ToString| VaultError::KeyFile { path: path.to_owned(), cause: cause.to_string() };
        let file = fs::File::open(path).map_err(|e| refuse(&e))?;
        let mode = file.metadata().map_err(|e| refuse(&e))?.permissions().mode();
        if mode & 0o077 != 0 {
            let cause = format!("mode {:03o} lets others than its owner read or write it", mode & 0o777);
            return Err(refuse(&cause));
        }
        let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX as usize));
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|e| refuse(&e))?;
        let digits = text.trim_end().strip_prefix(FILE_PREFIX).ok_or_else(|| refuse(&"not a vault key"))?;
        parse_hex(digits).map(Self).ok_or_else(|| refuse(&"not a vault key: 64 hexadecimal digits expected"))
    }

    /// Writes a new key file, readable by its owner only, and syncs it and its directory.
    pub fn save(&self, path: &Path) -> Result<()> {
        let refuse = |e: std::io::Error| VaultError::KeyFile { path: path.to_owned(), cause: e.to_string() };
        let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX as usize));
        text.push_str(FILE_PREFIX);
        for byte in self.0 {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
            }
        }
        text.push('\n');
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(refuse)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(refuse)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(refuse)
    }

    /// A value that tells whether a key belongs to a vault, and nothing about the key.
    pub(crate) fn check_value(&self, vault: VaultId) -> Result<[u8; 32]> {
        Ok(*derive(&self.0, vault.as_bytes(), &[b"highwater/1 check"])?)
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

fn parse_hex(digits: &str) -> Option<[u8; 32]> {
    let digits = digits.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |d: u8| char::from(d).to_digit(16).map(|n| n as u8);
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(out)
}
