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
}

/// Random writes of 4 KiB.
pub const RANDOM_4K: Pattern = Pattern { rw: "randwrite", block: "4k" };
/// Sequential ones of 1 MiB.
pub const SEQUENTIAL_1M: Pattern = Pattern { rw: "write", block: "1M" };

/// What was done.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Writes a second.
    pub iops: f64,
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
    let said = command::run("fio", &arguments)?;
    let report: Value = serde_json::from_str(&said[said.find('{').context("fio printed no report")?..])?;
    let write = &report["jobs"][0]["write"];
    let number =
        |name: &str| write[name].as_f64().with_context(|| format!("fio's report lacks write.{name}"));
    Ok(Done {
        iops: number("iops")?,
        bytes_per_s: number("bw_bytes")?,
        writes: number("total_ios")? as u64,
        bytes: number("io_bytes")? as u64,
    })
}
