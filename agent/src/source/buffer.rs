//! Buffers for direct I/O: aligned, reused, and bounded together.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Fits every logical block size that is admitted, and the page size direct I/O likes best.
const ALIGN: usize = 4096;
/// The largest buffer.
pub const BUFFER_BYTES_MAX: usize = 1 << 20;
/// Buffers come in five sizes, so that a freed one fits the next asker: 4, 16, 64, 256 KiB, 1 MiB.
const CLASSES: [usize; 5] = [1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20];

/// Memory at an address that is a multiple of 4096.
#[derive(Debug)]
struct Aligned {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an `Aligned` owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for Aligned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Aligned {}

impl Aligned {
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGN).expect("the classes are small, the alignment is a power of two")
    }
    fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: the layout is not empty: the smallest class has 4096 bytes.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, bytes }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, and not freed before.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) }
    }
}

/// A pool of aligned buffers that never hold more than its limit together, the waiting ones included.
#[derive(Debug)]
pub struct BufferPool {
    limit_bytes: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    allocated_bytes: usize,
    spare: [Vec<Aligned>; CLASSES.len()],
}

impl BufferPool {
    /// A pool of at most so many bytes (but one large buffer at least).
    #[must_use]
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            limit_bytes: limit_bytes.max(BUFFER_BYTES_MAX),
            state: Mutex::default(),
            returned: Condvar::new(),
        })
    }

    /// A buffer of `bytes` (at most [`BUFFER_BYTES_MAX`]), its content arbitrary. Waits until there is memory; `None` if
    /// `cancelled` says so meanwhile.
    pub fn take(self: &Arc<Self>, bytes: usize, cancelled: impl Fn() -> bool) -> Option<Buffer> {
        let class = CLASSES.iter().position(|size| bytes <= *size)?;
        let mut state = self.lock();
        loop {
            if let Some(memory) = self.try_take(&mut state, class) {
                return Some(Buffer { memory: Some(memory), length: bytes, class, pool: Arc::clone(self) });
            }
            if cancelled() {
                return None;
            }
            // Bounded, so that a cancellation is noticed.
            let wait = self.returned.wait_timeout(state, Duration::from_millis(20));
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn try_take(&self, state: &mut State, class: usize) -> Option<Aligned> {
        if let Some(memory) = state.spare[class].pop() {
            return Some(memory);
        }
        // Make room by freeing spare buffers of other sizes, the largest first.
        for other in (0..CLASSES.len()).rev() {
            while state.allocated_bytes + CLASSES[class] > self.limit_bytes
                && state.spare[other].pop().is_some()
            {
                state.allocated_bytes -= CLASSES[other];
            }
        }
        if state.allocated_bytes + CLASSES[class] > self.limit_bytes {
            return None;
        }
        state.allocated_bytes += CLASSES[class];
        Some(Aligned::new(CLASSES[class]))
    }

    /// Bytes allocated now, spare ones included.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.lock().allocated_bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer on loan from its pool; goes back when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Option<Aligned>,
    length: usize,
    class: usize,
    pool: Arc<BufferPool>,
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let memory = self.memory.as_ref().expect("taken only by drop");
        // SAFETY: `length` is at most the class's size, all of it initialised at allocation.
        unsafe { std::slice::from_raw_parts(memory.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let memory = self.memory.as_mut().expect("taken only by drop");
        // SAFETY: as for `deref`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(memory.start.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.lock().spare[self.class].push(memory);
            self.pool.returned.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is taken and given back, the limit holds, and every buffer is aligned and of the length asked.
        #[test]
        fn keeps_its_limit(asks in prop::collection::vec((1_usize..=BUFFER_BYTES_MAX, any::<bool>()), 1..60)) {
            let pool = BufferPool::new(3 << 20);
            let mut held: Vec<Buffer> = Vec::new();
            for (bytes, give_back) in asks {
                if give_back && !held.is_empty() {
                    held.swap_remove(0);
                }
                if let Some(buffer) = pool.take(bytes, || true) {
                    prop_assert_eq!(buffer.len(), bytes);
                    prop_assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
                    held.push(buffer);
                } else {
                    let needed: usize = held.iter().map(|b| CLASSES[b.class]).sum();
                    prop_assert!(needed + BUFFER_BYTES_MAX > 3 << 20, "refused although there was room");
                }
                prop_assert!(pool.allocated_bytes() <= 3 << 20);
            }
        }
    }
}
