//! A disk that cannot be read: kept apart, so that the others go on, and tried again until it can be.
//!
//! What failed is read again on a thread of its own, since a failing disk may take minutes for each read; the engine only asks
//! whether there is news. Tries are 2 s apart, then twice as long each time, up to a minute; a disk that fails again soon after
//! it was readable goes on where it was, or it would cost the others a started point every other second.

use crate::{
    device::BlockDevice,
    source::{SourceError, SourceOptions, SourceReader},
};
use highwater_delta::BlockRange;
use std::{
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    time::{Duration, Instant},
};

const FIRST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(60);

/// Why a disk cannot be read, and when it is tried again.
#[derive(Debug)]
pub struct Trouble {
    /// What is tried.
    range: BlockRange,
    wait: Duration,
    next: Instant,
    trying: Option<Receiver<bool>>,
    readable_since: Option<Instant>,
}

impl Trouble {
    /// From an error, and what was known before it.
    #[must_use]
    pub fn new(error: &SourceError, before: Option<&Self>) -> Self {
        let range = match error {
            SourceError::BadBlocks { range, .. } => *range,
            _ => BlockRange::new(0, 1),
        };
        let again = before.filter(|b| b.readable_since.is_none_or(|at| at.elapsed() < b.wait * 4));
        let wait = again.map_or(FIRST, |b| (b.wait * 2).min(LONGEST));
        Self { range, wait, next: Instant::now() + wait, trying: None, readable_since: None }
    }

    /// Looks at a try under way, or begins one that is due; true once the disk can be read again.
    pub fn is_over(&mut self, device: &BlockDevice) -> bool {
        if self.readable_since.is_some() {
            return false;
        }
        match self.trying.as_ref().map(Receiver::try_recv) {
            None if Instant::now() >= self.next => {
                let (done, trying) = sync_channel(1);
                let (device, range) = (device.clone(), self.range);
                std::thread::spawn(move || done.send(can_read(&device, range)));
                self.trying = Some(trying);
            }
            None | Some(Err(TryRecvError::Empty)) => {}
            Some(Ok(true)) => {
                (self.trying, self.readable_since) = (None, Some(Instant::now()));
                return true;
            }
            Some(Ok(false) | Err(TryRecvError::Disconnected)) => {
                self.wait = (self.wait * 2).min(LONGEST);
                (self.trying, self.next) = (None, Instant::now() + self.wait);
            }
        }
        false
    }
}

fn can_read(device: &BlockDevice, range: BlockRange) -> bool {
    let options = SourceOptions { readers: 1, memory_bytes: 0 };
    let Ok(reader) = SourceReader::open(device, options) else { return false };
    let mut job = reader.read_ranges([range]);
    let mut read = 0;
    while let Some(run) = job.next_blocking() {
        match run {
            Ok(run) => read += run.range.count,
            Err(_) => return false,
        }
    }
    read == range.count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad() -> SourceError {
        SourceError::BadBlocks {
            path: "/dev/x".into(),
            range: BlockRange::new(7, 1),
            source: std::io::Error::from_raw_os_error(libc::EIO),
        }
    }

    #[test]
    fn tries_become_rarer_and_start_anew_after_a_good_time() {
        let first = Trouble::new(&bad(), None);
        assert_eq!((first.wait, first.range), (FIRST, BlockRange::new(7, 1)));
        let mut second = Trouble::new(&bad(), Some(&first));
        assert_eq!(second.wait, FIRST * 2);
        second.readable_since = Some(Instant::now());
        assert_eq!(Trouble::new(&bad(), Some(&second)).wait, FIRST * 4);
        second.readable_since = Instant::now().checked_sub(FIRST * 100);
        assert_eq!(Trouble::new(&bad(), Some(&second)).wait, FIRST);
        let mut last = first;
        for _ in 0..20 {
            last = Trouble::new(&bad(), Some(&last));
        }
        assert_eq!(last.wait, LONGEST);
    }
}
