//! Replication end to end, agent and collector both on this machine, the vault on its disk, against the usual tools.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Backing, FileSystem, Fio, FioKind, LoopDisk, Mounted, Random, Site, command};
use nix::sys::signal::Signal;

use crate::Choice;
use crate::agent::{self, RunDir, dismiss, fresh, timings};
use crate::baseline;
use crate::ingest::ingest;
use crate::results::{Results, Series};

const MIB: u64 = 1 << 20;
const GIB: f64 = (1_u64 << 30) as f64;
const DISK_BYTES: u64 = 1024 * MIB;
const DELTA_BYTES: u64 = 256 * MIB;
const ROUNDS: u32 = 3;
const FREEZES: usize = 20;
const LARGE_BYTES: u64 = 64 << 30;
const PATIENCE: Duration = Duration::from_secs(600);
const COLLECTOR_MEMORY: &str = "<= 256 MiB + 8 MiB a machine";
const TEXT: &[u8] = b"The high watermark is the point up to which everything is safe elsewhere. ";

type Part = fn(&Arena, &Choice, &mut Results) -> Result<()>;
/// What there is to measure, by name.
pub const PARTS: [(&str, Part); 4] =
    [("throughput", throughput), ("ingest", ingest), ("freezes", freezes), ("large-disk", large_disk)];

/// All of it, or the part chosen.
pub fn measure(choice: &Choice) -> Result<Results> {
    let arena = Arena::enter("bench-replicate")?;
    let _run = RunDir;
    let mut results = Results::default();
    for (name, part) in PARTS {
        if choice.part.as_ref().is_none_or(|chosen| chosen == name) {
            part(&arena, choice, &mut results)?;
        }
    }
    results.note(
        "Throughput counts bytes of disk (10^6 a second). Data is half noise, half text, so zstd makes half of it. The first\n\
         baseline only compresses; the second also encrypts (AES-256-CTR, no TLS) and stores durably on the vault's disk. Ours\n\
         hashes each block, passes TLS 1.3 and AES-256-GCM, and shares these processors with the collector that receives it. On one\n\
         processor: the tools together on the first; the agent on the first, the collector on the second. The kernel's own\n\
         threads (it reads the loop device) run where they like.",
    );
    Ok(results)
}

/// One first copy.
struct Copied {
    rate: f64,
    agent_cpu_s_per_gib: f64,
    collector_cpu_s_per_gib: f64,
}

/// Protects the disk and waits until all of it is stored. `times`: copies of this agent, this one included.
fn copy(arena: &Arena, site: &mut Site, disk: &Path, times: usize) -> Result<Copied> {
    let cpu = |site: &Site| -> Result<[f64; 2]> {
        Ok([agent::cpu_seconds(site.agent.as_ref())?, agent::cpu_seconds(site.collector.as_ref())?])
    };
    let before = cpu(site)?;
    let began = Instant::now();
    site.protect(disk, "bench")?;
    agent::wait_logged(arena, "copy complete", times, PATIENCE)?;
    let seconds = began.elapsed().as_secs_f64();
    let after = cpu(site)?;
    let per_gib = |which: usize| (after[which] - before[which]) * GIB / DISK_BYTES as f64;
    Ok(Copied {
        rate: rate(DISK_BYTES, seconds),
        agent_cpu_s_per_gib: per_gib(0),
        collector_cpu_s_per_gib: per_gib(1),
    })
}

/// Bytes of disk, 10^6 a second.
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}

fn throughput(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES)?;
    fill(&File::options().write(true).open(disk.path())?, 0, DISK_BYTES, 1)?;
    let mut site = fresh(arena)?;
    let stored = arena.dir().join("baseline");
    let [mut plain, mut full, mut initial, mut delta, mut delta_plain, mut delta_full] =
        <[Series; 6]>::default();
    let [mut zstd_cpu, mut agent_cpu, mut collector_cpu] = <[Series; 3]>::default();
    let rounds = choice.rounds.unwrap_or(ROUNDS);
    for round in 0..u64::from(rounds) {
        eprintln!("round {} of {rounds}", round + 1);
        let took = baseline::compress(disk.path(), None)?;
        plain.push(rate(DISK_BYTES, took.seconds));
        zstd_cpu.push(took.zstd_cpu_seconds * GIB / DISK_BYTES as f64);
        full.push(rate(DISK_BYTES, baseline::compress_and_store(disk.path(), &stored)?.seconds));
        let copied = copy(arena, &mut site, disk.path(), round as usize + 1)?;
        initial.push(copied.rate);
        agent_cpu.push(copied.agent_cpu_s_per_gib);
        collector_cpu.push(copied.collector_cpu_s_per_gib);
        site.point()?;

        // Written while the agent stands still, so that all of it is still to be sent.
        site.agent.as_ref().context("no agent")?.signal(Signal::SIGSTOP)?;
        let written =
            fill(&File::options().write(true).open(disk.path())?, round * MIB, DELTA_BYTES, 100 + round);
        site.agent.as_ref().context("no agent")?.signal(Signal::SIGCONT)?;
        written?;
        let began = Instant::now();
        site.point()?;
        delta.push(rate(DELTA_BYTES, began.elapsed().as_secs_f64()));
        site.agent_command(&["unprotect", "bench"])?;

        let same = arena.dir().join("same");
        command::run(
            "dd",
            &[
                &format!("if={}", disk.path().display()),
                &format!("of={}", same.display()),
                "bs=1M",
                "count=256",
                "status=none",
                "conv=fsync",
            ],
        )?;
        delta_plain.push(rate(DELTA_BYTES, baseline::compress(&same, None)?.seconds));
        delta_full.push(rate(DELTA_BYTES, baseline::compress_and_store(&same, &stored)?.seconds));
        fs::remove_file(&same)?;
    }
    results.row("dd | zstd -1 -T1, 1 GiB", &plain, "MB/s", "");
    results.row("dd | zstd -1 -T1 | openssl | dd fsync, 1 GiB", &full, "MB/s", "");
    results.row("initial replication, 1 GiB, to stored", &initial, "MB/s", "");
    results.row("  of dd | zstd", &initial.ratio(&plain), "", "");
    results.row("  of dd | zstd | openssl | dd fsync", &initial.ratio(&full), "", "");
    results.row("processor time of zstd, of that pipe, a GiB", &zstd_cpu, "s", "");
    results.row("processor time of the agent, a GiB", &agent_cpu, "s", "");
    results.row("  of it what zstd takes", &zstd_cpu.ratio(&agent_cpu), "", "");
    results.row("processor time of the collector, a GiB", &collector_cpu, "s", "");
    results.row("dd | zstd -1 -T1, 256 MiB", &delta_plain, "MB/s", "");
    results.row("dd | zstd -1 -T1 | openssl | dd fsync, 256 MiB", &delta_full, "MB/s", "");
    results.row("delta of 256 MiB, a point asked for to stored", &delta, "MB/s", "");
    results.row("  of dd | zstd", &delta.ratio(&delta_plain), "", "");
    results.row("  of dd | zstd | openssl | dd fsync", &delta.ratio(&delta_full), "", ">= 0.8");
    one_processor(arena, rounds, &disk, &mut site, results)?;
    let [agent, _] = agent::memory_mib(site.agent.as_ref())?;
    let [collector, _] = agent::memory_mib(site.collector.as_ref())?;
    results.row("agent's memory in these copies, most", &agent.into(), "MiB", "<= 64 MiB + ring");
    results.row("collector's memory in these copies, most", &collector.into(), "MiB", COLLECTOR_MEMORY);
    dismiss(site)
}

/// The same copy with the agent on one processor and the collector on another, against the pipe of tools on one.
fn one_processor(
    arena: &Arena,
    rounds: u32,
    disk: &LoopDisk,
    site: &mut Site,
    results: &mut Results,
) -> Result<()> {
    if thread::available_parallelism()?.get() < 2 {
        results.note("One processor only: agent and collector could not be given one each.");
        return Ok(());
    }
    agent::pin(site.agent.as_ref(), "0")?;
    agent::pin(site.collector.as_ref(), "1")?;
    let [mut plain, mut initial] = <[Series; 2]>::default();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}, one processor each", round + 1);
        plain.push(rate(DISK_BYTES, baseline::compress(disk.path(), Some(0))?.seconds));
        let copied = copy(arena, site, disk.path(), (rounds + round) as usize + 1)?;
        initial.push(copied.rate);
        site.agent_command(&["unprotect", "bench"])?;
    }
    results.row("dd | zstd -1 -T1 on one processor", &plain, "MB/s", "");
    results.row("initial replication, agent on one processor", &initial, "MB/s", "");
    results.row("  of dd | zstd on one", &initial.ratio(&plain), "", ">= 0.8");
    Ok(())
}

fn freezes(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES / 2)?;
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = fresh(arena)?;
    site.protect(disk.path(), "bench")?;
    site.wait_state("bench", "bitmap", PATIENCE)?;
    for (name, load) in [("at rest", false), ("fio, 8 MiB/s", true)] {
        let fio = load
            .then(|| {
                Fio::new(&mounted.path().join("load"), FioKind::Buffered, 64 * MIB)
                    .rate_bytes_per_s(8 * MIB)
                    .runtime_s(FREEZES as u32 / 2 + choice.seconds)
                    .start()
            })
            .transpose()?;
        site.point()?;
        let log_from = agent::log(arena).len();
        for _ in 0..FREEZES {
            thread::sleep(Duration::from_millis(200));
            site.point()?;
        }
        // To its end: killed, it would leave a process of its own behind that holds the disk.
        fio.map(highwater_tests::fio::FioRunning::wait).transpose()?;
        // The agent's log is written behind its back, and may come a moment later.
        let until = Instant::now() + Duration::from_secs(5);
        let mut timings = timings(arena, log_from);
        while timings.freeze.values().len() < FREEZES && Instant::now() < until {
            thread::sleep(Duration::from_millis(50));
            timings = agent::timings(arena, log_from);
        }
        let told = timings.freeze.values().len();
        ensure!(told >= FREEZES, "the agent tells of {told} freezes, not of {FREEZES}");
        results.row(&format!("freeze, ext4, {name}"), &timings.freeze, "ms", "");
        results.row("  of it FIFREEZE, the kernel's own", &timings.enter, "ms", "");
        results.row("  beyond it", &timings.beyond, "ms", "p99 <= 20 ms (write-ordered)");
        results.row("  beyond it, p99", &timings.beyond.quantile(0.99).into(), "ms", "");
        results.row("  end of an epoch", &timings.epoch, "ms", "");
    }
    drop(mounted);
    dismiss(site)
}

fn large_disk(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let disk = LoopDisk::new(Backing::File, LARGE_BYTES)?;
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = fresh(arena)?;
    let idle = [agent::memory_mib(site.agent.as_ref())?, agent::memory_mib(site.collector.as_ref())?];
    let began = Instant::now();
    site.protect(disk.path(), "bench")?;
    site.wait_state("bench", "bitmap", PATIENCE)?;
    let seconds = began.elapsed().as_secs_f64();
    for seed in 0..3 {
        Fio::new(&mounted.path().join("load"), FioKind::Direct, 512 * MIB)
            .runtime_s(choice.seconds)
            .seed(seed)
            .run()?;
        site.point()?;
    }
    let agent = agent::memory_mib(site.agent.as_ref())?;
    let collector = agent::memory_mib(site.collector.as_ref())?;
    results.row("first copy of a sparse 64 GiB disk", &seconds.into(), "s", "");
    results.row("agent's memory with it: most (VmHWM)", &agent[0].into(), "MiB", "<= 64 MiB + ring");
    results.row("agent's memory with it: at the end (VmRSS)", &agent[1].into(), "MiB", "");
    results.row("agent's memory before (VmRSS)", &idle[0][1].into(), "MiB", "");
    results.row("collector's memory with it: most (VmHWM)", &collector[0].into(), "MiB", COLLECTOR_MEMORY);
    results.row("collector's memory with it: at the end (VmRSS)", &collector[1].into(), "MiB", "");
    results.row("collector's memory before (VmRSS)", &idle[1][1].into(), "MiB", "");
    drop(mounted);
    dismiss(site)
}

/// Writes half noise, half text.
fn fill(device: &File, from: u64, bytes: u64, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let mut buffer = vec![0; MIB as usize];
    for offset in (from..from + bytes).step_by(buffer.len()) {
        for part in buffer.chunks_mut(4096) {
            let (noise, text) = part.split_at_mut(2048);
            random.fill(noise);
            for (to, byte) in text.iter_mut().zip(TEXT.iter().cycle()) {
                *to = *byte;
            }
        }
        device.write_all_at(&buffer, offset)?;
    }
    device.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_shrinks_to_about_half() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        fill(&File::create(&path).unwrap(), 0, 2 * MIB, 1).unwrap();
        assert_eq!(content(&path).len(), 2 * MIB as usize);
        assert_ne!(content(&path)[..2048], content(&path)[4096..6144]);
    }

    fn content(path: &Path) -> Vec<u8> {
        fs::read(path).unwrap()
    }
}
