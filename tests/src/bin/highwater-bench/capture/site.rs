//! An installation in write-ordered mode with one disk in memory, and one load on it.

use std::time::Duration;

use anyhow::{Context, Result};
use highwater_tests::{Arena, Backing, Fio, FioKind, LoopDisk, Site};

use super::stored::{self, StoredPoint};
use super::{MB, MIB};
use crate::agent;
use crate::results::Series;

const DISK_BYTES: u64 = 512 * MIB;
/// For the point after the load, with which all of it is stored.
const CATCH_UP_MAX: Duration = Duration::from_secs(180);
/// Left of its own accord while disks come: no loss.
const HARMLESS: &str = "disks-changed";

/// See the module. Fields go in their order.
pub struct Ordered {
    site: Site,
    disk: LoopDisk,
}

/// What came of a load.
pub struct Outcome {
    /// Bytes written a second, 10^6.
    pub mb_per_s: f64,
    /// See [`stored::ages`].
    pub ages: Series,
    /// Times that write-ordered mode was left, all reasons but that of disks that come.
    pub left: u64,
    /// The last of them.
    pub reason: Option<String>,
    /// What the ring and the buffers beside it held when the load ended, MiB.
    pub held_mib: f64,
    /// From the end of the load to the point with which all of it is stored, seconds.
    pub catch_up_s: f64,
    /// Processor seconds of agent and collector for 10^9 bytes written.
    pub cpu_s_per_gb: [f64; 2],
}

impl Ordered {
    /// With these lines for the agent's `[capture]`; in write-ordered mode, with a point stored, on return.
    pub fn start(arena: &Arena, capture: Vec<String>) -> Result<Self> {
        let disk = LoopDisk::new(Backing::Tmpfs, DISK_BYTES)?;
        let mut site = agent::fresh_capturing(arena, capture)?;
        // Too much is asked of it on purpose, and it says so.
        site.allow(" WARN ");
        site.protect(disk.path(), "bench")?;
        site.wait_ordered()?;
        site.point()?;
        Ok(Self { site, disk })
    }

    /// Random writes of this size at this rate.
    pub fn load(&self, arena: &Arena, block_bytes: u32, mb_per_s: u64, seconds: u32) -> Result<Outcome> {
        let log_from = agent::log(arena).len();
        let left_before = self.left()?.0;
        let cpu_before = self.cpu()?;
        let begin_ms = stored::now_ms();
        let load = Fio::new(self.disk.path(), FioKind::Direct, DISK_BYTES)
            .block_bytes(block_bytes)
            .compressible_percent(50)
            .rate_bytes_per_s(mb_per_s * MB as u64)
            .runtime_s(seconds)
            .run()?;
        let end_ms = stored::now_ms();
        let capture = self.site.status()?["capture"].clone();
        let last = self.site.point_within(CATCH_UP_MAX)?;
        let stored: Vec<StoredPoint> = stored::wait_logged(arena, log_from, last)?;
        let catch_up_s = stored::now_ms().saturating_sub(end_ms) as f64 / 1e3;
        let cpu = self.cpu()?;
        let ages = stored::ages(&self.site, &stored, begin_ms)?;
        let (left, reason) = self.left()?;
        let bytes = |name: &str| capture[name].as_f64().with_context(|| format!("no {name} in the status"));
        let gb = load.writes as f64 * f64::from(block_bytes) / 1e9;
        Ok(Outcome {
            mb_per_s: load.bytes_per_s / MB,
            ages,
            left: left - left_before,
            reason: reason.filter(|_| left > left_before),
            held_mib: (bytes("ring-filled-bytes")? + bytes("buffered-bytes")?) / MIB as f64,
            catch_up_s,
            cpu_s_per_gb: [0, 1].map(|at| (cpu[at] - cpu_before[at]) / gb),
        })
    }

    /// Ends it.
    pub fn dismiss(self) -> Result<()> {
        agent::dismiss(self.site)
    }

    fn left(&self) -> Result<(u64, Option<String>)> {
        let capture = self.site.status()?["capture"].clone();
        let left = capture["left"].as_object().context("no capture.left in the status")?;
        let times = left.iter().filter(|(kind, _)| *kind != HARMLESS).filter_map(|(_, n)| n.as_u64()).sum();
        Ok((times, capture["last-left"].as_str().map(str::to_owned)))
    }

    fn cpu(&self) -> Result<[f64; 2]> {
        Ok([agent::cpu_seconds(self.site.agent.as_ref())?, agent::cpu_seconds(self.site.collector.as_ref())?])
    }
}
