//! Whether a point is as young as it says: one block of the disk is given the time over and over, and looked at in recovered points.
//!
//! What a point says is when its marker lay; what its block says is the last write that is in it. Between them lies [`EVERY`], the time
//! of one write, and whatever the point says wrongly.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};
use highwater_tests::buffer::{ALIGNMENT, Aligned, open_direct};

use super::stored::now_ms;

/// Between writes of the block.
pub const EVERY: Duration = Duration::from_millis(10);

/// Writes while it lives.
pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Probe {
    /// Begins with the block at this byte of a device, past the page cache.
    pub fn start(device: &Path, at: u64) -> Result<Self> {
        let file = open_direct(device, true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let write = move || {
            let mut block = Aligned::zeroed(ALIGNMENT);
            while !stopped.load(Ordering::Acquire) {
                block[..8].copy_from_slice(&now_ms().to_le_bytes());
                file.write_all_at(&block, at)?;
                thread::sleep(EVERY);
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("probe".into()).spawn(write)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().map(JoinHandle::join);
        ended.unwrap_or(Ok(Ok(()))).map_err(|_| anyhow!("the thread that writes the time has panicked"))?
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("bench: {error:#}");
        }
    }
}

/// The time in the block at this byte of an image; none if it was never written.
pub fn read(image: &Path, at: u64) -> Result<Option<u64>> {
    let mut time = [0; 8];
    File::open(image)?.read_exact_at(&mut time, at)?;
    Ok(Some(u64::from_le_bytes(time)).filter(|time| *time > 0))
}
