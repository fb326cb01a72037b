//! What device-mapper's `log-writes` target has noted: each write below it, in the order in which they completed or were flushed.
//!
//! Documentation/admin-guide/device-mapper/log-writes.rst: a first sector tells the number of entries; each of these has a sector of
//! its own, then what was written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use highwater_tests::buffer::{Aligned, open_direct};

pub const SECTOR: usize = 512;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// One entry.
pub enum Entry<'l> {
    /// This was written, from this sector on.
    Write(u64, &'l [u8]),
    /// So many sectors from this one on were discarded.
    Discard(u64, u64),
    /// Somebody set a mark.
    Mark(&'l str),
}

/// Hands each entry on. Answers how many there are.
pub fn read(log: &Path, mut each: impl FnMut(Entry<'_>) -> Result<()>) -> Result<u64> {
    let mut log = Log { file: open_direct(log, false)?, chunk: Aligned::zeroed(CHUNK), held: 0..0, at: 0 };
    let mut head = [0; SECTOR];
    let mut content = vec![];
    log.take(&mut head)?;
    let sector_bytes = u32::from_le_bytes(head[24..28].try_into()?) as usize;
    ensure!(word(&head, 0) == MAGIC && word(&head, 1) == VERSION, "this is no log of writes");
    ensure!(sector_bytes == SECTOR, "sectors of {sector_bytes} bytes");
    let entries = word(&head, 2);
    for number in 0..entries {
        log.take(&mut head).with_context(|| format!("entry {number} of {entries}"))?;
        let (sector, sectors, flags, length) =
            (word(&head, 0), word(&head, 1), word(&head, 2), word(&head, 3));
        if flags & MARK != 0 {
            let name = head.get(32..32 + length as usize).context("a mark is too long")?;
            each(Entry::Mark(std::str::from_utf8(name)?.trim_end_matches('\0')))?;
        } else if flags & DISCARD != 0 {
            each(Entry::Discard(sector, sectors))?;
        } else if sectors > 0 {
            content.resize(sectors as usize * SECTOR, 0);
            log.take(&mut content).with_context(|| format!("entry {number} of {entries}"))?;
            each(Entry::Write(sector, &content))?;
        }
    }
    Ok(entries)
}

fn word(head: &[u8; SECTOR], index: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&head[index * 8..index * 8 + 8]);
    u64::from_le_bytes(bytes)
}

/// The log's device, read in large pieces.
struct Log {
    file: File,
    chunk: Aligned,
    /// What is left of the chunk.
    held: std::ops::Range<usize>,
    /// Where the next chunk is read.
    at: u64,
}

impl Log {
    fn take(&mut self, into: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            if self.held.is_empty() {
                let read = self.file.read_at(&mut self.chunk, self.at)?;
                ensure!(read > 0 && read % SECTOR == 0, "the log ends in the midst of something");
                self.at += read as u64;
                self.held = 0..read;
            }
            let count = self.held.len().min(into.len() - done);
            let from = self.held.start;
            into[done..done + count].copy_from_slice(&self.chunk[from..from + count]);
            self.held.start += count;
            done += count;
        }
        Ok(())
    }
}
