//! Keyed hashes of blocks: BLAKE3, keyed per machine, cut to 128 bits. Made where a block is read, checked where it
//! is restored. The key keeps whoever holds only the vault's objects from confirming guesses of a block's content.

use crate::BLOCK_BYTES;
use serde::{Deserialize, Serialize};
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The key of a machine's block hashes. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub struct HashKey([u8; 32]);

impl HashKey {
    /// Takes 32 random or derived bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    /// The hash of one block.
    #[must_use]
    pub fn hash(&self, block: &[u8; BLOCK_BYTES]) -> BlockHash {
        let full = blake3::keyed_hash(&self.0, block);
        let mut cut = [0; 16];
        cut.copy_from_slice(&full.as_bytes()[..16]);
        BlockHash(cut)
    }
}
impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(…)")
    }
}

/// Hash of one 4 KiB block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub [u8; 16]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}
