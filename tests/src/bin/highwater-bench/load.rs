//! fio at a device as hard as it goes, for what is compared: the buffers stay the same, since refilling them would hide what is measured.

use std::path::Path;

use anyhow::{Context, Result};
use highwater_tests::command;
use serde_json::Value;

/// A pattern of direct writes, always 32 of them in flight.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    /// `randwrite` or `write`.
    pub rw: &'static str,
    /// Of one write, as fio takes it.
    pub block: &'static str,
    /// At most so many a second, at regular times; 0: as many as go.
    pub rate_iops: u32,
}

/// Random writes of 4 KiB.
pub const RANDOM_4K: Pattern = Pattern { rw: "randwrite", block: "4k", rate_iops: 0 };
/// The same, as many as a usual disk of a cloud does.
pub const PACED_4K: Pattern = Pattern { rate_iops: 16_000, ..RANDOM_4K };
/// Sequential ones of 1 MiB.
pub const SEQUENTIAL_1M: Pattern = Pattern { rw: "write", block: "1M", rate_iops: 0 };

/// What was done.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Writes a second.
    pub iops: f64,
    /// How long one took, in the mean, from submission on.
    pub mean_us: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Writes in all.
    pub writes: u64,
    /// Bytes in all.
    pub bytes: u64,
}

/// Writes over the first `bytes` of a device for so many seconds.
pub fn write(device: &Path, pattern: Pattern, bytes: u64, seconds: u32) -> Result<Done> {
    let mut arguments: Vec<String> =
        ["--name=bench", "--output-format=json", "--direct=1", "--ioengine=libaio"]
            .into_iter()
            .chain(["--iodepth=32", "--norandommap=1", "--time_based=1", "--randrepeat=0"])
            .map(str::to_owned)
            .collect();
    arguments.push(format!("--filename={}", device.display()));
    arguments.push(format!("--rw={}", pattern.rw));
    arguments.push(format!("--bs={}", pattern.block));
    arguments.push(format!("--size={bytes}"));
    arguments.push(format!("--runtime={seconds}"));
    if pattern.rate_iops > 0 {
        arguments.push(format!("--rate_iops={}", pattern.rate_iops));
    }
    let said = command::run("fio", &arguments)?;
    let report: Value = serde_json::from_str(&said[said.find('{').context("fio printed no report")?..])?;
    let write = &report["jobs"][0]["write"];
    let number =
        |name: &str| write[name].as_f64().with_context(|| format!("fio's report lacks write.{name}"));
    Ok(Done {
        iops: number("iops")?,
        mean_us: write["lat_ns"]["mean"].as_f64().context("fio's report lacks latencies")? / 1e3,
        bytes_per_s: number("bw_bytes")?,
        writes: number("total_ios")? as u64,
        bytes: number("io_bytes")? as u64,
    })
}
