//! Segments that are closed and on their way into the store while the next one is filled.
//!
//! **Order.** The references come out in the order in which the segments were filled: of overlapping chunks the later wins.
//! **Limit.** [`UNDER_WAY_MAX`] at once; whoever adds another waits for the oldest. **Cancellation.** Every wait may be dropped
//! and begun anew. Dropping this gives up what is under way; what the store finishes all the same is left over as after a crash.

use super::SegmentWriter;
use crate::{Result, VaultError, record::SegmentRef};
use std::collections::VecDeque;
use tokio::task::JoinHandle;

/// Each holds an upload's part.
const UNDER_WAY_MAX: usize = 1;

/// See the module.
#[derive(Default)]
pub(crate) struct Finishing {
    under_way: VecDeque<(SegmentRef, JoinHandle<Result<()>>)>,
    finished: Vec<SegmentRef>,
}

impl Finishing {
    /// Closes one and begins to store it. An error may be that of an earlier one.
    pub(crate) async fn add(&mut self, segment: SegmentWriter) -> Result<()> {
        while self.under_way.len() >= UNDER_WAY_MAX {
            self.oldest().await?;
        }
        let (segment, upload) = segment.close().await?;
        self.under_way.push_back((segment, tokio::spawn(upload.complete())));
        Ok(())
    }

    /// Waits until all are in the store, durably.
    pub(crate) async fn all(&mut self) -> Result<&[SegmentRef]> {
        while !self.under_way.is_empty() {
            self.oldest().await?;
        }
        Ok(&self.finished)
    }

    /// Waits until none is under way, whatever came of them.
    pub(crate) async fn settle(&mut self) {
        while !self.under_way.is_empty() {
            // What is settled is thrown away: its errors matter no more.
            let _ = self.oldest().await;
        }
    }

    async fn oldest(&mut self) -> Result<()> {
        let Some((_, task)) = self.under_way.front_mut() else { return Ok(()) };
        let ended = task.await;
        let oldest = self.under_way.pop_front();
        ended.map_err(|source| VaultError::Store(object_store::Error::JoinError { source }))??;
        self.finished.extend(oldest.map(|(segment, _)| segment));
        Ok(())
    }
}

impl Drop for Finishing {
    fn drop(&mut self) {
        self.under_way.iter().for_each(|(_, task)| task.abort());
    }
}
