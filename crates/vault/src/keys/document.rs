//! The document that holds all wrappings. Pure: no store, no clock.

use super::wrapping::Wrapping;
use crate::{Result, VaultError, VaultKey, key::Secret, store};
use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac};
use highwater_delta::VaultId;

const MAGIC: [u8; 4] = *b"HWKD";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 64;
const MAC_BYTES: usize = 32;
/// Most bytes of a document.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 256 << 10;
/// Most wrappings.
pub(super) const WRAPPINGS_MAX: usize = 16;

/// All wrappings of a vault's root key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) vault: VaultId,
    pub(crate) number: u64,
    pub(super) wrappings: Vec<Wrapping>,
}

/// A document before anybody knows whether it is authentic.
#[derive(Debug)]
pub(crate) struct Unverified {
    pub(crate) document: Document,
    check: [u8; 32],
    signed: Vec<u8>,
    mac: [u8; MAC_BYTES],
}

impl Document {
    /// As it is stored.
    pub(crate) fn encode(&self, root: &VaultKey) -> Result<Vec<u8>> {
        if self.wrappings.len() > WRAPPINGS_MAX {
            return Err(VaultError::Limit("ways to open one vault"));
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[VERSION, 0, 0, 0]);
        bytes.extend_from_slice(self.vault.as_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&root.check_value(self.vault)?);
        let body = postcard::to_stdvec(&self.wrappings);
        bytes.extend(body.map_err(|_| VaultError::Limit("bytes of a keys document"))?);
        let mac = hmac::sign(&mac_key(&root.documents_key(self.vault)?), &bytes);
        bytes.extend_from_slice(mac.as_ref());
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(VaultError::Limit("bytes of a keys document"));
        }
        Ok(bytes)
    }

    /// Takes all but the first wrapping away, as somebody would who can write to the store.
    #[cfg(test)]
    pub(crate) fn strip_for_test(&mut self) {
        self.wrappings.truncate(1);
    }

    /// What was read from `keys/<number>` of this vault.
    pub(crate) fn decode(vault: VaultId, number: u64, bytes: &[u8]) -> Result<Unverified> {
        let path = store::keys_path(number);
        let corrupt = |cause: &str| VaultError::corrupt(&path, cause);
        let Some((signed, mac)) = bytes.split_last_chunk::<MAC_BYTES>() else {
            return Err(corrupt("shorter than the least document"));
        };
        let Some((header, body)) = signed.split_first_chunk::<HEADER_BYTES>() else {
            return Err(corrupt("shorter than the least document"));
        };
        if header[..4] != MAGIC || header[5..8] != [0; 3] {
            return Err(corrupt("no keys document"));
        }
        if header[4] != VERSION {
            return Err(VaultError::Format { object: path.to_string(), found: u64::from(header[4]) });
        }
        if header[8..24] != *vault.as_bytes() {
            return Err(corrupt("it belongs to another vault"));
        }
        if header[24..32] != number.to_le_bytes() {
            return Err(corrupt("it does not fit its name"));
        }
        let (wrappings, rest): (Vec<Wrapping>, _) =
            postcard::take_from_bytes(body).map_err(|e| corrupt(&e.to_string()))?;
        if !rest.is_empty() || wrappings.is_empty() || wrappings.len() > WRAPPINGS_MAX {
            return Err(corrupt("no possible number of wrappings"));
        }
        for (at, wrapping) in wrappings.iter().enumerate() {
            wrapping.check().map_err(corrupt)?;
            if wrappings[..at].iter().any(|other| other.id == wrapping.id) {
                return Err(corrupt("two wrappings have one id"));
            }
        }
        let mut check = [0; 32];
        check.copy_from_slice(&header[32..]);
        let document = Self { vault, number, wrappings };
        Ok(Unverified { document, check, signed: signed.to_vec(), mac: *mac })
    }
}

impl Unverified {
    /// The document, if it was written by somebody who had this root key.
    ///
    /// # Errors
    /// [`VaultError::WrongKey`]: another root key; [`VaultError::Corrupt`]: this one, but the document was altered.
    pub(crate) fn verify(self, root: &VaultKey) -> Result<Document> {
        let expected = root.check_value(self.document.vault)?;
        verify_slices_are_equal(&expected, &self.check).map_err(|_| VaultError::WrongKey)?;
        let key = mac_key(&root.documents_key(self.document.vault)?);
        hmac::verify(&key, &self.signed, &self.mac)
            .map_err(|_| VaultError::corrupt(store::keys_path(self.document.number), "not authentic"))?;
        Ok(self.document)
    }
}

fn mac_key(secret: &Secret) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, secret.0.as_ref())
}
