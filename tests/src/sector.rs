//! Sectors that tell who wrote them: a wrong one says which write is missing.
//!
//! | bytes | content |
//! |---|---|
//! | 0–7 | magic `HWSECTOR` |
//! | 8–15 | device id |
//! | 16–23 | sector number |
//! | 24–31 | sequence of the write, from 1, over all threads |
//! | 32–35 | thread |
//! | 36–39 | CRC-32C of everything else |
//! | 40– | filling, pseudorandom by sequence and sector |
//!
//! Threads that write at once must keep to sectors of their own: between two writes in flight to one sector there is
//! no order that a check could rely on.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};

use crate::buffer::{Aligned, open_direct};
use crate::random::Random;

const MAGIC: [u8; 8] = *b"HWSECTOR";
const HEADER_BYTES: usize = 40;

/// A device written with self-describing sectors, and the record of what was written.
pub struct Sectors {
    device_id: u64,
    sector_bytes: usize,
    sequence: AtomicU64,
    journal: Mutex<Vec<Write>>,
}

/// One write of consecutive sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Its place in the order of writes.
    pub sequence: u64,
    /// Who wrote.
    pub thread: u32,
    /// The first sector.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What a sector was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Only zeros.
    Zeros,
    /// A whole sector of this device and place, by this write of this thread.
    Write {
        /// The write.
        sequence: u64,
        /// Its thread.
        thread: u32,
    },
    /// A whole sector that belongs elsewhere.
    Elsewhere {
        /// The device it names.
        device_id: u64,
        /// The sector it names.
        sector: u64,
    },
    /// Neither zeros nor a whole sector: torn, or not ours.
    Garbage,
}

/// A sector that does not hold its last write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrong {
    /// The sector.
    pub sector: u64,
    /// The write it should hold; none if it was never written.
    pub expected: Option<Write>,
    /// What it holds.
    pub found: Found,
}

impl Sectors {
    /// A device with sectors of 512 or 4096 bytes, on which nothing has been written.
    pub fn new(device_id: u64, sector_bytes: usize) -> Self {
        assert!(sector_bytes == 512 || sector_bytes == 4096, "sectors have 512 or 4096 bytes");
        Sectors { device_id, sector_bytes, sequence: AtomicU64::new(0), journal: Mutex::new(Vec::new()) }
    }

    /// Opens a device or file for [`Sectors::write`], with O_DIRECT.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        open_direct(path, true)
    }

    /// Writes sectors, and records the write once it has completed.
    pub fn write(&self, file: &File, thread: u32, first: u64, count: u64) -> io::Result<u64> {
        let sequence = self.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        let mut buffer = Aligned::zeroed(count as usize * self.sector_bytes);
        for (sector, bytes) in (first..).zip(buffer.chunks_mut(self.sector_bytes)) {
            self.encode(bytes, sector, sequence, thread);
        }
        file.write_all_at(&buffer, first * self.sector_bytes as u64)?;
        self.lock().push(Write { sequence, thread, first, count });
        Ok(sequence)
    }

    /// Records that sectors were discarded or zeroed by other means: they must read as zeros from here on.
    pub fn forget(&self, first: u64, count: u64) -> u64 {
        let sequence = self.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        self.lock().push(Write { sequence, thread: u32::MAX, first, count });
        sequence
    }

    /// The last sequence given out. With the writers at rest, this names the present state.
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::SeqCst)
    }

    /// Checks a device, or a copy of it, against the state after the write `until`.
    ///
    /// Sectors never written are not looked at.
    pub fn verify(&self, path: &Path, until: u64) -> Result<Vec<Wrong>> {
        let file = open_direct(path, false)?;
        let expected = self.expected(until);
        // Whole 4 KiB are read, as a direct read on a 4K device must.
        let per_read = (4096 / self.sector_bytes) as u64;
        let mut buffer = Aligned::zeroed(4096);
        let mut loaded = None;
        let mut wrong = Vec::new();
        for (sector, write) in expected {
            let page = sector / per_read;
            if loaded != Some(page) {
                let count = file.read_at(&mut buffer, page * 4096)?;
                if count < (sector % per_read + 1) as usize * self.sector_bytes {
                    bail!("{} ends before sector {sector}", path.display());
                }
                loaded = Some(page);
            }
            let start = (sector % per_read) as usize * self.sector_bytes;
            let found = self.decode(&buffer[start..start + self.sector_bytes], sector);
            if !agrees(write, found) {
                let expected = (write.thread != u32::MAX).then_some(write);
                wrong.push(Wrong { sector, expected, found });
            }
        }
        Ok(wrong)
    }

    /// The last write of each sector among those up to `until`.
    fn expected(&self, until: u64) -> BTreeMap<u64, Write> {
        let mut writes: Vec<Write> =
            self.lock().iter().copied().filter(|write| write.sequence <= until).collect();
        writes.sort_by_key(|write| write.sequence);
        let mut last = BTreeMap::new();
        for write in writes {
            for sector in write.first..write.first + write.count {
                last.insert(sector, write);
            }
        }
        last
    }

    fn encode(&self, bytes: &mut [u8], sector: u64, sequence: u64, thread: u32) {
        Random::new(sequence ^ sector.rotate_left(32)).fill(&mut bytes[HEADER_BYTES..]);
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.device_id.to_le_bytes());
        bytes[16..24].copy_from_slice(&sector.to_le_bytes());
        bytes[24..32].copy_from_slice(&sequence.to_le_bytes());
        bytes[32..36].copy_from_slice(&thread.to_le_bytes());
        let sum = checksum(bytes);
        bytes[36..40].copy_from_slice(&sum.to_le_bytes());
    }

    fn decode(&self, bytes: &[u8], at: u64) -> Found {
        if bytes.iter().all(|byte| *byte == 0) {
            return Found::Zeros;
        }
        if bytes[0..8] != MAGIC || bytes[36..40] != checksum(bytes).to_le_bytes() {
            return Found::Garbage;
        }
        let (device_id, sector) = (u64_at(bytes, 8), u64_at(bytes, 16));
        if (device_id, sector) != (self.device_id, at) {
            return Found::Elsewhere { device_id, sector };
        }
        let thread = u32::from_le_bytes([bytes[32], bytes[33], bytes[34], bytes[35]]);
        Found::Write { sequence: u64_at(bytes, 24), thread }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Write>> {
        self.journal.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn agrees(write: Write, found: Found) -> bool {
    match found {
        Found::Zeros => write.thread == u32::MAX,
        Found::Write { sequence, .. } => sequence == write.sequence,
        Found::Elsewhere { .. } | Found::Garbage => false,
    }
}

fn checksum(sector: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sector[..36]), &sector[HEADER_BYTES..])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}: ", self.sector)?;
        match self.expected {
            Some(write) => write!(f, "write {} of thread {} is missing; ", write.sequence, write.thread)?,
            None => write!(f, "should be zeros; ")?,
        }
        match self.found {
            Found::Zeros => write!(f, "it holds zeros"),
            Found::Write { sequence, thread } => write!(f, "it holds write {sequence} of thread {thread}"),
            Found::Elsewhere { device_id, sector } => {
                write!(f, "it holds sector {sector} of device {device_id}")
            }
            Found::Garbage => write!(f, "it holds a torn or foreign sector"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::Builder::new().tempfile_in("/var/tmp").unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_was_written_is_right_at_every_earlier_state_of_a_copy() {
        for sector_bytes in [512, 4096] {
            let disk = file(1 << 20);
            let sectors = Sectors::new(7, sector_bytes);
            let open = sectors.open(disk.path()).unwrap();
            let per_page = (4096 / sector_bytes) as u64;
            sectors.write(&open, 1, 0, per_page * 4).unwrap();
            let before = sectors.write(&open, 2, per_page * 8, per_page).unwrap();
            let copy = file(0);
            crate::compare::copy_device(disk.path(), copy.path()).unwrap();
            let after = sectors.write(&open, 1, per_page, per_page).unwrap();
            assert_eq!(sectors.verify(copy.path(), before).unwrap(), []);
            assert_eq!(sectors.verify(disk.path(), after).unwrap(), []);
            let wrong = sectors.verify(copy.path(), after).unwrap();
            assert_eq!(wrong.len() as u64, per_page);
            assert_eq!(
                wrong[0].to_string(),
                format!("sector {per_page}: write 3 of thread 1 is missing; it holds write 1 of thread 1")
            );
        }
    }

    #[test]
    fn torn_misplaced_and_undiscarded_sectors_are_told_apart() {
        let disk = file(1 << 20);
        let sectors = Sectors::new(7, 512);
        let open = sectors.open(disk.path()).unwrap();
        sectors.write(&open, 1, 0, 32).unwrap();
        let plain = File::options().read(true).write(true).open(disk.path()).unwrap();
        plain.write_all_at(&[0xff; 100], 3 * 512 + 300).unwrap();
        let mut fifth = [0; 512];
        plain.read_exact_at(&mut fifth, 5 * 512).unwrap();
        plain.write_all_at(&fifth, 9 * 512).unwrap();
        sectors.forget(16, 1);
        let wrong = sectors.verify(disk.path(), sectors.sequence()).unwrap();
        let found: Vec<_> = wrong.iter().map(|wrong| (wrong.sector, wrong.found)).collect();
        assert_eq!(
            found,
            [
                (3, Found::Garbage),
                (9, Found::Elsewhere { device_id: 7, sector: 5 }),
                (16, Found::Write { sequence: 1, thread: 1 }),
            ]
        );
    }
}
