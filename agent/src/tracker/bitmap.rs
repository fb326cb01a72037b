//! Bitmaps that the kernel's programs write and the agent reads through memory.

use super::TrackerError;
use aya::maps::MapData;
use std::{
    os::fd::{AsFd, AsRawFd},
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const F_MMAPABLE: u32 = 0x400;
const F_INNER_MAP: u32 = 0x1000;

/// A mapped `Array<u64>`: one bit a granule. Shared with the kernel and, through its pin, with the agent's next life.
pub struct Bitmap {
    map: MapData,
    memory: NonNull<AtomicU64>,
    words: usize,
    id: u32,
}

// SAFETY: the memory is shared anyway (with the kernel) and only touched by atomic operations.
unsafe impl Send for Bitmap {}
// SAFETY: as above.
unsafe impl Sync for Bitmap {}

impl Bitmap {
    /// A new one of `words` words, pinned at `path`.
    pub fn create(words: usize, path: &Path) -> Result<Self, TrackerError> {
        let count = u32::try_from(words).map_err(|_| TrackerError::TooLarge(words as u64 * 64))?;
        let definition =
            aya_obj::Map::new_from_params(BPF_MAP_TYPE_ARRAY, 4, 8, count.max(1), F_MMAPABLE | F_INNER_MAP);
        let map = MapData::create(definition, "highwater_bits", None)
            .map_err(|e| TrackerError::kernel("create a bitmap", &e))?;
        map.pin(path).map_err(|e| TrackerError::kernel("pin a bitmap", &e))?;
        Self::map(map)
    }

    /// The one pinned at `path`.
    pub fn open(path: &Path) -> Result<Self, TrackerError> {
        let map = MapData::from_pin(path).map_err(|e| TrackerError::kernel("open a pinned bitmap", &e))?;
        Self::map(map)
    }

    /// An array of 64-bit words that was made mmapable.
    pub fn of(map: MapData) -> Result<Self, TrackerError> {
        Self::map(map)
    }

    fn map(map: MapData) -> Result<Self, TrackerError> {
        let info = map.info().map_err(|e| TrackerError::kernel("read a bitmap's size", &e))?;
        let (words, id) = (info.max_entries() as usize, info.id());
        // SAFETY: a fresh shared mapping of an mmapable array map, whose length is its elements rounded up to pages.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes(words),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(TrackerError::kernel("map a bitmap", &std::io::Error::last_os_error()));
        }
        let memory = NonNull::new(memory.cast()).ok_or(TrackerError::TooLarge(words as u64 * 64))?;
        Ok(Self { map, memory, words, id })
    }

    /// The kernel's id of the map.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }
    /// For putting it into the map of bitmaps.
    pub(super) fn map_data(&self) -> &MapData {
        &self.map
    }
    /// Its words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped for as long as `self` lives; `AtomicU64` has the layout of `u64`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.words) }
    }
    /// How many bits are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words().iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }
    /// Takes all bits out: calls `each` with the index and value of every non-zero word, which is cleared after the
    /// call returned. A crash in between leaves the word set, so it is seen again.
    pub fn drain(&self, mut each: impl FnMut(usize, u64)) {
        for (index, word) in self.words().iter().enumerate() {
            let bits = word.load(Ordering::Acquire);
            if bits != 0 {
                each(index, bits);
                word.fetch_and(!bits, Ordering::AcqRel);
            }
        }
    }
}

impl Drop for Bitmap {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and nothing borrows it any more.
        unsafe {
            libc::munmap(self.memory.as_ptr().cast(), mapped_bytes(self.words));
        }
    }
}

fn mapped_bytes(words: usize) -> usize {
    (words * 8).next_multiple_of(4096)
}
