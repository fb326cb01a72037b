//! *Pending*: what is not yet known to be stored. Bits come from the ends of epochs and from callers; only
//! [`Tracker::stored`] takes them away.

use super::{Tracker, TrackerError};
use highwater_abi::BLOCK_SHIFT_SECTORS;
use highwater_delta::DiskId;
use std::sync::atomic::{AtomicU64, Ordering};

impl Tracker {
    /// Marks every granule of a disk as pending: nothing of it is known to be stored.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn mark_all(&self, disk: DiskId) -> Result<(), TrackerError> {
        let slot = self.slot(disk)?;
        let granules = slot.record.sectors.div_ceil(1 << slot.record.shift);
        for (index, word) in slot.pending.words().iter().enumerate() {
            let left = granules.saturating_sub(index as u64 * 64);
            let bits = if left >= 64 { !0 } else { (1u64 << left) - 1 };
            word.fetch_or(bits, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Marks granules as pending, as if they had been written.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn mark(&self, disk: DiskId, words: &[u64]) -> Result<(), TrackerError> {
        for (word, bits) in self.slot(disk)?.pending.words().iter().zip(words) {
            word.fetch_or(*bits, Ordering::AcqRel);
        }
        Ok(())
    }

    /// The same of a few granules.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn mark_some(
        &self,
        disk: DiskId,
        granules: impl IntoIterator<Item = u64>,
    ) -> Result<(), TrackerError> {
        let words = self.slot(disk)?.pending.words();
        for granule in granules {
            if let Some(word) = usize::try_from(granule / 64).ok().and_then(|index| words.get(index)) {
                word.fetch_or(1 << (granule % 64), Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// The pending words of a disk, as they are now.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn pending(&self, disk: DiskId) -> Result<Vec<u64>, TrackerError> {
        Ok(self.slot(disk)?.pending.words().iter().map(|w| w.load(Ordering::Acquire)).collect())
    }

    /// Whether a granule of a disk is marked now: pending, or in an epoch that has not been told yet.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn is_marked(&self, disk: DiskId, granule: u64) -> Result<bool, TrackerError> {
        let slot = self.slot(disk)?;
        let index = usize::try_from(granule / 64).unwrap_or(usize::MAX);
        let word = |words: &[AtomicU64]| words.get(index).map_or(0, |w| w.load(Ordering::Acquire));
        let bits = [slot.current(), slot.spare(), &slot.pending].map(|bitmap| word(bitmap.words()));
        Ok(bits.iter().any(|bits| bits >> (granule % 64) & 1 == 1))
    }

    /// Forgets granules: they are stored. `words` holds the bits to clear; the caller leaves out what was marked again
    /// since it was read.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn stored(&self, disk: DiskId, words: &[u64]) -> Result<(), TrackerError> {
        for (word, bits) in self.slot(disk)?.pending.words().iter().zip(words) {
            if *bits != 0 {
                word.fetch_and(!bits, Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// Sectors per bit of a disk, as a shift above the 4 KiB block.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn blocks_shift(&self, disk: DiskId) -> Result<u32, TrackerError> {
        Ok(self.slot(disk)?.record.shift - BLOCK_SHIFT_SECTORS)
    }

    /// Bits set in a disk's current bitmap: what will have to be sent next.
    ///
    /// # Errors
    /// [`TrackerError::Unknown`].
    pub fn dirty_now(&self, disk: DiskId) -> Result<u64, TrackerError> {
        Ok(self.slot(disk)?.current().count())
    }
}
