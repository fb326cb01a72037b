//! Reading a point: all of it, and single blocks; against plain files with the same bytes.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_delta::{BlockRange, ChunkView, CommitId};
use highwater_tests::{Random, command};
use highwater_vault::policy::Policy;
use highwater_vault::recover::{Options, Target, recover_disk};
use highwater_vault::{BlockMap, Store, Vault};

use super::counted::{Counting, Counts};
use super::made::{Made, packed};
use super::{BLOCK, HOUR_MS, MIB, files, rate, runtime};
use crate::Choice;
use crate::results::{Results, Series};

/// As recovery reads.
const WINDOW_BLOCKS: u64 = 2048;
const POINTS: u64 = 200;
const MINUTES_5_MS: u64 = HOUR_MS / 12;

/// The same point as plain files.
struct Plain {
    raw: File,
    /// Chunks one after the other, each behind its length.
    chunks: std::path::PathBuf,
    zst: std::path::PathBuf,
}

/// Part of `bench vault`.
pub fn read(choice: &Choice, results: &mut Results) -> Result<()> {
    let (runtime, dir) = (runtime()?, files::on_disk()?);
    let vault_dir = dir.path().join("vault");
    let disk_bytes = choice.sized(1024 * MIB, 32 * MIB);
    let (made, point) = runtime.block_on(history(&vault_dir, disk_bytes))?;
    let plain = plain(&runtime, &made, point, dir.path())?;
    let [mut chunks, mut whole, mut tools, mut restored] = <[Series; 4]>::default();
    let [mut pread, mut cold, mut pread_warm, mut warm] = <[Series; 4]>::default();
    let reads = choice.sized(2000, 100);
    for round in 0..choice.rounds() {
        eprintln!("round {}", round + 1);
        files::forget(dir.path())?;
        chunks.push(rate(disk_bytes, decompress(&plain.chunks)?));
        whole.push(rate(disk_bytes, runtime.block_on(sequential(&made, point))?));

        files::forget(dir.path())?;
        let restored_by_tools = dir.path().join("by-tools");
        let script = "zstd -q -d -c \"$0\" | dd of=\"$1\" bs=1M iflag=fullblock conv=fsync status=none";
        let began = Instant::now();
        let (from, to) = (plain.zst.to_string_lossy(), restored_by_tools.to_string_lossy());
        command::run("bash", &["-o", "pipefail", "-c", script, &from, &to])?;
        tools.push(rate(disk_bytes, began.elapsed().as_secs_f64()));
        fs::remove_file(&restored_by_tools)?;
        let target = dir.path().join("restored");
        restored.push(rate(disk_bytes, runtime.block_on(restore(&made, point, &target))?));
        fs::remove_file(&target)?;

        files::forget(dir.path())?;
        let seed = u64::from(round) + 7;
        pread.push(raw_reads(&plain.raw, made.disk_blocks(), reads, seed)?);
        cold.push(runtime.block_on(block_reads(&made, point, reads, seed))?);
        pread_warm.push(raw_reads(&plain.raw, made.disk_blocks(), reads, seed)?);
        warm.push(runtime.block_on(block_reads(&made, point, reads, seed))?);
    }
    results.row("chunks read from a file and decompressed, one thread", &chunks, "MB/s of disk", "");
    results.row("a point read from its beginning to its end", &whole, "MB/s of disk", "");
    results.row("  of read and decompressed", &whole.ratio(&chunks), "", "");
    results.row("zstd -d | dd fsync", &tools, "MB/s of disk", "");
    results.row("a point recovered to a file", &restored, "MB/s of disk", "");
    results.row("  of zstd -d | dd fsync", &restored.ratio(&tools), "", ">= 0.8");
    results.row("random 4 KiB of a raw file, from the disk", &pread, "IOPS", "");
    results.row("random 4 KiB of a point, from the disk", &cold, "IOPS", "");
    results.row("  of the raw file", &cold.ratio(&pread), "", "");
    results.row("random 4 KiB of a raw file, in the kernel's memory", &pread_warm, "IOPS", "");
    results.row("random 4 KiB of a point, in the kernel's memory", &warm, "IOPS", "");
    results.row("  of the raw file", &warm.ratio(&pread_warm), "", "");
    runtime.block_on(requests(&made, &vault_dir, point, reads, results))?;
    results.note(format!(
        "read: the newest of {POINTS} points of a disk of {} MiB, made every 5 minutes with 4 MiB of changes each, after the\n\
         maintenance of that time. One read at a time. \"From the disk\": the kernel was told to forget all files before.",
        disk_bytes / MIB
    ));
    Ok(())
}

async fn history(dir: &Path, disk_bytes: u64) -> Result<(Made, CommitId)> {
    let store = Store::open(&dir.to_string_lossy().parse()?)?;
    let mut made = Made::new(store, disk_bytes, BLOCK as usize / 2).await?;
    let mut point = made.point(&[(0, made.disk_blocks())]).await?;
    for n in 1..=POINTS {
        made.pass_ms(MINUTES_5_MS);
        let runs = made.places((4 * MIB / BLOCK).min(made.disk_blocks() / 8), 64, true);
        point = made.point(&runs).await?;
        if n % 12 == 0 {
            made.maintain(&Policy::default()).await?;
        }
    }
    Ok((made, point))
}

fn plain(runtime: &tokio::runtime::Runtime, made: &Made, point: CommitId, dir: &Path) -> Result<Plain> {
    let (path, chunks, zst) = (dir.join("raw"), dir.join("chunks"), dir.join("zst"));
    runtime.block_on(restore(made, point, &path))?;
    command::run("zstd", &["-q", "-1", "-T1", "-o", &zst.to_string_lossy(), &path.to_string_lossy()])?;
    let raw = File::open(&path)?;
    let mut encoder = highwater_delta::ChunkEncoder::new(1)?;
    let (mut content, mut encoded, hash) = (Vec::new(), Vec::new(), made.writer.hash_key());
    for extents in packed(&[(0, made.disk_blocks())]) {
        let (first, count) = (extents[0].start.0, extents[0].count);
        content.resize(count as usize * BLOCK as usize, 0);
        raw.read_exact_at(&mut content, first * BLOCK)?;
        let mut chunk = Vec::new();
        encoder.encode(made.disk, &extents, &content, &hash, &mut chunk)?;
        encoded.push((chunk.len() as u32).to_le_bytes().to_vec());
        encoded.push(chunk);
    }
    files::write_and_sync(&chunks, encoded.iter().map(|part| &part[..]))?;
    Ok(Plain { raw, chunks, zst })
}

/// Reads chunks from a file and decompresses them; seconds.
fn decompress(path: &Path) -> Result<f64> {
    let began = Instant::now();
    let mut file = std::io::BufReader::with_capacity(1 << 20, File::open(path)?);
    let (mut chunk, mut raw) = (Vec::new(), Vec::new());
    loop {
        let mut length = [0; 4];
        if file.read(&mut length[..1])? == 0 {
            return Ok(began.elapsed().as_secs_f64());
        }
        file.read_exact(&mut length[1..])?;
        chunk.resize(u32::from_le_bytes(length) as usize, 0);
        file.read_exact(&mut chunk)?;
        ChunkView::parse(&chunk)?.decompress_into(&mut raw)?;
    }
}

/// Reads all of a point in order, into memory; seconds.
async fn sequential(made: &Made, point: CommitId) -> Result<f64> {
    let map = made.vault.block_map(made.machine, made.disk, point).await?;
    let mut content = vec![0; (WINDOW_BLOCKS * BLOCK) as usize];
    let began = Instant::now();
    for start in (0..map.blocks()).step_by(WINDOW_BLOCKS as usize) {
        let range = BlockRange::new(start, WINDOW_BLOCKS.min(map.blocks() - start));
        map.read(range, &mut content[..range.bytes() as usize]).await?;
    }
    Ok(began.elapsed().as_secs_f64())
}

async fn restore(made: &Made, point: CommitId, to: &Path) -> Result<f64> {
    let state = made.vault.machine(made.machine).await?;
    let target = Target::File(to.to_owned());
    let began = Instant::now();
    let options = Options::default();
    recover_disk(&made.vault, &state, made.disk, point, &target, options, Arc::new(())).await?;
    Ok(began.elapsed().as_secs_f64())
}

/// Reads single blocks of a raw file; how many a second.
fn raw_reads(raw: &File, blocks: u64, reads: u64, seed: u64) -> Result<f64> {
    let mut random = Random::new(seed);
    let mut block = [0; BLOCK as usize];
    let began = Instant::now();
    for _ in 0..reads {
        raw.read_exact_at(&mut block, random.below(blocks) * BLOCK)?;
    }
    Ok(reads as f64 / began.elapsed().as_secs_f64())
}

/// Reads single blocks of a point, the same ones; how many a second, without what it takes to open it.
async fn block_reads(made: &Made, point: CommitId, reads: u64, seed: u64) -> Result<f64> {
    // With a cache of its own, empty.
    let vault = made.vault.clone().with_page_cache(64 << 20);
    let map = vault.block_map(made.machine, made.disk, point).await?;
    let began = Instant::now();
    blocks(&map, reads, seed).await?;
    Ok(reads as f64 / began.elapsed().as_secs_f64())
}

/// Reads single blocks.
pub async fn blocks(map: &BlockMap, reads: u64, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let mut block = [0; BLOCK as usize];
    for _ in 0..reads {
        map.read(BlockRange::new(random.below(map.blocks()), 1), &mut block).await?;
    }
    Ok(())
}

/// What a bucket would be asked for.
async fn requests(made: &Made, dir: &Path, point: CommitId, reads: u64, results: &mut Results) -> Result<()> {
    let counts = Arc::new(Counts::default());
    let store = Store::open(&dir.to_string_lossy().parse()?)?;
    let store = store.layered(|inner| Counting::new(inner, &counts, Duration::ZERO));
    let vault = Vault::open(store, &made.key).await?;
    let state = vault.machine(made.machine).await?;
    let opened = counts.take();
    let map = vault.block_map_of(&state, made.disk, point).await?;
    ensure!(map.blocks() == made.disk_blocks(), "another disk");
    counts.take();
    blocks(&map, 1, 1).await?;
    let first = counts.take();
    blocks(&map, reads, 2).await?;
    counts.take();
    // Now the index is in the vault's cache, as far as it fits.
    blocks(&map, reads, 3).await?;
    let later = counts.take();
    let per = |count: u64| Series::from(count as f64 / reads as f64);
    results.row("requests to open the vault and the machine", &(opened.requests() as f64).into(), "", "");
    results.row("objects looked through (runs and shortcuts)", &(state.depth() as f64).into(), "", "");
    results.row("requests of the first random read", &(first.requests() as f64).into(), "", "");
    results.row("requests of a random read, index in memory", &per(later.requests()), "", "");
    results.row("bytes fetched by a random read, index in memory", &per(later.read_bytes), "bytes", "");
    Ok(())
}
