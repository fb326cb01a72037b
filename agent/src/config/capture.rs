//! How writes are captured in their order.

use super::{ByteSize, Interval};
use crate::engine::ordered::CaptureOptions;
use serde::Serialize;
use std::{fs, time::Duration};

/// The least memory that is worth it, and the most that is taken unasked.
const MEMORY_MIN: u64 = 64 << 20;
const MEMORY_MAX: u64 = 1 << 30;
/// Of the machine's memory, unless the configuration says otherwise.
const MEMORY_PART: u64 = 32;
/// The smallest ring and the largest that the kernel makes.
const RING_MIN: u64 = 1 << 20;
const RING_MAX: u64 = 1 << 30;

/// How writes are captured in their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Capture {
    /// Whether they are.
    pub mode: CaptureMode,
    /// Between crash-consistent recovery points.
    pub point_interval: Interval,
    /// Bound of the ring and of what is held beside it; by default a thirty-second of the machine's memory, between 64 MiB and
    /// 1 GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// The ring's part of it, cut to a power of two; by default half of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ring: Option<ByteSize>,
    /// How often a known page is read back through the way of capture.
    pub verify_interval: Interval,
    /// Copies of the program; by default what the kernel needs. For tests of the proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
}

/// Whether writes are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureMode {
    /// Wherever the kernel allows it.
    #[default]
    Automatic,
    /// Never: replication goes by bitmaps alone.
    Off,
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            mode: CaptureMode::Automatic,
            point_interval: Interval(Duration::from_secs(5)),
            memory: None,
            ring: None,
            verify_interval: Interval(Duration::from_secs(60)),
            copies: None,
        }
    }
}

impl Capture {
    /// The most memory that may be chosen.
    #[must_use]
    pub fn memory_max() -> ByteSize {
        ByteSize((memory_of_the_machine().unwrap_or(u64::MAX) / 2).max(MEMORY_MIN))
    }
    /// The largest ring that leaves something of the memory for buffers.
    #[must_use]
    pub fn ring_max(&self) -> ByteSize {
        ByteSize((self.memory.map_or_else(default_memory, |m| m.0) / 4 * 3).clamp(RING_MIN, RING_MAX))
    }
    /// What the engine is told.
    #[must_use]
    pub fn options(&self) -> CaptureOptions {
        let memory = self.memory.map_or_else(default_memory, |m| m.0);
        let ring = self.ring.map_or(memory / 2, |r| r.0).clamp(RING_MIN, RING_MAX);
        let ring = 1u64 << ring.ilog2();
        CaptureOptions {
            enabled: self.mode == CaptureMode::Automatic,
            ring_bytes: ByteSize(ring).as_usize(),
            buffer_bytes: memory.saturating_sub(ring).max(RING_MIN),
            copies: self.copies.map(|copies| copies as usize),
            point_interval: self.point_interval.0,
            verify_interval: self.verify_interval.0,
        }
    }
}

fn default_memory() -> u64 {
    (memory_of_the_machine().unwrap_or(0) / MEMORY_PART).clamp(MEMORY_MIN, MEMORY_MAX)
}

fn memory_of_the_machine() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_and_buffers_share_the_memory() {
        let options = |memory: u64, ring: Option<u64>| {
            let capture =
                Capture { memory: Some(ByteSize(memory)), ring: ring.map(ByteSize), ..Capture::default() };
            let options = capture.options();
            (options.ring_bytes as u64, options.buffer_bytes)
        };
        assert_eq!(options(64 << 20, None), (32 << 20, 32 << 20));
        assert_eq!(options(100 << 20, None), (32 << 20, 68 << 20));
        assert_eq!(options(100 << 20, Some(3 << 20)), (2 << 20, 98 << 20));
        let capture = Capture::default().options();
        let all = capture.ring_bytes as u64 + capture.buffer_bytes;
        assert!((MEMORY_MIN..=MEMORY_MAX).contains(&all), "{all}");
    }
}
