//! Passphrases: stretched with Argon2id into the key under which the root key is wrapped.

use super::file::read_private;
use crate::{Result, VaultError, key::Secret};
use argon2::{Algorithm, Argon2, Params, Version};
use serde::{Deserialize, Serialize};
use std::path::Path;
use zeroize::Zeroizing;

/// Most bytes of a passphrase.
const BYTES_MAX: usize = 1024;
/// Fewest characters of one that is set. Whoever holds a copy of the bucket may try as many as he likes.
const CHARACTERS_MIN: usize = 12;

/// What a passphrase costs to try. Stands in the document, so it is bounded before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cost {
    pub(crate) memory_kib: u32,
    pub(crate) passes: u32,
    pub(crate) lanes: u32,
}

impl Cost {
    /// About a second of one processor.
    pub(crate) const DEFAULT: Self = Self { memory_kib: 256 << 10, passes: 3, lanes: 1 };
    /// 1 GiB, and half a minute of one processor.
    const MEMORY_KIB_MAX: u32 = 1 << 20;
    const WORK_KIB_MAX: u64 = 4 << 20;
    const LANES_MAX: u32 = 16;

    /// Whether this can and may be tried.
    pub(crate) fn is_bounded(self) -> bool {
        let work_kib = u64::from(self.memory_kib) * u64::from(self.passes);
        let possible = self.passes >= 1 && self.lanes >= 1 && self.memory_kib / 8 >= self.lanes;
        possible
            && self.memory_kib <= Self::MEMORY_KIB_MAX
            && work_kib <= Self::WORK_KIB_MAX
            && self.lanes <= Self::LANES_MAX
    }
}

/// A passphrase. Wiped from memory when dropped; never printed.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

impl Passphrase {
    /// From text, byte for byte, without the end of line.
    ///
    /// # Errors
    /// It is empty, has several lines, or is longer than 1024 bytes.
    pub fn new(text: &[u8]) -> Result<Self> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let refuse = |cause: &str| Err(VaultError::Passphrase(cause.to_owned()));
        match text {
            [] => refuse("it is empty"),
            text if text.len() > BYTES_MAX => refuse("it is longer than 1024 bytes"),
            text if text.contains(&b'\n') => refuse("it has more than one line"),
            text => Ok(Self(Zeroizing::new(text.to_vec()))),
        }
    }

    /// From a file that only its owner may read.
    pub fn load(path: &Path) -> Result<Self> {
        let text = read_private(path, BYTES_MAX + 2)
            .map_err(|e| VaultError::Passphrase(format!("{}: {e}", path.display())))?;
        Self::new(&text).map_err(|e| match e {
            VaultError::Passphrase(cause) => VaultError::Passphrase(format!("{}: {cause}", path.display())),
            other => other,
        })
    }

    /// Whether both are the same, in a time that does not tell how much of them is.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }

    /// Refuses one that is too short to be set.
    pub fn check_strength(&self) -> Result<()> {
        if String::from_utf8_lossy(&self.0).chars().count() < CHARACTERS_MIN {
            return Err(VaultError::Passphrase(format!("it has fewer than {CHARACTERS_MIN} characters")));
        }
        Ok(())
    }

    /// The key that it stands for. Takes the memory and time that the cost says.
    pub(super) async fn stretch(&self, cost: Cost, salt: [u8; 16]) -> Result<Secret> {
        const WRONG: VaultError = VaultError::Crypto("the cost of a passphrase");
        if !cost.is_bounded() {
            return Err(WRONG);
        }
        let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).map_err(|_| WRONG)?;
        let passphrase = self.clone();
        let stretched = tokio::task::spawn_blocking(move || {
            let mut key = Zeroizing::new([0; 32]);
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(&passphrase.0, &salt, key.as_mut())
                .map(|()| Secret(key))
        });
        stretched.await.map_err(|_| VaultError::Crypto("stretching a passphrase"))?.map_err(|_| WRONG)
    }
}
