//! The same daily points of the same disk, kept by Highwater, restic and borg.

mod disk;
mod tools;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use highwater_delta::{ChunkEncoder, DeltaId};
use highwater_tests::Arena;
use highwater_vault::Store;
use highwater_vault::policy::Policy;

use self::disk::LivedIn;
use super::made::{Blocks, Made, packed};
use super::{BLOCK, DAY_MS, MIB, files, mib, runtime};
use crate::Choice;
use crate::results::{Results, Series};

const DAYS: u64 = 14;

/// Part of `bench vault`.
pub fn space(choice: &Choice, results: &mut Results) -> Result<()> {
    // A filesystem is mounted: no test may wonder whose it is.
    let arena = Arena::enter("bench-space")?;
    let (runtime, dir) = (runtime()?, arena.dir());
    let disk_bytes = choice.sized(1024 * MIB, 128 * MIB);
    let days = choice.sized(DAYS, 3);
    let mut disk = LivedIn::new(dir.join("image"), disk_bytes)?;
    let before = dir.join("before");
    File::create(&before)?.set_len(disk_bytes)?;
    let vault = dir.join("vault");
    let store = Store::open(&vault.to_string_lossy().parse()?)?;
    let mut made = runtime.block_on(Made::new(store, disk_bytes, 0))?;
    let mut tools = tools::all(dir)?;
    let [mut ours, mut changed] = <[Series; 2]>::default();
    let mut first = 0.0;
    for day in 0..=days {
        eprintln!("day {day} of {days}");
        disk.live_a_day()?;
        for tool in &mut tools {
            tool.back_up(disk.image())?;
        }
        let runs = differing(&before, disk.image())?;
        let blocks: u64 = runs.iter().map(|(_, count)| count).sum();
        made.pass_ms(DAY_MS);
        let began = Instant::now();
        runtime.block_on(keep(&mut made, disk.image(), &runs))?;
        let seconds = began.elapsed().as_secs_f64();
        runtime.block_on(made.maintain(&Policy::default()))?;
        match day {
            0 => first = seconds,
            _ => {
                ours.push(seconds);
                changed.push(mib(blocks * BLOCK));
            }
        }
        fs::copy(disk.image(), &before)?;
    }
    results.row("image, allocated", &mib(disk.allocated_bytes()?).into(), "MiB", "");
    results.row("changed in a day", &changed, "MiB", "");
    let kept = files::contents(&vault)?.1;
    results.row("Highwater: vault at the end", &mib(kept).into(), "MiB", "");
    for tool in &tools {
        let bytes = files::contents(tool.repository())?.1;
        results.row(&format!("{}: repository at the end", tool.name), &mib(bytes).into(), "MiB", "");
        results.row("  Highwater's vault of it", &(kept as f64 / bytes as f64).into(), "", "");
    }
    results.row("Highwater: first point", &first.into(), "s", "");
    results.row("Highwater: a daily point", &ours, "s", "");
    for tool in &tools {
        results.row(&format!("{}: first point", tool.name), &tool.first.into(), "s", "");
        results.row(&format!("{}: a daily point", tool.name), &tool.daily, "s", "");
        results.row("  times Highwater's", &tool.daily.ratio(&ours), "", ">= 50 (100 GiB, 1 GiB changed)");
    }
    results.note(format!(
        "space: an image of {} MiB with ext4, {days} days after the first. Photographs, text, a database, logs, sources come, change and\n\
         go. restic compresses by default (zstd), borg with zstd,1 (its default is lz4, larger); both read the whole image each day, from the\n\
         kernel's memory. Highwater reads, compresses and stores the blocks that changed, which its agent knows; they were found by\n\
         comparing images here, which is not counted. All encrypt. Nothing expires within these days.",
        disk_bytes / MIB
    ));
    Ok(())
}

/// Runs of blocks in which two files differ.
fn differing(before: &Path, after: &Path) -> Result<Vec<Blocks>> {
    let (mut old, mut new) = (File::open(before)?, File::open(after)?);
    let mut buffers = [vec![0; MIB as usize], vec![0; MIB as usize]];
    let (mut runs, mut block): (Vec<Blocks>, u64) = (Vec::new(), 0);
    loop {
        // Both have whole MiB.
        let count = new.read(&mut buffers[1])?;
        if count == 0 {
            return Ok(runs);
        }
        old.read_exact(&mut buffers[0][..count])?;
        let size = BLOCK as usize;
        let pairs = buffers[0][..count].chunks(size).zip(buffers[1][..count].chunks(size));
        for (old, new) in pairs {
            if old != new {
                match runs.last_mut() {
                    Some((start, count)) if *start + *count == block => *count += 1,
                    _ => runs.push((block, 1)),
                }
            }
            block += 1;
        }
    }
}

/// Stores these blocks of the image as a point.
async fn keep(made: &mut Made, image: &Path, runs: &[Blocks]) -> Result<()> {
    let image = File::open(image)?;
    let (mut encoder, hash) = (ChunkEncoder::new(1)?, made.writer.hash_key());
    let mut content = Vec::new();
    made.writer.begin(DeltaId::new()).await?;
    for extents in packed(runs) {
        content.clear();
        for extent in &extents {
            let begin = content.len();
            content.resize(begin + extent.count as usize * BLOCK as usize, 0);
            image.read_exact_at(&mut content[begin..], extent.start.byte_offset())?;
        }
        let mut chunk = Vec::new();
        encoder.encode(made.disk, &extents, &content, &hash, &mut chunk)?;
        made.writer.push(chunk.into()).await?;
    }
    made.writer.commit(made.kind()).await?;
    Ok(())
}
