//! Merging what lies between points that have expired, against copying as many bytes.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_vault::Store;
use highwater_vault::policy::Policy;

use super::counted::{Counting, Counts};
use super::made::{Made, maintain_on};
use super::{BLOCK, DAY_MS, HOUR_MS, MIB, files, mib, rate, runtime};
use crate::Choice;
use crate::results::{Results, Series};

/// A history to merge.
struct Case {
    name: &'static str,
    deltas: u64,
    delta_bytes: u64,
}

/// Part of `bench vault`.
pub fn merge(choice: &Choice, results: &mut Results) -> Result<()> {
    let large = choice.sized(16 * MIB, 12 * MIB);
    let cases = [
        Case { name: "large deltas: maps only", deltas: choice.sized(48, 4), delta_bytes: large },
        Case { name: "small deltas: content too", deltas: choice.sized(600, 20), delta_bytes: MIB },
    ];
    for case in &cases {
        measure(choice, case, results)?;
    }
    results.note(
        "merge: all points of a day but the last expire at once, and what they brought becomes one run. Large deltas leave content where it\n\
         is; small ones (below 4 MiB) are put together anew. \"Moved\" is what is read and written in all, counted at the store; copied are as\n\
         many bytes with cp and fsync, from the disk.",
    );
    Ok(())
}

fn measure(choice: &Choice, case: &Case, results: &mut Results) -> Result<()> {
    let runtime = runtime()?;
    let [mut ours, mut copied, mut moved, mut covered] = <[Series; 4]>::default();
    for round in 0..choice.rounds().min(3) {
        eprintln!("round {}", round + 1);
        let dir = files::on_disk()?;
        let vault = dir.path().join("vault");
        let made = runtime.block_on(history(&vault, case))?;
        files::forget(&vault)?;
        let counts = Arc::new(Counts::default());
        let (seconds, content) = runtime.block_on(merged(&made, &vault, &counts))?;
        let counted = counts.take();
        let bytes = counted.read_bytes + counted.written_bytes;
        ours.push(rate(bytes, seconds));
        moved.push(mib(bytes));
        covered.push(rate(content, seconds));

        let plain = dir.path().join("plain");
        let part = vec![7; MIB as usize];
        let parts = (bytes / 2).div_ceil(MIB) as usize;
        files::write_and_sync(&plain, std::iter::repeat_n(&part[..], parts))?;
        files::forget(&plain)?;
        let seconds = files::copy_and_sync(&plain, &dir.path().join("copy"))?;
        copied.push(rate(2 * parts as u64 * MIB, seconds));
        fs::remove_file(&plain)?;
    }
    results.row(&format!("{}: moved", case.name), &moved, "MiB", "");
    results.row("  moved a second", &ours, "MB/s read and written", "");
    results.row("  as many bytes copied", &copied, "MB/s read and written", "");
    results.row("  of copied", &ours.ratio(&copied), "", "");
    results.row("  content merged a second", &covered, "MB/s stored", "");
    Ok(())
}

async fn history(dir: &Path, case: &Case) -> Result<Made> {
    let store = Store::open(&dir.to_string_lossy().parse()?)?;
    let mut made = Made::new(store, 8 * 1024 * MIB, BLOCK as usize / 2).await?;
    for _ in 0..case.deltas {
        made.pass_ms(DAY_MS / (case.deltas + 1));
        let runs = made.places(case.delta_bytes / BLOCK, 16, false);
        made.point(&runs).await?;
    }
    Ok(made)
}

/// Seconds, and bytes of what was merged.
async fn merged(made: &Made, dir: &Path, counts: &Arc<Counts>) -> Result<(f64, u64)> {
    let before = made.vault.machine(made.machine).await?;
    let content = before.segments().map(|segment| segment.bytes).sum();
    let store = Store::open(&dir.to_string_lossy().parse()?)?;
    let store = store.layered(|inner| Counting::new(inner, counts, Duration::ZERO));
    let vault = made.vault_on(store).await?;
    let policy =
        Policy { keep_all: Duration::from_millis(HOUR_MS / 60), tiers: Vec::new(), ..Policy::default() };
    let began = Instant::now();
    let report = maintain_on(&vault, made.machine, &policy, made.now_ms()).await?;
    let seconds = began.elapsed().as_secs_f64();
    let runs = vault.machine(made.machine).await?.runs.len();
    // A short one at the end may wait for more.
    ensure!(runs <= 2, "not all was merged, there are {runs} runs: {report:?}");
    Ok((seconds, content))
}
