//! The chunks of one session that wait on the disk, first in, first out.
//!
//! A record is a header (length, number, delta) and the chunk, sealed with AES-256-GCM under a key that is drawn for this spool and kept
//! in memory alone; header and place in the order are authenticated. So a record that comes back is the one that was written, as it
//! was, or [`CollectorError::CacheDamaged`]: nothing else ever gets from here to the vault.
//!
//! **Order.** One side appends and syncs, another takes; each waits for its own calls. What is appended may be taken once it was
//! synced, and the caller counts that. **Failure.** After an append or a sync that failed, nothing more is appended to this spool
//! ([`Spool::is_broken`]): the number of a record, which is its nonce, is never used twice, and what was written half is never
//! looked at. What was synced before can still be taken. **Crash, drop.** All of it is gone, and the space given back.
//!
//! Files are filled one after the other, and each is let go of when its last record was taken.

use super::budget::Budget;
use super::medium::{Backing, Medium};
use crate::CollectorError;
use crate::lock::locked;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use bytes::Bytes;
use highwater_delta::{CHUNK_BYTES_MAX, DeltaId};
use highwater_vault::VaultError;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use zeroize::Zeroizing;

/// Length of the chunk (4), number of the record (8), delta (16).
const HEADER_BYTES: usize = 28;
const TAG_BYTES: usize = 16;

/// See the module.
pub struct Spool {
    medium: Arc<dyn Medium>,
    budget: Arc<Budget>,
    file_bytes: u64,
    key: LessSafeKey,
    places: Mutex<Places>,
    held: Arc<AtomicU64>,
}

/// What came of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It will be there after the next sync.
    Yes,
    /// There is no room for it now; nothing was done.
    Full,
}

#[derive(Default)]
struct Places {
    files: VecDeque<Arc<File>>,
    /// Where the next record is, in the first file.
    head: u64,
    /// Where the next one will be, in the last file.
    tail: u64,
    appended: u64,
    taken: u64,
    /// Files that something was appended to since the last sync.
    unsynced: Vec<Arc<File>>,
    /// A record is being written where it was told to.
    appending: bool,
    broken: bool,
}

/// A file, and what it takes of the budget.
struct File {
    backing: Box<dyn Backing>,
    bytes: AtomicU64,
    held: Arc<AtomicU64>,
    budget: Arc<Budget>,
}

impl Drop for File {
    fn drop(&mut self) {
        let bytes = self.bytes.load(Ordering::SeqCst);
        self.held.fetch_sub(bytes, Ordering::SeqCst);
        self.budget.give(bytes);
    }
}

impl Spool {
    pub(super) fn new(
        medium: Arc<dyn Medium>,
        budget: Arc<Budget>,
        file_bytes: u64,
    ) -> Result<Self, CollectorError> {
        let mut secret = Zeroizing::new([0; 32]);
        let drawn = rand::fill(secret.as_mut()).and_then(|()| UnboundKey::new(&AES_256_GCM, secret.as_ref()));
        let key = LessSafeKey::new(drawn.map_err(|_| VaultError::Crypto("a key for the cache"))?);
        let (places, held) = (Mutex::default(), Arc::default());
        Ok(Self { medium, budget, file_bytes, key, places, held })
    }

    /// Whether nothing can be appended any more.
    pub fn is_broken(&self) -> bool {
        locked(&self.places).broken
    }

    /// Adds a chunk. Blocks.
    ///
    /// # Errors
    /// The disk's. The spool is broken then.
    pub fn append(&self, delta: DeltaId, chunk: &[u8]) -> io::Result<Appended> {
        let bytes = (HEADER_BYTES + chunk.len() + TAG_BYTES) as u64;
        if !self.budget.try_take(self.held.load(Ordering::SeqCst), bytes) {
            return Ok(Appended::Full);
        }
        self.held.fetch_add(bytes, Ordering::SeqCst);
        let (file, offset, number) = match self.place(bytes) {
            Ok(place) => place,
            Err(error) => {
                self.held.fetch_sub(bytes, Ordering::SeqCst);
                self.budget.give(bytes);
                return Err(error);
            }
        };
        let written =
            self.seal(number, delta, chunk).and_then(|record| write_all(&*file.backing, &record, offset));
        let mut places = locked(&self.places);
        places.appending = false;
        if let Err(error) = written {
            places.broken = true;
            return Err(error);
        }
        places.tail = offset + bytes;
        places.appended = number + 1;
        if !places.unsynced.iter().any(|known| Arc::ptr_eq(known, &file)) {
            places.unsynced.push(file);
        }
        Ok(Appended::Yes)
    }

    /// File, offset and number of the next record, whose bytes are charged to the file.
    fn place(&self, bytes: u64) -> io::Result<(Arc<File>, u64, u64)> {
        let mut places = locked(&self.places);
        if places.broken {
            return Err(io::Error::other("it failed before"));
        }
        if places.files.is_empty() || places.tail >= self.file_bytes {
            // Short: a name is made and removed.
            let backing = self.medium.create().inspect_err(|_| places.broken = true)?;
            let (held, budget) = (self.held.clone(), self.budget.clone());
            let file = File { backing, bytes: AtomicU64::new(0), held, budget };
            places.files.push_back(Arc::new(file));
            places.tail = 0;
        }
        let Some(file) = places.files.back().cloned() else { return Err(io::ErrorKind::NotFound.into()) };
        file.bytes.fetch_add(bytes, Ordering::SeqCst);
        places.appending = true;
        Ok((file, places.tail, places.appended))
    }

    /// Waits until the disk has what was appended. Blocks.
    ///
    /// # Errors
    /// The disk's. What was appended since the last sync is lost, and the spool is broken.
    pub fn sync(&self) -> io::Result<()> {
        let unsynced = std::mem::take(&mut locked(&self.places).unsynced);
        for file in unsynced {
            file.backing.sync().inspect_err(|_| locked(&self.places).broken = true)?;
        }
        Ok(())
    }

    /// Takes the oldest chunk, which must have been synced. Blocks.
    ///
    /// # Errors
    /// [`CollectorError::CacheDamaged`]; the disk's as [`CollectorError::CacheFailed`]. The session is to end then.
    pub fn take(&self) -> Result<(DeltaId, Bytes), CollectorError> {
        let (file, offset, number) = {
            let mut places = locked(&self.places);
            if places.taken == places.appended {
                return Err(CollectorError::CacheDamaged("nothing waits in it"));
            }
            // The last file is let go of when another one has been begun, or all was taken.
            while places.head >= self.file_bytes && places.files.len() > 1 {
                places.files.pop_front();
                places.head = 0;
            }
            let first = places.files.front().cloned();
            (first.ok_or(CollectorError::CacheDamaged("it has no file"))?, places.head, places.taken)
        };
        let mut header = [0; HEADER_BYTES];
        read_exact(&*file.backing, &mut header, offset)?;
        let [a, b, c, d, ..] = header;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        // Before anything of this length is asked for.
        if len > CHUNK_BYTES_MAX {
            return Err(CollectorError::CacheDamaged("a length that no chunk has"));
        }
        let mut sealed = vec![0; len + TAG_BYTES];
        read_exact(&*file.backing, &mut sealed, offset + HEADER_BYTES as u64)?;
        let opened = self.key.open_in_place(nonce(number), Aad::from(header), &mut sealed);
        let opened = opened.map_err(|_| CollectorError::CacheDamaged("a record is not as it was written"))?;
        let len = opened.len();
        sealed.truncate(len);
        let delta = <[u8; 16]>::try_from(&header[12..]).unwrap_or_default();
        let mut places = locked(&self.places);
        places.head = offset + (HEADER_BYTES + len + TAG_BYTES) as u64;
        places.taken = number + 1;
        if places.taken == places.appended && !places.appending {
            // So the space is free at once, and not when another file was begun.
            places.files.clear();
            places.unsynced.clear();
            (places.head, places.tail) = (0, 0);
        }
        Ok((DeltaId::from_bytes(delta), sealed.into()))
    }

    fn seal(&self, number: u64, delta: DeltaId, chunk: &[u8]) -> io::Result<Vec<u8>> {
        let len = u32::try_from(chunk.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut record = Vec::with_capacity(HEADER_BYTES + chunk.len() + TAG_BYTES);
        record.extend_from_slice(&len.to_le_bytes());
        record.extend_from_slice(&number.to_le_bytes());
        record.extend_from_slice(delta.as_bytes());
        let header = <[u8; HEADER_BYTES]>::try_from(&record[..]).map_err(io::Error::other)?;
        record.extend_from_slice(chunk);
        let body = &mut record[HEADER_BYTES..];
        let tag = self.key.seal_in_place_separate_tag(nonce(number), Aad::from(header), body);
        record.extend_from_slice(tag.map_err(|_| io::Error::other("sealing failed"))?.as_ref());
        Ok(record)
    }
}

/// The number of a record, which no other one of this key has.
fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn write_all(file: &dyn Backing, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                offset += written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_exact(file: &dyn Backing, bytes: &mut [u8], mut offset: u64) -> Result<(), CollectorError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match file.read_at(rest, offset) {
            Ok(0) => return Err(CollectorError::CacheDamaged("a record is cut off")),
            Ok(read) => {
                rest = rest.get_mut(read..).unwrap_or_default();
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(CollectorError::CacheFailed { doing: "reading", source }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
