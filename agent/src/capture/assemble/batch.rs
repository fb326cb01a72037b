//! What a stretch of the stream does to one disk, last write wins (pure).

use super::{super::pool::PoolBlock, hashed::Map, ranges::Ranges};
use highwater_delta::BlockRange;

/// Blocks with content, and ranges that became zeros; disjoint.
#[derive(Debug, Default)]
pub struct Batch {
    data: Map<u64, PoolBlock>,
    zeros: Ranges,
}

/// What a batch says of a block.
pub enum Said<'b> {
    /// This.
    Data(&'b mut PoolBlock),
    /// Zeros.
    Zeros,
    /// Nothing.
    Nothing,
}

impl Batch {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.is_empty() && self.zeros.is_empty()
    }
    /// How many blocks of memory it holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.data.len()
    }
    /// What it says of a block.
    pub fn get(&mut self, block: u64) -> Said<'_> {
        match self.data.get_mut(&block) {
            Some(content) => Said::Data(content),
            None if self.zeros.contains(block) => Said::Zeros,
            None => Said::Nothing,
        }
    }
    /// Whether it says anything of a block.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        self.data.contains_key(&block) || self.zeros.contains(block)
    }
    /// A block has this content.
    pub fn put(&mut self, block: u64, content: PoolBlock) {
        if !self.zeros.is_empty() {
            self.zeros.remove(block, block + 1);
        }
        self.data.insert(block, content);
    }
    /// Blocks `from..to` are zeros.
    pub fn zero(&mut self, from: u64, to: u64) {
        if to.saturating_sub(from) > self.data.len() as u64 {
            self.data.retain(|block, _| !(from..to).contains(block));
        } else {
            (from..to).for_each(|block| {
                self.data.remove(&block);
            });
        }
        self.zeros.insert(from, to);
    }
    /// Takes in what came after it.
    pub fn append(&mut self, later: &mut Self) {
        for range in std::mem::take(&mut later.zeros).iter() {
            self.zero(range.start.0, range.end());
        }
        for (block, content) in later.data.drain() {
            self.put(block, content);
        }
    }
    /// Its blocks, ascending, and its ranges of zeros.
    #[must_use]
    pub fn into_parts(self) -> (Vec<(u64, PoolBlock)>, Vec<BlockRange>) {
        let mut data: Vec<_> = self.data.into_iter().collect();
        data.sort_unstable_by_key(|(block, _)| *block);
        (data, self.zeros.iter().collect())
    }
}
