//! A file that is appended to without a pause, also while a point is made: numbered records, each with a checksum. A
//! recovered one must hold records 0 to n without a gap; n tells exactly up to when the recovered disk had got.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

/// Its name on the disk.
pub const NAME: &str = "journal";
const RECORD_BYTES: usize = 64;
const CHECKED_BYTES: usize = RECORD_BYTES - 4;
const SYNC_EVERY: u64 = 32;
const PAUSE: Duration = Duration::from_micros(300);

#[derive(Default)]
struct Counts {
    written: AtomicU64,
    synced: AtomicU64,
    /// When the application was told so, in milliseconds since 1970, and how many it had then.
    told: Mutex<Vec<(u64, u64)>>,
    stop: AtomicBool,
}

/// The writer; stopped when dropped.
pub struct Journal {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl Journal {
    /// Starts to write in a directory.
    pub fn start(dir: &Path) -> Result<Self> {
        let mut file = File::create(dir.join(NAME))?;
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        let thread = thread::spawn(move || {
            // It ends with the disk: then there is no one to tell.
            let _ = write(&mut file, &shared);
        });
        Ok(Journal { counts, thread: Some(thread) })
    }

    /// Records that the application was told are on the disk.
    pub fn synced(&self) -> u64 {
        self.counts.synced.load(Ordering::Acquire)
    }

    /// The same, by a moment in milliseconds since 1970.
    pub fn synced_by(&self, unix_ms: u64) -> u64 {
        let told = self.counts.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.iter().rev().find(|(at, _)| *at < unix_ms).map_or(0, |(_, count)| *count)
    }

    /// Records begun to be written: no more than these can be on the disk.
    pub fn written(&self) -> u64 {
        // One more may be under way.
        self.counts.written.load(Ordering::Acquire) + 1
    }

    /// Ends it.
    pub fn stop(&mut self) {
        self.counts.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.stop();
    }
}

fn write(file: &mut File, counts: &Counts) -> Result<()> {
    for number in 0.. {
        if counts.stop.load(Ordering::Acquire) {
            break;
        }
        file.write_all(&record(number))?;
        counts.written.store(number + 1, Ordering::Release);
        if (number + 1) % SYNC_EVERY == 0 {
            file.sync_data()?;
            counts.synced.store(number + 1, Ordering::Release);
            let told = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
            counts.told.lock().unwrap_or_else(PoisonError::into_inner).push((told, number + 1));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn record(number: u64) -> [u8; RECORD_BYTES] {
    let mut record = [b'.'; RECORD_BYTES];
    record[..8].copy_from_slice(&number.to_le_bytes());
    let sum = crc32c::crc32c(&record[..CHECKED_BYTES]);
    record[CHECKED_BYTES..].copy_from_slice(&sum.to_le_bytes());
    record
}

/// How many records a recovered journal holds; an error if any is not what was written.
pub fn records(dir: &Path) -> Result<u64> {
    let content = fs::read(dir.join(NAME)).context("the journal is missing")?;
    ensure!(content.len() % RECORD_BYTES == 0, "the journal ends within a record");
    for (number, found) in content.chunks_exact(RECORD_BYTES).enumerate() {
        ensure!(found == record(number as u64), "record {number} of the journal is damaged");
    }
    Ok((content.len() / RECORD_BYTES) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_or_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::start(dir.path()).unwrap();
        while journal.synced() < 64 {
            thread::sleep(Duration::from_millis(1));
        }
        journal.stop();
        let count = records(dir.path()).unwrap();
        assert!((64..=journal.written()).contains(&count));
        let path = dir.path().join(NAME);
        let mut content = fs::read(&path).unwrap();
        content[70] ^= 1;
        fs::write(&path, &content).unwrap();
        assert!(records(dir.path()).unwrap_err().to_string().contains("record 1 "));
        fs::write(&path, &content[64..]).unwrap();
        assert!(records(dir.path()).is_err());
    }
}
