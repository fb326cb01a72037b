//! One protected disk as the engine holds it.

use super::{
    ledger::Ledger,
    registry::Protected,
    state::{DiskState, Since},
    trouble::Trouble,
};
use crate::{
    device::BlockDevice,
    source::{BufferPool, SourceError, SourceReader},
};
use highwater_delta::{Block, BlockRange, DiskId};
use std::{sync::Arc, time::Instant};

/// A disk and everything known about it.
pub struct Disk {
    /// What is remembered of it.
    pub protected: Protected,
    /// The device, while it is there.
    pub device: Option<BlockDevice>,
    /// The last time it could not be read, while that matters.
    pub trouble: Option<Trouble>,
    /// What it is doing.
    pub state: Since,
    /// What is to be sent, in granules.
    pub ledger: Ledger,
    /// 4 KiB blocks of a granule, as a shift.
    pub shift: u32,
    /// The first copy, or a resynchronization: when it began, and how many granules it had then.
    pub copy_began: Option<(Instant, u64)>,
    /// Whether a mounted filesystem lies on it, as seen last.
    pub has_filesystem: bool,
}

impl Disk {
    /// One whose device is yet to be found.
    #[must_use]
    pub fn new(protected: Protected, state: DiskState) -> Self {
        Self {
            protected,
            device: None,
            trouble: None,
            state: Since::new(state),
            ledger: Ledger::new(0, &[]),
            shift: 0,
            copy_began: None,
            has_filesystem: false,
        }
    }
    /// Its id.
    #[must_use]
    pub fn id(&self) -> DiskId {
        self.protected.disk
    }
    /// Its size now, or when it was last seen.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.device.as_ref().map_or(self.protected.size_bytes, |d| d.size_bytes)
    }
    /// Opens it, for one piece of work: while it is open, nobody can detach it. `None` while its device is away.
    ///
    /// # Errors
    /// It cannot be opened, or is another one now.
    pub fn open(&self, readers: usize, pool: &Arc<BufferPool>) -> Option<Result<SourceReader, SourceError>> {
        let device = self.device.as_ref()?;
        Some(SourceReader::open_with_pool(device, readers, pool.clone()))
    }
    /// Its granules.
    #[must_use]
    pub fn granules(&self) -> u64 {
        granules(self.size_bytes(), self.shift)
    }
    /// Granules as blocks, cut at the disk's end.
    #[must_use]
    pub fn blocks(&self, ranges: &[BlockRange]) -> Vec<BlockRange> {
        let end = Block::count_for(self.size_bytes());
        (ranges.iter())
            .map(|r| {
                let start = r.start.0 << self.shift;
                BlockRange::new(start, (r.end() << self.shift).min(end).saturating_sub(start))
            })
            .filter(|r| r.count > 0)
            .collect()
    }
    /// Bytes of so many granules.
    #[must_use]
    pub fn bytes(&self, granules: u64) -> u64 {
        granules << (self.shift + 12)
    }
    /// Bytes that wait to be sent.
    #[must_use]
    pub fn to_send_bytes(&self) -> u64 {
        self.bytes(self.ledger.to_send().count())
    }
}

/// How many granules a disk of so many bytes has.
#[must_use]
pub fn granules(size_bytes: u64, shift: u32) -> u64 {
    Block::count_for(size_bytes).div_ceil(1 << shift)
}
