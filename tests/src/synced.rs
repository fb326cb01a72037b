//! A program's own journal over two files: a record goes to the first and is synced, then it goes to the second and is synced.

use crate::{promises::Writer, random::Random};
use anyhow::Result;
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const RECORD_BYTES_MAX: u64 = 600;

/// Writes numbered records of different lengths, one behind the other, through the page cache; `fdatasync` acknowledges them.
pub struct TwoFiles {
    seed: u64,
    files: [(File, u64); 2],
}

impl TwoFiles {
    /// In files of two directories. With `room_bytes` they have so many zeros before: then a record changes no metadata, and
    /// `fdatasync` writes nothing but it.
    pub fn create(dirs: [&Path; 2], seed: u64, room_bytes: usize) -> Result<Self> {
        let open = |dir: &Path| -> Result<(File, u64)> {
            let file = File::create_new(path(dir, seed))?;
            file.write_all_at(&vec![0; room_bytes], 0)?;
            file.sync_all()?;
            // Its name, too.
            File::open(dir)?.sync_all()?;
            Ok((file, 0))
        };
        Ok(Self { seed, files: [open(dirs[0])?, open(dirs[1])?] })
    }
}

impl Writer for TwoFiles {
    fn places(&self) -> usize {
        2
    }

    fn write(&mut self, place: usize, number: u64) -> Result<()> {
        let (file, end) = &mut self.files[place];
        let record = record(self.seed, number);
        file.write_all_at(&record, *end)?;
        file.sync_data()?;
        *end += record.len() as u64;
        Ok(())
    }
}

/// How many records are in the file of a directory, from the first on. What lies behind them is nothing, or part of the next.
pub fn records(dir: &Path, seed: u64) -> Result<u64> {
    let content = fs::read(path(dir, seed))?;
    let mut rest = &content[..];
    let mut count = 0;
    while let Some(behind) = rest.strip_prefix(&record(seed, count + 1)[..]) {
        (rest, count) = (behind, count + 1);
    }
    Ok(count)
}

fn path(dir: &Path, seed: u64) -> PathBuf {
    dir.join(format!("records-{seed}"))
}

/// Different from all others, and from zeros.
fn record(seed: u64, number: u64) -> Vec<u8> {
    let mut random = Random::new(seed << 32 | number);
    let mut content = vec![0; 16 + random.below(RECORD_BYTES_MAX) as usize];
    random.fill(&mut content);
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_counted_up_to_the_first_that_is_not_whole() {
        for room_bytes in [0, 100_000] {
            let dirs = [tempfile::tempdir_in("/var/tmp").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap()];
            let [a, b] = [dirs[0].path(), dirs[1].path()];
            let mut writer = TwoFiles::create([a, b], 5, room_bytes).unwrap();
            assert_eq!(records(a, 5).unwrap(), 0);
            for number in 1..=20 {
                writer.write(0, number).unwrap();
                writer.write(1, number).unwrap();
            }
            writer.write(0, 21).unwrap();
            assert_eq!((records(a, 5).unwrap(), records(b, 5).unwrap()), (21, 20));
            writer.files[0].0.write_all_at(&[0], 0).unwrap();
            let at = (1..=9).map(|number| record(5, number).len() as u64).sum();
            writer.files[1].0.write_all_at(&[0; 8], at).unwrap();
            assert_eq!((records(a, 5).unwrap(), records(b, 5).unwrap()), (0, 9));
        }
    }
}
