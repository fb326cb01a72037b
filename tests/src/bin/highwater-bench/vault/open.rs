//! From nothing but the key and the location to the first byte of a point: of a sparse disk of 1 TiB with years of points.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use highwater_delta::{BlockRange, CommitId, DiskId, MachineId};
use highwater_tests::{Random, S3Server};
use highwater_vault::policy::{Policy, Tier};
use highwater_vault::{Store, Vault, VaultKey};

use super::counted::{Counting, Counts};
use super::made::Made;
use super::{BLOCK, DAY_MS, GIB, HOUR_MS, TIB, files, runtime};
use crate::Choice;
use crate::results::{Results, Series};

/// A request's way to a bucket that is not near, and back.
const FAR: Duration = Duration::from_millis(30);
const YEARS: u64 = 3;
/// Points are made so often, until the last day.
const EVERY_MS: u64 = 4 * HOUR_MS;
const DELTA_BLOCKS: u64 = 512;
const OPENED: u64 = 20;
/// The first copy: so many runs of so many blocks, evenly.
const FIRST_RUNS: u64 = 16_384;
const FIRST_BLOCKS: u64 = 32;

/// Default, then daily for a quarter, weekly for a year, monthly for ten.
pub fn long_policy() -> Policy {
    let tier = |days, keep_days: u64| Tier {
        every: Duration::from_millis(days * DAY_MS),
        keep_for: Duration::from_millis(keep_days * DAY_MS),
    };
    let mut policy = Policy::default();
    policy.tiers.extend([tier(1, 90), tier(7, 365), tier(30, 3650)]);
    policy
}

struct Opened {
    key: VaultKey,
    machine: MachineId,
    disk: DiskId,
    points: Vec<CommitId>,
}

/// Part of `bench vault`.
pub fn open(choice: &Choice, results: &mut Results) -> Result<()> {
    let (runtime, root) = (runtime()?, files::in_memory()?);
    let bucket = root.path().join("bench");
    fs::create_dir(&bucket)?;
    let dir = bucket.join("vault");
    let days = choice.sized(YEARS * 365, 20);
    let began = Instant::now();
    let made = runtime.block_on(history(&dir, days))?;
    let state = runtime.block_on(made.vault.machine(made.machine))?;
    eprintln!("  made in {:.0} s", began.elapsed().as_secs_f64());
    let points: Vec<CommitId> = state.points.iter().map(|point| point.id).collect();
    results.row("points kept", &(points.len() as f64).into(), "", "");
    results.row("records of the machine", &(state.last_record as f64).into(), "", "");
    let (checkpoints, checkpoint_bytes) = files::contents(&machine_dir(&dir, &made).join("checkpoint"))?;
    results.row("checkpoints", &(checkpoints as f64).into(), "", "");
    results.row("  their bytes", &super::mib(checkpoint_bytes).into(), "MiB", "");
    let depth = highwater_vault::maintain::depth_max(&state);
    results.row("objects that a reader of any point begins with, most", &(depth as f64).into(), "", "");
    let opened = Opened { key: made.key.clone(), machine: made.machine, disk: made.disk, points };
    drop(made);

    let server = S3Server::start(root.path())?;
    let s3 = format!("s3://bench/vault?region=us-east-1&endpoint=http://{}", server.address());
    let local = dir.to_string_lossy().into_owned();
    let places = [
        ("in a directory", &local, Duration::ZERO),
        ("on an S3 server", &s3, Duration::ZERO),
        ("on an S3 server 30 ms away", &s3, FAR),
    ];
    for (what, location, delay) in places {
        let (mut seconds, mut requests, mut bytes) = <(Series, Series, Series)>::default();
        let mut random = Random::new(3);
        for n in 0..OPENED {
            // The newest, the oldest, and any.
            let last = opened.points.len() as u64 - 1;
            let index = [last, 0].get(n as usize).copied().unwrap_or_else(|| random.below(last + 1));
            let (block, point) = (random.below(TIB / BLOCK), opened.points[index as usize]);
            let counts = Arc::new(Counts::default());
            let began = Instant::now();
            let first = first_byte(&opened, location, point, block, &counts, delay);
            runtime.block_on(first)?;
            seconds.push(began.elapsed().as_secs_f64());
            let counted = counts.take();
            requests.push(counted.requests() as f64);
            bytes.push(counted.read_bytes as f64 / 1024.0);
        }
        results.row(&format!("key to the first byte of any point, {what}"), &seconds, "s", "<= 1 s");
        results.row("  requests", &requests, "", "");
        results.row("  read", &bytes, "KiB", "");
    }
    results.note(format!(
        "open: a disk of 1 TiB, of which {} GiB were ever written, all over it; {days} days of points every 4 hours, the last day every\n\
         5 minutes, kept by the default policy, then daily for 90 days, weekly for a year, monthly for ten; maintained every day.\n\
         The vault lies on a tmpfs, the S3 server is of this process. The key is a file; a passphrase takes a second more on purpose.",
        (FIRST_RUNS * FIRST_BLOCKS + days * 6 * DELTA_BLOCKS) * BLOCK / GIB,
    ));
    Ok(())
}

fn machine_dir(vault: &std::path::Path, made: &Made) -> std::path::PathBuf {
    vault.join("machines").join(made.machine.to_string())
}

async fn first_byte(
    opened: &Opened,
    location: &str,
    point: CommitId,
    block: u64,
    counts: &Arc<Counts>,
    delay: Duration,
) -> Result<()> {
    let store = Store::open(&location.parse()?)?;
    let store = store.layered(|inner| Counting::new(inner, counts, delay));
    let vault = Vault::open(store, &opened.key).await?;
    let state = vault.machine(opened.machine).await?;
    state.point(point)?;
    let map = vault.block_map_of(&state, opened.disk, point).await?;
    map.read(BlockRange::new(block, 1), &mut [0; BLOCK as usize]).await?;
    Ok(())
}

async fn history(dir: &std::path::Path, days: u64) -> Result<Made> {
    let store = Store::open(&dir.to_string_lossy().parse()?)?;
    // Almost all text: it is the number of objects and of blocks that counts here.
    let mut made = Made::new(store, TIB, 16).await?;
    let apart = made.disk_blocks() / FIRST_RUNS;
    let first: Vec<_> = (0..FIRST_RUNS).map(|n| (n * apart, FIRST_BLOCKS)).collect();
    made.point(&first).await?;
    let policy = long_policy();
    for _ in 0..days {
        for _ in 0..DAY_MS / EVERY_MS {
            made.pass_ms(EVERY_MS);
            let runs = made.places(DELTA_BLOCKS, 16, false);
            made.point(&runs).await?;
        }
        made.maintain(&policy).await?;
    }
    for n in 1..=24 * 12 {
        made.pass_ms(HOUR_MS / 12);
        let runs = made.places(DELTA_BLOCKS, 16, false);
        made.point(&runs).await?;
        if n % 12 == 0 {
            made.maintain(&policy).await?;
        }
    }
    Ok(made)
}
