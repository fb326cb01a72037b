//! Discards of many ranges in one request, captured: a completion tells of such a request the first range only. Some of what was
//! discarded is written again at once.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use highwater_agent::capture::Loss;

use super::super::discards::{Segment, discard, fill, scattered, statistics};
use super::super::subject::{BLOCK, Subject};
use super::Capture;
use super::follow::{Follower, SEAL_MAX, Window};
use super::round::judge;

/// Discards, and ranges of each.
const DISCARDS: u64 = 12;
const RANGES: u64 = 40;
const WINDOW: Duration = Duration::from_millis(20);

/// Runs it on a disk that takes several ranges in one request. `Some`: a window was not proved, and nothing is to be said.
pub fn run(capture: &mut Capture, disk: &mut Subject, seed: u64) -> Result<Option<Loss>> {
    let path = disk.path.clone();
    let blocks = disk.device.size_bytes / BLOCK as u64;
    let disk = std::slice::from_mut(disk);
    let before = statistics(&path)?;
    let mut follower = Follower::begin(capture, disk, 0)?;
    let mut loss = None;
    for seed in seed..seed + DISCARDS {
        let segments = scattered(blocks, RANGES, seed);
        fill(&path, &segments, seed)?;
        discard(&path, &segments)?;
        let again: Vec<Segment> = segments.into_iter().step_by(3).collect();
        fill(&path, &again, seed + DISCARDS)?;
        thread::sleep(WINDOW);
        if let Window::Lost(told) = follower.window(seed % 2 == 0, SEAL_MAX)? {
            loss = Some(told);
            break;
        }
    }
    let loss = match loss {
        None => follower.settle()?,
        loss => loss,
    };
    follower.tell()?;
    let applied = follower.end();
    if loss.is_none() {
        let merged = statistics(&path)?.1 - before.1;
        println!("  {} ranges in {DISCARDS} discards, {merged} of them merged", DISCARDS * RANGES);
        ensure!(merged > 0, "no request had several ranges: this shows nothing");
        judge(disk, &applied, None)?;
    }
    Ok(loss)
}
