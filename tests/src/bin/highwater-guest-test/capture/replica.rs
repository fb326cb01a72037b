//! A device's replica, kept by the stream: its base copied at rest, then only what was sealed, and what had to be read again.
//!
//! Of a device's beginning, where writes depend on each other, the content itself is kept, for its states on the way; of the rest
//! hashes do.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use highwater_agent::capture::assemble::{Again, Batch};

use super::super::subject::{BLOCK, Subject};

/// What was applied to a replica.
#[derive(Clone, Copy, Debug, Default)]
pub struct Applied {
    /// Blocks with content.
    pub blocks: u64,
    /// Blocks that became zeros.
    pub zeroed: u64,
    /// Blocks read again, of those in which writers meet.
    pub healed: u64,
    /// Blocks read again elsewhere.
    pub healed_elsewhere: u64,
    /// Blocks that the stream lacked.
    pub lacking: u64,
}

/// See the module.
pub struct Replica<'s> {
    /// Of this device.
    pub subject: &'s mut Subject,
    /// What was done to it.
    pub applied: Applied,
    kept: Vec<u8>,
}

impl<'s> Replica<'s> {
    /// Copies the device, which is at rest, so many bytes of it in whole, or all.
    pub fn base(subject: &'s mut Subject, kept_bytes: usize) -> Result<Self> {
        subject.copy()?;
        let kept_bytes = kept_bytes.min(subject.device.size_bytes as usize);
        let mut kept = vec![0; kept_bytes];
        subject.read(0..kept_bytes / BLOCK, |block, content| {
            kept[block * BLOCK..][..BLOCK].copy_from_slice(content);
        })?;
        Ok(Self { subject, applied: Applied::default(), kept })
    }

    /// The beginning of the device, as it is now.
    pub fn content(&self) -> &[u8] {
        &self.kept
    }

    fn set(&mut self, block: u64, content: &[u8]) {
        let at = block as usize;
        self.subject.set(at, content);
        if let Some(place) = self.kept.get_mut(at * BLOCK..(at + 1) * BLOCK) {
            place.copy_from_slice(content);
        }
    }

    /// Takes it to the position that was sealed.
    pub fn apply(&mut self, batch: Batch) {
        let (data, zeros) = batch.into_parts();
        self.applied.blocks += data.len() as u64;
        for (block, content) in data {
            self.set(block, &content[..]);
        }
        for range in zeros {
            self.applied.zeroed += range.count;
            (range.start.0..range.end()).for_each(|block| self.set(block, &[0; BLOCK]));
        }
    }

    /// Reads blocks from the device. `meeting`: where writers meet.
    pub fn read_again(&mut self, again: &Again, meeting: &std::ops::Range<u64>) -> Result<()> {
        for block in again.lacking.iter().chain(&again.healing) {
            let mut held = vec![0; BLOCK];
            self.subject
                .read(*block as usize..*block as usize + 1, |_, content| held.copy_from_slice(content))?;
            self.set(*block, &held);
        }
        let within = again.healing.iter().filter(|block| meeting.contains(block)).count() as u64;
        self.applied.healed += within;
        self.applied.healed_elsewhere += again.healing.len() as u64 - within;
        self.applied.lacking += again.lacking.len() as u64;
        Ok(())
    }

    /// Writes it to a file.
    pub fn keep(&self, at: &Path) -> Result<()> {
        fs::write(at, &self.kept).with_context(|| format!("cannot keep {}", at.display()))
    }
}
