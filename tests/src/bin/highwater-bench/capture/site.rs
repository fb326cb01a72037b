//! An installation in write-ordered mode with one disk in memory, and one load on it.

use std::time::Duration;

use anyhow::{Context, Result};
use highwater_tests::{Arena, Backing, Fio, FioKind, LoopDisk, Site};

use super::probe::{self, Probe};
use super::stored::{self, StoredPoint};
use super::stream::READER;
use super::{MB, MIB};
use crate::agent;
use crate::results::Series;

const DISK_BYTES: u64 = 512 * MIB;
/// What the load writes to; behind it lies the block of the probe.
const LOAD_BYTES: u64 = DISK_BYTES - MIB;
/// Points that are recovered to see how young they are.
const RECOVERED: usize = 3;
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
    /// Points taken and stored while the load lasted.
    pub points: usize,
    /// How much younger points say to be than the probe's last write in them, seconds; of some of them. Below 0, a point has what was
    /// written after it says that it was taken.
    pub younger: Series,
    /// Times that write-ordered mode was left, all reasons but that of disks that come.
    pub left: u64,
    /// The last of them.
    pub reason: Option<String>,
    /// What the ring and the buffers beside it held when the load ended, MiB.
    pub held_mib: f64,
    /// From the end of the load to the point with which all of it is stored, seconds.
    pub catch_up_s: f64,
    /// Processor seconds of the agent, of it the reader of the stream, and of the collector, for 10^9 bytes written.
    pub cpu_s_per_gb: [f64; 3],
    /// Of one processor, what each of them took until all was stored.
    pub cpu_part: [f64; 3],
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
        let probe = Probe::start(self.disk.path(), LOAD_BYTES)?;
        let load = Fio::new(self.disk.path(), FioKind::Direct, LOAD_BYTES)
            .block_bytes(block_bytes)
            .compressible_percent(50)
            .rate_bytes_per_s(mb_per_s * MB as u64)
            .runtime_s(seconds)
            .run()?;
        probe.stop()?;
        let end_ms = stored::now_ms();
        let capture = self.site.status()?["capture"].clone();
        let last = self.site.point_within(CATCH_UP_MAX)?;
        let stored: Vec<StoredPoint> = stored::wait_logged(arena, log_from, last)?;
        let catch_up_s = stored::now_ms().saturating_sub(end_ms) as f64 / 1e3;
        let cpu = self.cpu()?;
        let used = [0, 1, 2].map(|at| cpu[at] - cpu_before[at]);
        let took_s = stored::now_ms().saturating_sub(begin_ms).max(1) as f64 / 1e3;
        let taken = self.stored_under_load(&stored, begin_ms, end_ms)?;
        let (left, reason) = self.left()?;
        let bytes = |name: &str| capture[name].as_f64().with_context(|| format!("no {name} in the status"));
        let gb = load.writes as f64 * f64::from(block_bytes) / 1e9;
        Ok(Outcome {
            mb_per_s: load.bytes_per_s / MB,
            ages: stored::ages(&self.site, &stored, begin_ms)?,
            points: taken.len(),
            younger: self.younger(&taken)?,
            left: left - left_before,
            reason: reason.filter(|_| left > left_before),
            held_mib: (bytes("ring-filled-bytes")? + bytes("buffered-bytes")?) / MIB as f64,
            catch_up_s,
            cpu_s_per_gb: used.map(|used| used / gb),
            cpu_part: used.map(|used| used / took_s),
        })
    }

    /// Number and time of the points taken then, in their order.
    fn stored_under_load(
        &self,
        stored: &[StoredPoint],
        begin_ms: u64,
        end_ms: u64,
    ) -> Result<Vec<(u64, u64)>> {
        let mut points = self.site.points()?;
        points.retain(|(number, taken_at_ms)| {
            (begin_ms..end_ms).contains(taken_at_ms) && stored.iter().any(|point| point.number == *number)
        });
        points.sort_unstable();
        Ok(points)
    }

    /// Of the last of these points.
    fn younger(&self, points: &[(u64, u64)]) -> Result<Series> {
        let mut younger = Series::default();
        for (number, taken_at_ms) in points.iter().rev().take(RECOVERED) {
            let recovered = self.site.recover(*number)?;
            if let Some(written_ms) = probe::read(&recovered.image("bench"), LOAD_BYTES)? {
                younger.push((*taken_at_ms as f64 - written_ms as f64) / 1e3);
            }
        }
        Ok(younger)
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

    fn cpu(&self) -> Result<[f64; 3]> {
        let (agent, collector) = (self.site.agent.as_ref(), self.site.collector.as_ref());
        Ok([
            agent::cpu_seconds(agent)?,
            agent::cpu_seconds_of(agent, &READER)?,
            agent::cpu_seconds(collector)?,
        ])
    }
}
