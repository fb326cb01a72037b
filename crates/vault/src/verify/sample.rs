//! Which objects a sample reads. Pure.

use crate::{Result, VaultError, key::random};
use highwater_delta::SegmentId;
use serde::{Deserialize, Serialize};

/// A part of the segments and maps, chosen at random: each by itself, so that it does not matter what else there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sample {
    /// Of a million objects so many are read, on average.
    per_million: u32,
    /// With the same seed, the same ones.
    seed: u64,
}

impl Sample {
    /// So many percent, above 0 and up to 100, by a seed.
    ///
    /// # Errors
    /// It is none of these.
    pub fn new(percent: f64, seed: u64) -> Result<Self> {
        if !(percent > 0.0 && percent <= 100.0) {
            return Err(VaultError::Limit("percent of a sample"));
        }
        Ok(Self { per_million: ((percent * 10_000.0) as u32).max(1), seed })
    }

    /// By a seed that nobody can foresee.
    ///
    /// # Errors
    /// As [`Sample::new`]; there is nothing random.
    pub fn random(percent: f64) -> Result<Self> {
        let mut seed = [0; 8];
        random(&mut seed)?;
        Self::new(percent, u64::from_le_bytes(seed))
    }

    /// What it was made by.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }
    /// How much is read.
    #[must_use]
    pub fn percent(&self) -> f64 {
        f64::from(self.per_million) / 10_000.0
    }

    pub(super) fn takes(&self, id: SegmentId) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(id.as_bytes());
        let mut drawn = [0; 8];
        hasher.finalize_xof().fill(&mut drawn);
        u64::from_le_bytes(drawn) % 1_000_000 < u64::from(self.per_million)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_about_as_many_and_each_seed_others() {
        let ids: Vec<SegmentId> = (0..10_000).map(|_| SegmentId::new()).collect();
        let taken = |percent, seed| -> Vec<bool> {
            let sample = Sample::new(percent, seed).unwrap();
            ids.iter().map(|id| sample.takes(*id)).collect()
        };
        let count = |taken: &[bool]| taken.iter().filter(|taken| **taken).count();
        assert!((800..1200).contains(&count(&taken(10.0, 7))));
        assert_eq!(taken(10.0, 7), taken(10.0, 7));
        assert_ne!(taken(10.0, 7), taken(10.0, 8));
        assert_eq!(count(&taken(100.0, 1)), 10_000);
        for bad in [0.0, -1.0, 100.1, f64::NAN] {
            assert!(Sample::new(bad, 0).is_err(), "{bad}");
        }
    }
}
