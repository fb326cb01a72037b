//! Sealed documents: small objects that are encrypted as a whole (records, checkpoints, keys, control documents).
//!
//! Each document has a key of its own, derived from its base key with 32 random bytes that stand in its header and
//! with its path; so the nonce is always zero and can never repeat under one key. The path is authenticated as well:
//! a document moved to another name does not open.

use crate::{
    Result, VaultError,
    key::{Secret, random},
};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use object_store::path::Path;
use zeroize::Zeroizing;

const MAGIC: [u8; 4] = *b"HWDC";
const VERSION: u8 = 1;
const SALT_AT: usize = 8;
const HEADER_BYTES: usize = 40;
/// Bytes of an authentication tag.
pub(crate) const TAG_BYTES: usize = 16;
/// Bytes that sealing adds.
pub(crate) const OVERHEAD_BYTES: u64 = (HEADER_BYTES + TAG_BYTES) as u64;
/// Most bytes of a sealed document: a checkpoint of a machine with 100,000 points takes some 40 MiB.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 256 << 20;

/// An AES-256-GCM key over 32 secret bytes.
pub(crate) fn cipher(secret: &Secret) -> Result<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, secret.0.as_ref())
        .map(LessSafeKey::new)
        .map_err(|_| VaultError::Crypto("cipher key"))
}

/// The nonce that counts frames of a segment; 0 for documents.
pub(crate) fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Encrypts a document for its path.
pub(crate) fn seal(base: &Secret, path: &Path, plain: &[u8]) -> Result<Vec<u8>> {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4] = VERSION;
    random(&mut header[SALT_AT..])?;
    let mut body = Vec::with_capacity(plain.len() + TAG_BYTES);
    body.extend_from_slice(plain);
    document_key(base, path, &header)?
        .seal_in_place_append_tag(nonce(0), aad(path, &header), &mut body)
        .map_err(|_| VaultError::Crypto("sealing"))?;
    Ok([&header[..], &body].concat())
}

/// Decrypts a document that was read from `path`.
pub(crate) fn open(base: &Secret, path: &Path, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let Some((header, body)) = sealed.split_first_chunk::<HEADER_BYTES>() else {
        return Err(VaultError::corrupt(path, "shorter than the least document"));
    };
    if header[..4] != MAGIC {
        return Err(VaultError::corrupt(path, "not a sealed document"));
    }
    if header[4] != VERSION {
        return Err(VaultError::Format { object: path.to_string(), found: u64::from(header[4]) });
    }
    let mut plain = Zeroizing::new(body.to_vec());
    let len = document_key(base, path, header)?
        .open_in_place(nonce(0), aad(path, header), &mut plain)
        .map_err(|_| VaultError::corrupt(path, "not authentic"))?
        .len();
    plain.truncate(len);
    Ok(plain)
}

fn document_key(base: &Secret, path: &Path, header: &[u8; HEADER_BYTES]) -> Result<LessSafeKey> {
    cipher(&base.derive(&[b"highwater/1 document", &header[SALT_AT..], path.as_ref().as_bytes()])?)
}
fn aad(path: &Path, header: &[u8; HEADER_BYTES]) -> Aad<Vec<u8>> {
    Aad::from([&header[..], path.as_ref().as_bytes()].concat())
}
