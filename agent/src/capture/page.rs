//! A page of the agent's own whose content it knows, shown to the capture programs by reading a block of a device into it with
//! direct I/O. When the bio is queued, the page still holds the known content. Nothing is written to any device.

use super::{CaptureError, object::Object, ring::Ring};
use crate::device::BlockDevice;
use highwater_abi::stream::{Probe, kind, probe};
use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    ptr::NonNull,
};

const PAGE: usize = 4096;
/// Records of others that may come between asking and the page's.
const RECORDS_MAX: usize = 1 << 20;

/// A resident, locked page that is not part of a huge one.
pub struct KnownPage {
    memory: NonNull<u8>,
    magic: [u64; 2],
}

impl KnownPage {
    /// A new one, filled with a random pattern.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a fresh private mapping.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the mapping above.
        let locked = unsafe {
            libc::madvise(memory.as_ptr().cast(), PAGE, libc::MADV_NOHUGEPAGE);
            libc::mlock(memory.as_ptr().cast(), PAGE)
        };
        let mut page = Self { memory, magic: [0; 2] };
        if locked != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut random = [0u8; 8];
        File::open("/dev/urandom").and_then(|f| io::Read::read_exact(&mut &f, &mut random))?;
        let first = u64::from_le_bytes(random);
        page.magic = [first, !first];
        page.fill();
        Ok(page)
    }

    /// The two words that its content begins with, and consists of.
    pub fn magic(&self) -> [u64; 2] {
        self.magic
    }

    fn fill(&mut self) {
        let pattern: Vec<u8> = self.magic.iter().flat_map(|w| w.to_le_bytes()).collect();
        for piece in self.bytes().chunks_exact_mut(pattern.len()) {
            piece.copy_from_slice(&pattern);
        }
    }
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is this value's own; a read into it is over when `probed` returns.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), PAGE) }
    }

    /// The number of the page frame that it lies in.
    pub fn frame(&self) -> io::Result<u64> {
        let mut entry = [0u8; 8];
        let at = self.memory.as_ptr() as u64 / PAGE as u64 * 8;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
        let entry = u64::from_le_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || frame == 0 {
            return Err(io::Error::other("the page's frame is not told"));
        }
        Ok(frame)
    }

    /// Fills it, reads a block of the device into it with this probe asked for, and answers what the probe found.
    pub fn probed(
        &mut self,
        object: &mut Object,
        device: &BlockDevice,
        probe: Probe,
    ) -> Result<Probe, CaptureError> {
        // SAFETY: no conditions.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) } as u64;
        self.fill();
        object.set_probe(Probe { thread, ..probe })?;
        let read = self.read(device);
        let found = object.probe();
        object.set_probe(Probe::default())?;
        read.map_err(|e| CaptureError::kernel(format!("read {}", device.path.display()), &e))?;
        found
    }

    /// Has the page's content captured, as a record of [`kind::PROBE`]. The probe must be attached.
    pub fn capture(&mut self, object: &mut Object, device: &BlockDevice) -> Result<(), CaptureError> {
        self.probed(object, device, Probe { what: probe::CAPTURE, ..Probe::default() }).map(drop)
    }

    /// Whether this is the content that it had when it was captured.
    pub fn is(&self, content: &[u8]) -> bool {
        let (words, rest) = content.as_chunks::<8>();
        content.len() == PAGE
            && rest.is_empty()
            && words.iter().enumerate().all(|(at, word)| u64::from_le_bytes(*word) == self.magic[at % 2])
    }

    fn read(&mut self, device: &BlockDevice) -> io::Result<()> {
        let file =
            File::options().read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(&device.path)?;
        file.read_at(self.bytes(), 0).map(drop)
    }
}

/// Reads a known page back through the way of capture, while nobody else reads the ring.
pub fn read_back(object: &mut Object, ring: &mut Ring, device: &BlockDevice) -> Result<(), CaptureError> {
    let mut page = KnownPage::new().map_err(|e| CaptureError::kernel("lock a page", &e))?;
    object.attach_probe()?;
    let captured = page.capture(object, device);
    object.detach_probe();
    captured?;
    let mut right = false;
    for _ in 0..RECORDS_MAX {
        let Some((record, _)) = ring.take() else { break };
        if let Some((header, payload)) = super::record::split(record)
            && header.kind == kind::PROBE
        {
            right = page.is(payload);
        }
    }
    ring.release();
    if right {
        Ok(())
    } else {
        Err(CaptureError::Bases("a known page was read back with another content".into()))
    }
}

impl Drop for KnownPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), PAGE) };
    }
}
