//! Memory: each step in a process of its own, which tells the most that it had resident.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use highwater_delta::{BlockRange, DeltaId, DiskId, MachineId};
use highwater_tests::{Random, daemon};
use highwater_vault::policy::Policy;
use highwater_vault::{DiskRecord, Store, Vault, VaultKey};
use serde_json::{Value, json};
use std::path::Path;

use super::made::Made;
use super::{BLOCK, GIB, HOUR_MS, TIB, files, mib, runtime};
use crate::Choice;
use crate::results::Results;

const READS: u64 = 2000;
const COMMITS: u64 = 20;

/// Part of `bench vault`.
pub fn memory(choice: &Choice, results: &mut Results) -> Result<()> {
    large_disk(choice, results)?;
    many_points(choice, results)?;
    many_machines(choice, results)
}

fn large_disk(choice: &Choice, results: &mut Results) -> Result<()> {
    let (runtime, dir) = (runtime()?, files::in_memory()?);
    // Where the first copy writes, evenly.
    let (places, points) = (choice.sized(65_536, 1024), choice.sized(400, 14));
    let made = runtime.block_on(async {
        let mut made = Made::new(store(dir.path())?, 64 * TIB, 16).await?;
        let apart = made.disk_blocks() / places;
        made.point(&(0..places).map(|n| (n * apart, 32)).collect::<Vec<_>>()).await?;
        for n in 1..=points {
            made.pass_ms(HOUR_MS / 12);
            let runs = made.places(8192, 4, false);
            made.point(&runs).await?;
            if n % 12 == 0 {
                made.maintain(&Policy::default()).await?;
            }
        }
        anyhow::Ok(made)
    })?;
    made.key.save(&dir.path().join("key"))?;
    let state = runtime.block_on(made.vault.machine(made.machine))?;
    let blocks = places * 32 + points * 8192;
    let (maps, map_bytes) = files::contents(&made_dir(dir.path(), made.machine).join("maps"))?;
    results.row("64 TiB disk: blocks written", &(blocks as f64 / 1e6).into(), "million", "");
    results.row(&format!("  maps, {maps} objects"), &mib(map_bytes).into(), "MiB", "");
    results.row("  objects looked through", &(state.depth() as f64).into(), "", "");
    let told = child("read", dir.path(), made.machine, places)?;
    results.row("  opened", &number(&told, "open_s")?.into(), "s", "");
    results.row("  first random read", &number(&told, "first_s")?.into(), "s", "");
    results.row("  then random reads", &number(&told, "per_s")?.into(), "IOPS", "");
    results.row("  memory of all that, most (VmHWM)", &number(&told, "hwm_mib")?.into(), "MiB", "");
    Ok(())
}

fn many_points(choice: &Choice, results: &mut Results) -> Result<()> {
    let (runtime, dir) = (runtime()?, files::in_memory()?);
    let points = choice.sized(100_000, 500);
    let began = Instant::now();
    let made = runtime.block_on(async {
        let mut made = Made::new(store(dir.path())?, 64 * GIB, 16).await?;
        for _ in 0..points {
            made.pass_ms(HOUR_MS / 12);
            let runs = made.places(4, 4, false);
            made.point(&runs).await?;
        }
        anyhow::Ok(made)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    made.key.save(&dir.path().join("key"))?;
    let state = made.writer.state();
    let name = format!("{points} points");
    results.row(&format!("{name}: commits made"), &(points as f64 / seconds).into(), "a second", "");
    results.row("  state in memory, by its own reckoning", &mib(state.memory_bytes()).into(), "MiB", "");
    let (checkpoints, bytes) = files::contents(&made_dir(dir.path(), made.machine).join("checkpoint"))?;
    results.row(&format!("  {checkpoints} checkpoints"), &mib(bytes).into(), "MiB", "");
    let machine = made.machine;
    drop(made);
    let told = child("load", dir.path(), machine, 0)?;
    results.row("  opened", &number(&told, "open_s")?.into(), "s", "");
    results.row("  memory of that, most (VmHWM)", &number(&told, "hwm_mib")?.into(), "MiB", "");
    let told = child("commit", dir.path(), machine, 0)?;
    results.row("  opened to be written to", &number(&told, "open_s")?.into(), "s", "");
    results.row("  each commit", &(number(&told, "commit_s")? * 1e3).into(), "ms", "");
    results.row("  memory of all that, most (VmHWM)", &number(&told, "hwm_mib")?.into(), "MiB", "");
    let listed = highwater(dir.path(), &["points", &machine.to_string()])?;
    results.row("  highwater points", &listed.seconds.into(), "s", "");
    results.row("  its memory, most (VmHWM)", &listed.hwm_mib.into(), "MiB", "");
    Ok(())
}

fn many_machines(choice: &Choice, results: &mut Results) -> Result<()> {
    let (runtime, dir) = (runtime()?, files::in_memory()?);
    let machines = choice.sized(1000, 10);
    let key = runtime.block_on(async {
        let made = Made::new(store(dir.path())?, GIB, 16).await?;
        for _ in 1..machines {
            let machine = MachineId::new();
            made.vault.register_machine(machine, "bench").await?;
            let mut writer = made.vault.writer(machine).await?;
            // The same disk for all: nothing of it is stored.
            writer.set_disks(vec![DiskRecord { disk: made.disk, name: "sda".into(), size_bytes: GIB }])?;
            for _ in 0..20 {
                made.pass_ms(1000);
                writer.begin(DeltaId::new()).await?;
                writer.commit(made.kind()).await?;
            }
        }
        anyhow::Ok(made.key)
    })?;
    key.save(&dir.path().join("key"))?;
    let listed = highwater(dir.path(), &["machines"])?;
    results.row(&format!("{machines} machines: highwater machines"), &listed.seconds.into(), "s", "");
    results.row("  its memory, most (VmHWM)", &listed.hwm_mib.into(), "MiB", "");
    Ok(())
}

fn store(dir: &Path) -> Result<Store> {
    Ok(Store::open(&dir.join("vault").to_string_lossy().parse()?)?)
}

fn made_dir(dir: &Path, machine: MachineId) -> std::path::PathBuf {
    dir.join("vault/machines").join(machine.to_string())
}

fn number(told: &Value, name: &str) -> Result<f64> {
    told[name].as_f64().with_context(|| format!("the step told no {name}"))
}

/// A step in a process of its own.
fn child(step: &str, dir: &Path, machine: MachineId, places: u64) -> Result<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([crate::STEP, step]).arg(dir).arg(machine.to_string()).arg(places.to_string());
    command.stderr(Stdio::inherit());
    let said = command.output()?;
    ensure!(said.status.success(), "the step `{step}` failed");
    Ok(serde_json::from_slice(&said.stdout)?)
}

/// What such a process does: one step, told with its own memory on standard output.
pub fn step(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let mut next = || arguments.next().context("a step, a directory, a machine and places are expected");
    let (step, dir, machine, places) = (next()?, next()?, next()?, next()?.parse()?);
    let mut told = runtime()?.block_on(steps(&step, Path::new(&dir), machine.parse()?, places))?;
    told["hwm_mib"] = json!(memory_mib(&fs_status("self")?)?);
    println!("{told}");
    Ok(())
}

async fn steps(step: &str, dir: &Path, machine: MachineId, places: u64) -> Result<Value> {
    let began = Instant::now();
    let vault = Vault::open(store(dir)?, &VaultKey::load(&dir.join("key"))?).await?;
    match step {
        "load" => {
            let state = vault.machine(machine).await?;
            ensure!(!state.points.is_empty(), "no points");
            Ok(json!({ "open_s": began.elapsed().as_secs_f64() }))
        }
        "read" => {
            let state = vault.machine(machine).await?;
            let point = state.points.last().context("no point")?;
            let disk: DiskId = point.info.disks.first().context("no disk")?.disk;
            let map = vault.block_map_of(&state, disk, point.id).await?;
            let open_s = began.elapsed().as_secs_f64();
            let mut random = Random::new(9);
            let mut block = [0; BLOCK as usize];
            let began = Instant::now();
            let mut place = || random.below(places) * (map.blocks() / places);
            map.read(BlockRange::new(place(), 1), &mut block).await?;
            let first_s = began.elapsed().as_secs_f64();
            let began = Instant::now();
            for _ in 0..READS {
                map.read(BlockRange::new(place(), 1), &mut block).await?;
            }
            let per_s = READS as f64 / began.elapsed().as_secs_f64();
            Ok(json!({ "open_s": open_s, "first_s": first_s, "per_s": per_s }))
        }
        "commit" => {
            let mut writer = vault.writer(machine).await?;
            let open_s = began.elapsed().as_secs_f64();
            let began = Instant::now();
            for _ in 0..COMMITS {
                let last = writer.state().points.last().context("no point")?.info.clone();
                writer.begin(DeltaId::new()).await?;
                writer.commit(highwater_delta::CommitKind::Point(last)).await?;
            }
            Ok(json!({ "open_s": open_s, "commit_s": began.elapsed().as_secs_f64() / COMMITS as f64 }))
        }
        other => bail!("there is no step `{other}`"),
    }
}

/// What a program took.
struct Took {
    seconds: f64,
    hwm_mib: f64,
}

/// The real program on the vault.
fn highwater(dir: &Path, arguments: &[&str]) -> Result<Took> {
    let mut command = Command::new(daemon::program("highwater")?);
    command.arg("--vault").arg(dir.join("vault")).arg("--key-file").arg(dir.join("key"));
    command.arg("--json").args(arguments).stdout(Stdio::null());
    let began = Instant::now();
    let mut child = command.spawn()?;
    let mut took = Took { seconds: 0.0, hwm_mib: 0.0 };
    loop {
        // The most so far only grows, and is gone with the process: the last look counts.
        if let Ok(mib) = fs_status(&child.id().to_string()).and_then(|status| memory_mib(&status)) {
            took.hwm_mib = took.hwm_mib.max(mib);
        }
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "highwater {arguments:?} failed");
            took.seconds = began.elapsed().as_secs_f64();
            return Ok(took);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn fs_status(process: &str) -> Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/{process}/status"))?)
}

fn memory_mib(status: &str) -> Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no memory in status")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<f64>()? / 1024.0)
}
