//! Everything that is done to the devices while they are captured, all at once: raw load, writes that depend on each other over
//! several devices, and file operations.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use highwater_agent::device::Hook;
use highwater_tests::chain::History;
use highwater_tests::{Chains, Churn, Plan};

use super::super::load::Done;
use super::super::subject::Subject;
use super::writers::{self, CHAIN_BYTES, CHAINS, Load};

/// Between two writes that depend on each other.
const CHAIN_PAUSE: Duration = Duration::from_millis(4);
/// Writers of one device, and of one that completes each write in its submission.
const WRITERS: u64 = 4;
const WRITERS_OF_MEMORY: u64 = 2;
const CHURNS: u64 = 2;

/// See the module.
pub struct Work {
    loads: Vec<Load>,
    plan: Plan,
    seed: u64,
}

impl Work {
    /// On these devices. `ext4`: only file operations write to this one; `chained`: those with writes that depend on each other.
    pub fn new(subjects: &[Subject], ext4: usize, chained: &[usize], seed: u64) -> Self {
        let writers = |s: &Subject| if s.device.hook == Hook::Bio { WRITERS_OF_MEMORY } else { WRITERS };
        let raw = subjects.iter().enumerate().filter(|(at, _)| *at != ext4);
        let plan = Plan {
            first_writer: 0,
            disks: chained.iter().map(|at| subjects[*at].path.clone()).collect(),
            writers: CHAINS,
            region_bytes: CHAIN_BYTES,
            seed,
            pause: CHAIN_PAUSE,
            // Were they not, some block of these small areas would always wait for its rest to be read, as slow as that is under
            // emulation, and no position would be to be had.
            whole_blocks: true,
        };
        Self { loads: raw.map(|(_, s)| Load::new(s, writers(s))).collect(), plan, seed }
    }

    /// Does it, the file operations below `mount`, while `watch` runs. Answers what that told, and what was written.
    pub fn during<T>(self, mount: &Path, watch: impl FnOnce() -> Result<T>) -> Result<(T, History)> {
        let (stop, done) = (AtomicBool::new(false), Done::default());
        let churns: Vec<Churn> =
            (0..CHURNS).map(|n| Churn::start(mount, self.seed + n)).collect::<Result<_>>()?;
        let chains = Chains::start(self.plan)?;
        let told = thread::scope(|scope| {
            let (stop, done) = (&stop, &done);
            let mut threads = vec![];
            for (load, seed) in self.loads.iter().zip(self.seed..) {
                let each = |writer| scope.spawn(move || writers::write(load, writer, seed, stop, done));
                threads.extend((0..load.writers).map(each));
            }
            let told = watch();
            stop.store(true, Ordering::Relaxed);
            for writer in threads {
                writer.join().expect("writers do not panic")?;
            }
            told
        })?;
        let history = chains.stop()?;
        let operations: u64 =
            churns.into_iter().map(Churn::stop).map(|c| c.map(|c| c.total())).sum::<Result<_>>()?;
        println!(
            "  load: {} writes, {} discards, {} zeroed, {} that depend on each other, {operations} file operations",
            done.writes.load(Ordering::Relaxed),
            done.discards.load(Ordering::Relaxed),
            done.zeroes.load(Ordering::Relaxed),
            history.writes(),
        );
        Ok((told, history))
    }
}
