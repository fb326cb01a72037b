//! Memory for captured blocks: bounded, reused, given back by dropping.

use highwater_delta::BLOCK_BYTES;
use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

type Content = Box<[u8; BLOCK_BYTES]>;

/// Blocks of 4 KiB, never more than its limit.
#[derive(Debug)]
pub struct BlockPool {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    spare: Vec<Content>,
    out: usize,
}

impl BlockPool {
    /// A pool of at most so many bytes, at least one block.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Arc<Self> {
        let limit = usize::try_from(limit_bytes / BLOCK_BYTES as u64).unwrap_or(usize::MAX).max(1);
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// How many more blocks there are.
    #[must_use]
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.lock().out)
    }
    /// Bytes of all its blocks that are in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        (self.lock().out * BLOCK_BYTES) as u64
    }
    /// Its limit.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        (self.limit * BLOCK_BYTES) as u64
    }
    /// Gives memory that nobody uses back to the allocator.
    pub fn trim(&self) {
        self.lock().spare = vec![];
    }

    /// A block, its content arbitrary. `None`: the limit is reached.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<PoolBlock> {
        let spare = {
            let mut state = self.lock();
            if state.out >= self.limit {
                return None;
            }
            state.out += 1;
            state.spare.pop()
        };
        let content = spare.unwrap_or_else(|| Box::new([0; BLOCK_BYTES]));
        Some(PoolBlock { content: Some(content), pool: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A block of a pool.
#[derive(Debug)]
pub struct PoolBlock {
    /// There until it is dropped.
    content: Option<Content>,
    pool: Arc<BlockPool>,
}

const THERE: &str = "the content is taken by Drop alone";

impl Deref for PoolBlock {
    type Target = [u8; BLOCK_BYTES];
    fn deref(&self) -> &Self::Target {
        self.content.as_ref().expect(THERE)
    }
}
impl DerefMut for PoolBlock {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.content.as_mut().expect(THERE)
    }
}
impl Drop for PoolBlock {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.out -= 1;
        state.spare.extend(self.content.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_gives_more_than_its_limit() {
        let pool = BlockPool::new(3 * 4096);
        let mut held: Vec<_> = (0..3).map(|_| pool.take().unwrap()).collect();
        assert!(pool.take().is_none() && pool.room() == 0);
        held.pop();
        assert_eq!((pool.room(), pool.used_bytes()), (1, 8192));
        assert!(pool.take().is_some());
        drop(held);
        pool.trim();
        assert_eq!(pool.used_bytes(), 0);
    }
}
