//! What a month of points costs beside their content: bytes that maintenance writes, bytes that lie there, requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use highwater_vault::maintain::depth_max;
use highwater_vault::policy::Policy;
use highwater_vault::{Content, MachineState, Store};

use super::counted::{Counting, Counts};
use super::made::{Made, maintain_on};
use super::{BLOCK, GIB, HOUR_MS, MIB, files, mib, runtime};
use crate::Choice;
use crate::results::Results;

/// Of the disk, in an hour.
const CHURN: u64 = 100;
const POINTS_AN_HOUR: u64 = 12;

/// How the changes lie.
struct Case {
    name: &'static str,
    disk_bytes: u64,
    longest: u64,
    hot: bool,
}

/// Part of `bench vault`.
pub fn amplification(choice: &Choice, results: &mut Results) -> Result<()> {
    let days = choice.sized(30, 1);
    let cases = [
        Case { name: "usual", disk_bytes: choice.sized(GIB, 256 * MIB), longest: 32, hot: true },
        Case { name: "scattered", disk_bytes: choice.sized(256 * MIB, 256 * MIB), longest: 1, hot: false },
    ];
    for case in &cases {
        measure(case, days, results)?;
    }
    results.note(format!(
        "amplification: {days} days of points every 5 minutes; in each hour 1 % of the disk is written; default policy, maintained every\n\
         hour. Usual: a disk of {} MiB, runs of 1 to 32 blocks, four of five in the same tenth of the disk. Scattered: a disk of {} MiB,\n\
         single blocks all over it. Real disks are larger, and so are their deltas: segments below 4 MiB are put together\n\
         anew, which larger ones spare. Live: content that a point still needs, by blocks.",
        cases[0].disk_bytes / MIB,
        cases[1].disk_bytes / MIB,
    ));
    Ok(())
}

fn measure(case: &Case, days: u64, results: &mut Results) -> Result<()> {
    let (runtime, dir) = (runtime()?, files::in_memory()?);
    let began = Instant::now();
    let path = dir.path().join("vault");
    let open = |counts: &Arc<Counts>| -> Result<Store> {
        let store = Store::open(&path.to_string_lossy().parse()?)?;
        Ok(store.layered(|inner| Counting::new(inner, counts, Duration::ZERO)))
    };
    let [by_writer, by_maintainer] = <[Arc<Counts>; 2]>::default();
    runtime.block_on(async {
        let mut made = Made::new(open(&by_writer)?, case.disk_bytes, BLOCK as usize / 2).await?;
        let maintained = made.vault_on(open(&by_maintainer)?).await?;
        let policy = Policy::default();
        made.point(&[(0, made.disk_blocks())]).await?;
        let first_bytes = made.chunk_bytes();
        let mut points = 0_u64;
        by_writer.take();
        by_maintainer.take();
        for _ in 0..days * 24 {
            for _ in 0..POINTS_AN_HOUR {
                made.pass_ms(HOUR_MS / POINTS_AN_HOUR);
                let runs = made.places(made.disk_blocks() / CHURN / POINTS_AN_HOUR, case.longest, case.hot);
                made.point(&runs).await?;
                points += 1;
            }
            maintain_on(&maintained, made.machine, &policy, made.now_ms()).await?;
        }
        let (writer, maintainer) = (by_writer.take(), by_maintainer.take());
        let state = made.vault.machine(made.machine).await?;
        let ingested = made.chunk_bytes() - first_bytes;
        let per_point = |count: u64| count as f64 / points as f64;
        let row = |results: &mut Results, what: &str, value: f64, unit: &str| {
            results.row(&format!("{}: {what}", case.name), &value.into(), unit, "");
        };
        row(results, "points made", points as f64, "");
        row(results, "points kept", state.points.len() as f64, "");
        row(results, "chunks ingested", mib(ingested), "MiB");
        row(results, "written for them", mib(writer.written_bytes), "MiB");
        row(results, "written by maintenance", mib(maintainer.written_bytes), "MiB");
        row(results, "  of it maps (the rest is content)", mib(maintainer.map_bytes), "MiB");
        row(results, "read by maintenance", mib(maintainer.read_bytes), "MiB");
        let all = (writer.written_bytes + maintainer.written_bytes) as f64;
        row(results, "write amplification (all written, of chunks)", all / ingested as f64, "");
        let live = live_bytes(&state);
        let (files, stored) = files::contents(&path)?;
        row(results, "live content", mib(live), "MiB");
        let trash: u64 = state.trash.iter().map(|trashed| trashed.bytes).sum();
        row(results, "stored in all", mib(stored), "MiB");
        row(results, "  of it trash (6 hours of grace)", mib(trash), "MiB");
        let machine = path.join("machines").join(made.machine.to_string());
        for kind in ["manifest", "checkpoint", "maps"] {
            let (count, bytes) = files::contents(&machine.join(kind))?;
            row(results, &format!("  of it {kind}, {count} objects"), mib(bytes), "MiB");
        }
        row(results, "space amplification (stored, of live)", stored as f64 / live as f64, "");
        row(results, "objects stored", files as f64, "");
        row(results, "objects looked through, newest point", state.depth() as f64, "");
        row(results, "objects looked through, most of any point", depth_max(&state) as f64, "");
        row(results, "puts of the writer, each point", per_point(writer.puts), "");
        row(results, "other requests of the writer, each point", per_point(writer.gets + writer.lists), "");
        row(results, "puts of maintenance, each point", per_point(maintainer.puts), "");
        row(
            results,
            "other requests of maintenance, each point",
            per_point(maintainer.gets + maintainer.lists),
            "",
        );
        eprintln!("  in {:.0} s", began.elapsed().as_secs_f64());
        Ok(())
    })
}

/// Content that points need, a block being as large as the others of its run.
fn live_bytes(state: &MachineState) -> u64 {
    let of_run = |content: &Content| match content {
        Content::Segments(segments) => segments.iter().map(|segment| segment.bytes).sum(),
        Content::Maps { held, .. } => {
            (u128::from(held.bytes) * u128::from(held.live_blocks) / u128::from(held.blocks.max(1))) as u64
        }
    };
    state.runs.iter().map(|run| of_run(&run.content)).sum()
}
