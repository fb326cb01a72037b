//! fio as a source of load: direct, buffered or mapped, in the background or to its end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::command;

/// How fio writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FioKind {
    /// O_DIRECT through io_uring or libaio's queue.
    Direct,
    /// Through the page cache, with an fsync now and then.
    Buffered,
    /// Through a shared mapping.
    Mmap,
}

/// A job to be run.
#[derive(Debug, Clone)]
pub struct Fio {
    target: PathBuf,
    kind: FioKind,
    size_bytes: u64,
    runtime_s: u32,
    jobs: u32,
    depth: u32,
    block_bytes: u32,
    seed: u64,
    rate_bytes_per_s: Option<u64>,
    compressible_percent: u32,
    pattern: &'static str,
}

/// What a job did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FioReport {
    /// Writes per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Writes in all.
    pub writes: u64,
}

impl Fio {
    /// Random writes of 4 KiB over the first `size_bytes` of a file or device.
    pub fn new(target: &Path, kind: FioKind, size_bytes: u64) -> Self {
        Fio {
            target: target.to_path_buf(),
            kind,
            size_bytes,
            runtime_s: 2,
            jobs: 1,
            depth: 32,
            block_bytes: 4096,
            seed: 1,
            rate_bytes_per_s: None,
            compressible_percent: 0,
            pattern: "randwrite",
        }
    }

    /// For how long.
    #[must_use]
    pub fn runtime_s(mut self, seconds: u32) -> Self {
        self.runtime_s = seconds;
        self
    }

    /// By how many processes.
    #[must_use]
    pub fn jobs(mut self, jobs: u32) -> Self {
        self.jobs = jobs;
        self
    }

    /// How many writes in flight, where direct.
    #[must_use]
    pub fn depth(mut self, depth: u32) -> Self {
        self.depth = depth;
        self
    }

    /// How large a write.
    #[must_use]
    pub fn block_bytes(mut self, bytes: u32) -> Self {
        self.block_bytes = bytes;
        self
    }

    /// The seed of the random places.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// At most so much per second and process.
    #[must_use]
    pub fn rate_bytes_per_s(mut self, rate: u64) -> Self {
        self.rate_bytes_per_s = Some(rate);
        self
    }

    /// So much of each write is what compresses well; the rest, or else all of it, is noise.
    #[must_use]
    pub fn compressible_percent(mut self, percent: u32) -> Self {
        self.compressible_percent = percent;
        self
    }

    /// In order instead of at random.
    #[must_use]
    pub fn sequential(mut self) -> Self {
        self.pattern = "write";
        self
    }

    /// Runs it to its end.
    pub fn run(&self) -> Result<FioReport> {
        self.start()?.wait()
    }

    /// Starts it.
    pub fn start(&self) -> Result<FioRunning> {
        let mut fio = Command::new(command::find("fio"));
        fio.args(["--name=load", "--output-format=json", "--time_based=1", "--group_reporting=1"]);
        fio.arg(format!("--filename={}", self.target.display()));
        fio.arg(format!("--rw={}", self.pattern));
        fio.arg(format!("--size={}", self.size_bytes));
        fio.arg(format!("--runtime={}", self.runtime_s));
        fio.arg(format!("--numjobs={}", self.jobs));
        fio.arg(format!("--bs={}", self.block_bytes));
        fio.arg(format!("--randseed={}", self.seed));
        // The write that follows another to the same place must differ from it, or a lost one would not show.
        // A thread, not a process: killing fio must end its job too.
        fio.args(["--refill_buffers=1", "--norandommap=1", "--thread=1"]);
        if let Some(rate) = self.rate_bytes_per_s {
            fio.arg(format!("--rate={rate}"));
        }
        if self.compressible_percent > 0 {
            fio.arg(format!("--buffer_compress_percentage={}", self.compressible_percent));
        }
        match self.kind {
            FioKind::Direct => {
                fio.args(["--ioengine=libaio", "--direct=1"]).arg(format!("--iodepth={}", self.depth));
            }
            FioKind::Buffered => {
                fio.args(["--ioengine=psync", "--fsync=256"]);
            }
            FioKind::Mmap => {
                fio.args(["--ioengine=mmap", "--fsync=256"]);
            }
        }
        let child = fio
            .current_dir("/tmp")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start fio")?;
        Ok(FioRunning(Some(child)))
    }
}

/// A running job; killed when dropped.
pub struct FioRunning(Option<Child>);

impl FioRunning {
    /// Waits for its end.
    pub fn wait(mut self) -> Result<FioReport> {
        let child = self.0.take().context("fio is running")?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("fio failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        parse(&String::from_utf8_lossy(&output.stdout))
    }
}

impl Drop for FioRunning {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// Notes of fio may stand before its JSON.
fn parse(text: &str) -> Result<FioReport> {
    let json = &text[text.find('{').context("fio printed no report")?..];
    let report: serde_json::Value = serde_json::from_str(json).context("fio's report is no JSON")?;
    let write = &report["jobs"][0]["write"];
    let number =
        |name: &str| write[name].as_f64().with_context(|| format!("fio's report lacks write.{name}"));
    Ok(FioReport {
        iops: number("iops")?,
        bytes_per_s: number("bw_bytes")?,
        writes: number("total_ios")? as u64,
    })
}
