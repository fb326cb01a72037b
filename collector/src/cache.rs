//! The write-back cache: while the store is slow or away, what machines send is put on a local disk and acknowledged as received.
//!
//! **It holds nothing of record.** What was only received is sent again by its machine after anything that ends a session, so what
//! lies here may be lost at any time. Stored is what the vault has, and only that is told as stored. So nothing is ever read from here but by
//! the session that wrote it: each [`spool::Spool`] is sealed with a key that exists in its session's memory alone, and its files
//! have no names. After a crash there is nothing to read, nothing to tidy up, and no disk's content to be found.
//!
//! **What `fdatasync` is for**, then: not for the time after a crash. It finds a full or failing disk before the acknowledgement, while the
//! chunk is still in memory and may simply wait, and keeps what the kernel has to write from piling up in memory. It is done once
//! for all chunks that are acknowledged together, and only while the vault lags.
//!
//! **Limit.** All sessions together take `cache-bytes` ([`budget`]), whoever came first leaving room for others. Memory: of a chunk on the disk
//! nothing is kept in memory but that there is one.

pub mod budget;
pub mod medium;
pub mod spool;

use crate::lock::locked;
use crate::{CollectorError, metrics::CacheMetrics};
use budget::Budget;
use highwater_delta::{Code, MachineId};
use medium::{Directory, Medium};
use spool::Spool;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Files that all spools have together, so that each session's are few; some more where there are many sessions.
const FILES: u64 = 256;
/// How often one line says that the disk fails.
const COMPLAIN_EVERY: Duration = Duration::from_secs(30);
/// Of one file, at least.
const FILE_BYTES_MIN: u64 = 4 << 20;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Cache {
    medium: Arc<dyn Medium>,
    budget: Arc<Budget>,
    /// What it counts.
    pub metrics: CacheMetrics,
    /// When it was said last that it fails.
    complained: Arc<Mutex<Option<Instant>>>,
}

impl Cache {
    /// A cache in a directory, which is made, for its owner only, if it is missing. Of one that crashed in the moment of making a
    /// file an empty name can be left; those are removed.
    pub fn open(dir: &Path, bytes: u64, metrics: &CacheMetrics) -> Result<Self, CollectorError> {
        let medium = Directory::open(dir)
            .map_err(|source| CollectorError::CacheUnusable { path: dir.to_owned(), source })?;
        Ok(Self::over(Arc::new(medium), bytes, metrics))
    }

    /// The same over whatever files are made of.
    #[must_use]
    pub fn over(medium: Arc<dyn Medium>, bytes: u64, metrics: &CacheMetrics) -> Self {
        Self {
            medium,
            budget: Budget::new(bytes, metrics),
            metrics: metrics.clone(),
            complained: Arc::default(),
        }
    }

    /// Counts a failure, and says so now and then: a disk that fails fails for all sessions.
    pub fn complain(&self, machine: MachineId, error: &CollectorError) {
        self.metrics.failed();
        let mut complained = locked(&self.complained);
        if complained.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY) {
            *complained = Some(Instant::now());
            tracing::warn!(
                %machine, code = %Code(error.code()), action = error.action(), %error,
                "going on without the cache for a while"
            );
        }
    }

    /// An empty spool, for one session.
    pub fn spool(&self) -> Result<Spool, CollectorError> {
        let file_bytes = (self.budget.bytes() / FILES).max(FILE_BYTES_MIN);
        Spool::new(self.medium.clone(), self.budget.clone(), file_bytes)
    }
}
