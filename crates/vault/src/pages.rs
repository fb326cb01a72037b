//! What was decoded of indexes (pages, footers, tables), and chunks, shared by all block maps of a vault: bounded by bytes, the least
//! recently used thrown out.
//!
//! Segments never change and their ids are never used again, so a page may outlive the map that fetched it, and serve
//! the next one.

use crate::maps::{Inner, MapFooter, SegmentRow};
use crate::segment::{Footer, Page};
use highwater_delta::SegmentId;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of decoded pages kept, unless told otherwise.
pub(crate) const BYTES_MAX: usize = 64 << 20;

/// Bytes of chunks kept, unless told otherwise.
pub(crate) const CHUNK_BYTES_MAX: usize = 16 << 20;

/// Something of an index, or a chunk. Cheap to clone.
#[derive(Clone)]
pub(crate) enum Cached {
    Page(Arc<Page>),
    Inner(Arc<Inner>),
    Footer(Arc<Footer>),
    MapFooter(Arc<MapFooter>),
    Table(Arc<Vec<SegmentRow>>),
    Chunk(Arc<Vec<u8>>),
}

impl Cached {
    fn memory_bytes(&self) -> usize {
        match self {
            Self::Page(page) => page.memory_bytes(),
            Self::Inner(inner) => inner.memory_bytes(),
            Self::Footer(footer) => footer.memory_bytes(),
            Self::MapFooter(footer) => footer.memory_bytes(),
            Self::Chunk(chunk) => chunk.capacity() + 64,
            Self::Table(rows) => rows.len() * size_of::<SegmentRow>() + 64,
        }
    }
}

/// By its object and the frame that it is.
type Key = (SegmentId, u32);

pub(crate) struct PageCache {
    bytes_max: usize,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    pages: HashMap<Key, (Cached, u64)>,
    order: BTreeMap<u64, Key>,
    tick: u64,
    bytes: usize,
}

impl PageCache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, cache: Mutex::default() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    pub(crate) fn get(&self, key: Key) -> Option<Cached> {
        let mut cache = self.lock();
        cache.tick += 1;
        let tick = cache.tick;
        let (page, used) = cache.pages.get_mut(&key)?;
        let page = page.clone();
        let before = std::mem::replace(used, tick);
        cache.order.remove(&before);
        cache.order.insert(tick, key);
        Some(page)
    }

    pub(crate) fn put(&self, key: Key, page: Cached) {
        let mut cache = self.lock();
        if cache.pages.contains_key(&key) {
            return;
        }
        cache.tick += 1;
        let tick = cache.tick;
        cache.bytes += page.memory_bytes();
        cache.pages.insert(key, (page, tick));
        cache.order.insert(tick, key);
        while cache.bytes > self.bytes_max
            && let Some((_, oldest)) = cache.order.pop_first()
            && let Some((page, _)) = cache.pages.remove(&oldest)
        {
            cache.bytes -= page.memory_bytes();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_delta::{BlockHash, DiskId};

    #[test]
    fn it_is_bounded_and_forgets_what_was_not_used() {
        let page = || {
            let hashes = vec![BlockHash([0; 16]); 60];
            Cached::Page(Arc::new(Page { disk: DiskId::new(), entries: vec![], hashes }))
        };
        let bytes = page().memory_bytes();
        let cache = PageCache::new(3 * bytes);
        let segment = SegmentId::new();
        for frame in 0..3 {
            cache.put((segment, frame), page());
        }
        assert!(cache.get((segment, 0)).is_some());
        cache.put((SegmentId::new(), 0), page());
        assert_eq!(cache.bytes(), 3 * bytes);
        assert!(cache.get((segment, 1)).is_none(), "the one not used for longest");
        assert!(cache.get((segment, 0)).is_some() && cache.get((segment, 2)).is_some());
        let none = PageCache::new(0);
        none.put((segment, 0), page());
        assert_eq!(none.bytes(), 0);
    }
}
