//! Reads the ring buffer of the captured stream, and tells positions in it.
//!
//! The layout is the kernel's (`kernel/bpf/ringbuf.c`): a page that holds the consumer's position and is ours to write, a page
//! that holds the producer's, and the data, mapped twice in a row so that no record is torn at the end. A record has a header
//! of 8 bytes, whose first word is its length and two flags: still being written, and discarded. Programs never wake
//! the reader; whoever reads polls.
//!
//! **Order.** Records become readable in the order in which they were reserved: one that is still being written holds up
//! those behind it. What this hands out stays where it is until [`Ring::release`].

use super::CaptureError;
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER: u64 = 8;

/// A place in the stream: bytes that were ever reserved before it. It lies between two records, and only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamPosition(pub u64);

/// The shared memory of a ring; positions can be read by anyone.
struct Shared {
    consumer: NonNull<AtomicU64>,
    producer: NonNull<u8>,
    page: usize,
    size: usize,
}

// SAFETY: the memory is shared with the kernel anyway; positions are touched by atomic operations only, and the data by the
// one `Ring`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn map(ring: BorrowedFd<'_>, size: usize) -> io::Result<Self> {
        // SAFETY: asks for a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })
            .map_err(|_| io::Error::last_os_error())?;
        let map = |bytes: usize, protection, offset: usize| {
            // SAFETY: a fresh shared mapping, of a length that the kernel checks against the ring's.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    protection,
                    libc::MAP_SHARED,
                    ring.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
        };
        let consumer = map(page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = map(page + size * 2, libc::PROT_READ, page).inspect_err(|_| {
            // SAFETY: mapped above, and nothing points into it.
            unsafe { libc::munmap(consumer, page) };
        })?;
        // `mmap` with a null hint never answers the null page.
        let none = || io::Error::from(io::ErrorKind::OutOfMemory);
        Ok(Self {
            consumer: NonNull::new(consumer.cast()).ok_or_else(none)?,
            producer: NonNull::new(producer.cast()).ok_or_else(none)?,
            page,
            size,
        })
    }
    fn consumer(&self) -> &AtomicU64 {
        // SAFETY: mapped for as long as `self` lives; the kernel keeps an aligned word there.
        unsafe { self.consumer.as_ref() }
    }
    fn producer(&self) -> &AtomicU64 {
        // SAFETY: as above; the kernel writes it, and only reads are allowed by the mapping.
        unsafe { self.producer.cast::<AtomicU64>().as_ref() }
    }
    /// Where the data at a position lie.
    fn at(&self, position: u64) -> NonNull<u8> {
        let offset = (position as usize) & (self.size - 1);
        // SAFETY: within the mapping: the data begin one page in, and are mapped twice.
        unsafe { self.producer.add(self.page + offset) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with these lengths; every borrow ends with `self`.
        unsafe {
            libc::munmap(self.consumer.as_ptr().cast(), self.page);
            libc::munmap(self.producer.as_ptr().cast(), self.page + self.size * 2);
        }
    }
}

/// Tells how far the programs are, from any thread.
#[derive(Clone)]
pub struct Producer(Arc<Shared>);

impl Producer {
    /// The end of the stream now: every record that a program has reserved lies before it, written or not.
    #[must_use]
    pub fn position(&self) -> StreamPosition {
        StreamPosition(self.0.producer().load(Ordering::SeqCst))
    }
    /// How full the ring is.
    #[must_use]
    pub fn filled_bytes(&self) -> u64 {
        self.position().0.saturating_sub(self.0.consumer().load(Ordering::Acquire))
    }
    /// Its size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.0.size as u64
    }
}

/// The one reader.
pub struct Ring {
    shared: Arc<Shared>,
    /// Read up to here; released up to the consumer's position.
    read: u64,
}

impl Ring {
    /// Over a ring buffer map of `size` bytes (a power of two). Goes on where the last reader stopped.
    ///
    /// # Errors
    /// The kernel refuses to map it.
    pub fn new(map: BorrowedFd<'_>, size: usize) -> Result<Self, CaptureError> {
        let shared = Shared::map(map, size).map_err(|e| CaptureError::kernel("map the stream", &e))?;
        let read = shared.consumer().load(Ordering::Acquire);
        Ok(Self { shared: Arc::new(shared), read })
    }

    /// For others to see how far the programs are.
    #[must_use]
    pub fn producer(&self) -> Producer {
        Producer(self.shared.clone())
    }

    /// Everything before this has been read.
    #[must_use]
    pub fn position(&self) -> StreamPosition {
        StreamPosition(self.read)
    }

    /// The next record, if there is one that is written: its bytes, as many as were reserved, and the position behind it. The ring
    /// keeps them until [`Ring::release`].
    pub fn take(&mut self) -> Option<(&[u8], StreamPosition)> {
        loop {
            if self.read >= self.shared.producer().load(Ordering::Acquire) {
                return None;
            }
            let record = self.shared.at(self.read);
            // SAFETY: the kernel wrote an aligned header there before it moved the producer's position on.
            let word = unsafe { record.cast::<AtomicU32>().as_ref() }.load(Ordering::Acquire);
            if word & BUSY != 0 {
                return None;
            }
            let length = word & !(BUSY | DISCARDED);
            self.read += (u64::from(length) + HEADER).next_multiple_of(8);
            if word & DISCARDED == 0 {
                // SAFETY: the record lies in the ring as a whole (mapped twice), and the programs do not write it again before it is
                // released, which needs `&mut self`.
                let bytes = unsafe {
                    std::slice::from_raw_parts(record.as_ptr().add(HEADER as usize), length as usize)
                };
                return Some((bytes, StreamPosition(self.read)));
            }
        }
    }

    /// Whether this holds for each record between what was read and `until`, which stay where they are. `None`: it did for those
    /// that are written.
    pub fn look_ahead(&mut self, until: StreamPosition, holds: impl Fn(&[u8]) -> bool) -> Option<bool> {
        let from = self.read;
        let mut all = Some(true);
        while self.read < until.0 {
            match self.take() {
                None => {
                    all = None;
                    break;
                }
                Some((record, _)) if !holds(record) => {
                    all = Some(false);
                    break;
                }
                Some(_) => {}
            }
        }
        self.read = from;
        all
    }

    /// Gives what was read back to the programs.
    pub fn release(&mut self) {
        self.shared.consumer().store(self.read, Ordering::Release);
    }

    /// Passes over everything up to the stream's end now. Records still being written before it end up behind the reader, which
    /// the kernel allows: their place is not reused before they are written.
    pub fn skip_all(&mut self) {
        while self.take().is_some() {}
        self.release();
    }
}
