//! Storing deltas, against writing the same bytes plainly to the same place. The chunks are made before the clock runs.

use std::fs;
use std::time::Instant;

use anyhow::Result;
use bytes::Bytes;
use highwater_delta::DeltaId;
use highwater_tests::S3Server;
use highwater_vault::Store;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use super::made::{Chunks, Made, packed};
use super::{BLOCK, MIB, files, rate, runtime};
use crate::Choice;
use crate::results::{Results, Series};

/// As large as segments are.
const OBJECT_BYTES: usize = 64 << 20;
/// As the vault's into a bucket.
const PART_BYTES: usize = 5 << 20;

/// Part of `bench vault`.
pub fn ingest(choice: &Choice, results: &mut Results) -> Result<()> {
    let disk_bytes = choice.sized(512 * MIB, 8 * MIB);
    let runtime = runtime()?;
    let dir = files::on_disk()?;

    let mut made = runtime.block_on(Made::new(
        Store::open(&dir.path().join("vault").to_string_lossy().parse()?)?,
        disk_bytes,
        BLOCK as usize / 2,
    ))?;
    let began = Instant::now();
    let chunks = chunks(&made)?;
    let encoding = rate(disk_bytes, began.elapsed().as_secs_f64());
    let bytes: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
    let [mut plain, mut ours] = <[Series; 2]>::default();
    let file = dir.path().join("plain");
    for round in 0..choice.rounds() {
        eprintln!("round {}", round + 1);
        let seconds = files::write_and_sync(&file, chunks.iter().map(|chunk| &chunk[..]))?;
        plain.push(rate(bytes, seconds));
        fs::remove_file(&file)?;
        ours.push(rate(bytes, runtime.block_on(store(&mut made, &chunks))?));
    }
    results.row("chunks written to a file and synced", &plain, "MB/s of chunks", "");
    results.row("chunks stored in a directory, to the commit", &ours, "MB/s of chunks", "");
    results.row("  of written and synced", &ours.ratio(&plain), "", ">= 0.7");
    results.row("(making the chunks, one thread; not part of it)", &encoding.into(), "MB/s of disk", "");
    drop(made);
    bucket(choice, disk_bytes, results)
}

fn bucket(choice: &Choice, disk_bytes: u64, results: &mut Results) -> Result<()> {
    let (runtime, dir) = (runtime()?, files::on_disk()?);
    fs::create_dir(dir.path().join("bench"))?;
    let server = S3Server::start(dir.path())?;
    let place =
        |prefix: &str| format!("s3://bench/{prefix}?region=us-east-1&endpoint=http://{}", server.address());
    let raw = Store::open(&place("raw").parse()?)?.objects().clone();
    let store_of_vault = Store::open(&place("vault").parse()?)?;
    let mut made = runtime.block_on(Made::new(store_of_vault, disk_bytes, BLOCK as usize / 2))?;
    let chunks = chunks(&made)?;
    let whole = Bytes::from(chunks.concat());
    let bytes = whole.len() as u64;
    let [mut one, mut four, mut ours] = <[Series; 3]>::default();
    for round in 0..choice.rounds() {
        eprintln!("round {}", round + 1);
        one.push(rate(bytes, runtime.block_on(upload(&*raw, &whole, 1))?));
        four.push(rate(bytes, runtime.block_on(upload(&*raw, &whole, 4))?));
        ours.push(rate(bytes, runtime.block_on(store(&mut made, &chunks))?));
    }
    results.row("raw upload to an S3 server, one part at a time", &one, "MB/s", "");
    results.row("raw upload to an S3 server, four at a time", &four, "MB/s", "");
    results.row("chunks stored there, to the commit", &ours, "MB/s of chunks", "");
    results.row("  of the raw upload, one part at a time", &ours.ratio(&one), "", "");
    results.row("  of the raw upload, four at a time", &ours.ratio(&four), "", "");
    results.note(
        "ingest: chunks of half noise, half text, made before the clock runs: compression and hashes are the agent's and not\n\
         counted; the vault checks, encrypts, indexes and stores. The S3 server runs in this process, on one thread, syncs nothing, and takes\n\
         most of the time of both.",
    );
    Ok(())
}

fn chunks(made: &Made) -> Result<Vec<Bytes>> {
    let mut chunks = Chunks::new(made.disk, made.writer.hash_key(), BLOCK as usize / 2)?;
    packed(&[(0, made.disk_blocks())]).map(|extents| Ok(chunks.of(&extents)?.into())).collect()
}

/// One delta, to its commit; seconds.
async fn store(made: &mut Made, chunks: &[Bytes]) -> Result<f64> {
    let began = Instant::now();
    made.writer.begin(DeltaId::new()).await?;
    for chunk in chunks {
        made.writer.push(chunk.clone()).await?;
    }
    made.writer.commit(made.kind()).await?;
    Ok(began.elapsed().as_secs_f64())
}

/// The same bytes as plain objects; seconds.
async fn upload(store: &dyn ObjectStore, whole: &Bytes, at_once: usize) -> Result<f64> {
    let began = Instant::now();
    for begin in (0..whole.len()).step_by(OBJECT_BYTES) {
        let object = whole.slice(begin..whole.len().min(begin + OBJECT_BYTES));
        let mut upload = store.put_multipart(&Path::from(format!("{begin}"))).await?;
        let parts: Vec<_> = (0..object.len())
            .step_by(PART_BYTES)
            .map(|at| upload.put_part(object.slice(at..object.len().min(at + PART_BYTES)).into()))
            .collect();
        use futures::{StreamExt, TryStreamExt, stream};
        stream::iter(parts).buffer_unordered(at_once).try_collect::<Vec<()>>().await?;
        upload.complete().await?;
    }
    Ok(began.elapsed().as_secs_f64())
}
