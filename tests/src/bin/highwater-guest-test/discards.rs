//! Discards that the block layer makes one request of: an nvme command can hold many ranges, anywhere on the disk.
//!
//! They arise wherever discards meet in one plug, like those of xfs for the extents that a transaction freed. Here they are made
//! at will: a volume that is scattered over the disk is discarded at once, device-mapper cuts that into one piece a segment,
//! and the block layer puts these into as few requests as the disk's queue allows.
//!
//! All that is discarded was written before, so a block that was not marked shows by its content.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_agent::tracker::{Options, Origin, Tracker};
use highwater_tests::buffer::{Aligned, open_direct};
use highwater_tests::random::Random;

use super::load::{self, BLKDISCARD, Done};
use super::machine;
use super::mapper::{Mapped, Target};
use super::subject::{BLOCK, Subject, epoch, missed, protect, settle};

/// Segments of the volume in each round: two ranges a request, some, many, and more than a request can hold.
const ROUNDS: [u64; 4] = [2, 9, 100, 300];
/// Blocks of the longest segment.
const SEGMENT_BLOCKS_MAX: u64 = 6;
/// Ranges of each discard under load, and the rest between two.
const RANGES_UNDER_LOAD: u64 = 60;
const REST: Duration = Duration::from_millis(50);
/// Fields of `/sys/block/<device>/stat`, from 0.
const DISCARDS: usize = 11;
const DISCARDS_MERGED: usize = 12;

/// What the rounds showed together.
#[derive(Debug, Default)]
pub struct Figures {
    /// Ranges discarded.
    pub ranges: u64,
    /// Requests they came in.
    pub requests: u64,
    /// Blocks of them.
    pub blocks: u64,
}

/// Blocks of the disk in a row.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// The first of them.
    pub first: u64,
    /// How many.
    pub blocks: u64,
}

/// Runs it, on a disk that takes several ranges in one request.
pub fn run(options: &Options, disk: &mut Subject) -> Result<Figures> {
    let most = machine::attribute(&disk.path, "queue/max_discard_segments")?;
    println!("  {}: up to {most} ranges in a request", disk.name);
    ensure!(most > 1, "{} takes one range in a request: this shows nothing", disk.name);
    let (mut tracker, origin) = Tracker::open(options.clone()).context("cannot load the programs")?;
    ensure!(matches!(origin, Origin::Fresh(_)), "someone tracked already");
    let disks = std::slice::from_mut(disk);
    protect(&mut tracker, disks)?;
    let (mut figures, mut wrong) = (Figures::default(), vec![]);
    for (seed, segments) in (1..).zip(ROUNDS) {
        if let Err(error) = round(&mut tracker, disks, segments, seed, &mut figures) {
            wrong.push(format!("{error:#}"));
        }
    }
    let id = disks[0].id;
    let counted = tracker.figures(id)?;
    tracker.detach()?;
    if Some(counted.counters.sectors) != counted.kernel {
        wrong.push(format!("the kernel counts {:?}, the tracker {:?}", counted.kernel, counted.counters));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(figures)
}

fn round(
    tracker: &mut Tracker,
    disks: &mut [Subject],
    segments: u64,
    seed: u64,
    figures: &mut Figures,
) -> Result<()> {
    let path = disks[0].path.clone();
    let segments = scattered(disks[0].device.size_bytes / BLOCK as u64, segments, seed);
    fill(&path, &segments, seed)?;
    let ids = [disks[0].id];
    ensure!(settle(tracker, disks, &ids)?, "something stays in flight");
    let written = missed(disks)?[0];
    ensure!(written == 0, "{written} blocks were missed before the discards");

    let before = statistics(&path)?;
    discard(&path, &segments)?;
    let after = statistics(&path)?;
    let (requests, merged) = (after.0 - before.0, after.1 - before.1);
    let blocks: u64 = segments.iter().map(|segment| segment.blocks).sum();
    let changed = changed(&disks[0], &segments)?;
    let marked = epoch(tracker, disks)?.blocks;
    ensure!(settle(tracker, disks, &ids)?, "something stays in flight");
    let missed = missed(disks)?[0];
    println!(
        "  {} ranges of {blocks} blocks in {requests} requests ({merged} merged): {changed} blocks became zeros, \
         {marked} marked, {missed} missed",
        segments.len()
    );
    // What was missed is not to be found missing in the rounds to come.
    disks[0].copy()?;
    figures.ranges += segments.len() as u64;
    figures.requests += requests;
    figures.blocks += blocks;
    ensure!(merged > 0, "no request had several ranges: this shows nothing");
    ensure!(changed == blocks, "{changed} of {blocks} discarded blocks read as zeros: this shows nothing");
    ensure!(missed == 0, "{missed} of {blocks} blocks discarded in {requests} requests were missed");
    Ok(())
}

/// Discards scattered blocks of a disk until told to stop, while others write to it.
pub fn under_load(path: &Path, seed: u64, stop: &AtomicBool, done: &Done) -> Result<()> {
    let blocks = machine::attribute(path, "size")? * 512 / BLOCK as u64;
    for seed in seed.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        discard(path, &scattered(blocks, RANGES_UNDER_LOAD, seed))?;
        done.discards.fetch_add(1, Ordering::Relaxed);
        thread::sleep(REST);
    }
    Ok(())
}

/// So many segments, each in a part of the disk of its own, in no order. Between any two of them is a block at least.
pub fn scattered(blocks: u64, count: u64, seed: u64) -> Vec<Segment> {
    let mut random = Random::new(seed);
    let part = blocks / count;
    let mut segments: Vec<Segment> = (0..count)
        .map(|at| {
            let blocks = 1 + random.below(SEGMENT_BLOCKS_MAX);
            Segment { first: at * part + random.below(part - blocks), blocks }
        })
        .collect();
    for at in (1..count).rev() {
        segments.swap(at as usize, random.below(at + 1) as usize);
    }
    segments
}

/// Writes to all their blocks.
pub fn fill(path: &Path, segments: &[Segment], seed: u64) -> Result<()> {
    let disk = open_direct(path, true)?;
    let mut buffer = Aligned::zeroed(BLOCK * SEGMENT_BLOCKS_MAX as usize);
    for segment in segments {
        let content = &mut buffer[..segment.blocks as usize * BLOCK];
        for (block, content) in (segment.first..).zip(content.chunks_mut(BLOCK)) {
            load::encode(content, seed, block, 0, 1);
        }
        disk.write_all_at(content, segment.first * BLOCK as u64)?;
    }
    Ok(())
}

/// Discards them by one call, on a volume made of them.
pub fn discard(path: &Path, segments: &[Segment]) -> Result<()> {
    let (mut targets, mut start) = (vec![], 0);
    for segment in segments {
        targets.push(Target::linear(start, segment.blocks * 8, path, segment.first * 8)?);
        start += segment.blocks * 8;
    }
    let volume = Mapped::new("scattered", &targets)?;
    let file = File::options().read(true).write(true).open(&volume.path)?;
    load::range(&file, BLKDISCARD, 0, start * 512).context("cannot discard")?;
    drop(file);
    volume.remove()
}

/// How many blocks of the segments are zeros.
fn changed(disk: &Subject, segments: &[Segment]) -> Result<u64> {
    let mut zeros = 0;
    for segment in segments {
        let blocks = segment.first as usize..(segment.first + segment.blocks) as usize;
        disk.read(blocks, |_, content| zeros += u64::from(content.iter().all(|byte| *byte == 0)))?;
    }
    Ok(zeros)
}

/// Discards that the disk was asked for, and those that were merged into one of them.
pub fn statistics(path: &Path) -> Result<(u64, u64)> {
    let block = path.file_name().context("a device has a name")?;
    let text = fs::read_to_string(Path::new("/sys/block").join(block).join("stat"))?;
    let fields: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(fields.len() > DISCARDS_MERGED, "the kernel does not count discards");
    Ok((fields[DISCARDS], fields[DISCARDS_MERGED]))
}
