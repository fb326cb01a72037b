//! The last recovery point that was stored, remembered across lives of the agent: the alarm about its age must not fall silent
//! because the agent was started anew while the collector is away.
//!
//! Each one is noted in the run directory, which is memory. The state directory gets it when the agent stops, and once an hour at
//! most meanwhile, since a tracked disk may hold that directory: after a power cut the age told is too high by that hour at most.

use highwater_delta::{CommitId, PointInfo, VaultId};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const NAME: &str = "last-point.json";
/// One of 256 disks has 20 KiB.
const BYTES_MAX: u64 = 1 << 20;
/// Between two writes to the state directory.
const DURABLE_EVERY: Duration = Duration::from_secs(3600);

/// A stored recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastPoint {
    /// Where it is stored.
    pub(crate) vault: VaultId,
    /// Its number.
    pub(crate) commit: CommitId,
    /// What it holds.
    pub(crate) info: PointInfo,
}

impl LastPoint {
    /// When it was taken.
    pub(crate) fn at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.info.taken_at_ms)
    }

    /// Whether a vault that says this of itself still has it.
    pub(crate) fn is_in(&self, vault: VaultId, last_commit: CommitId) -> bool {
        self.vault == vault && self.commit <= last_commit
    }
}

/// Where it is kept.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// When the state directory got one last, and which.
    durable: Option<(Instant, CommitId)>,
}

impl Kept {
    /// What an earlier life left: the later of the two notes. One that cannot be read is none.
    pub(crate) fn load(run_dir: &Path, state_dir: &Path) -> Option<LastPoint> {
        [run_dir, state_dir].into_iter().filter_map(read).max_by_key(|point| point.info.taken_at_ms)
    }

    /// Notes a new one.
    pub(crate) fn note(&mut self, point: &LastPoint, run_dir: &Path, state_dir: &Path) -> io::Result<()> {
        write(run_dir, point, false)?;
        if self.durable.is_none_or(|(at, _)| at.elapsed() >= DURABLE_EVERY) {
            self.keep(point, state_dir)?;
        }
        Ok(())
    }

    /// Notes it where it outlives a reboot.
    pub(crate) fn keep(&mut self, point: &LastPoint, state_dir: &Path) -> io::Result<()> {
        if self.durable.is_none_or(|(_, commit)| commit != point.commit) {
            self.durable = Some((Instant::now(), point.commit));
            write(state_dir, point, true)?;
        }
        Ok(())
    }

    /// There is none any more.
    pub(crate) fn forget(&mut self, run_dir: &Path, state_dir: &Path) {
        self.durable = None;
        for dir in [run_dir, state_dir] {
            // What cannot be removed is held against the vault again by the next life.
            let _ = fs::remove_file(dir.join(NAME));
        }
    }
}

fn read(dir: &Path) -> Option<LastPoint> {
    let mut bytes = vec![];
    File::open(dir.join(NAME)).ok()?.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn write(dir: &Path, point: &LastPoint, durably: bool) -> io::Result<()> {
    let next = dir.join("last-point.new");
    let mut file = File::create(&next)?;
    file.write_all(&serde_json::to_vec(point)?)?;
    if durably {
        file.sync_all()?;
    }
    fs::rename(next, dir.join(NAME))?;
    if durably { File::open(dir)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_delta::Consistency;

    fn point(vault: VaultId, commit: u64) -> LastPoint {
        let info = PointInfo {
            consistency: Consistency::Filesystem,
            taken_at_ms: commit * 1000,
            freeze_us: 1,
            disks: vec![],
        };
        LastPoint { vault, commit: CommitId(commit), info }
    }

    #[test]
    fn outlives_the_agent_and_at_its_end_the_machine() {
        let (run, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (run, state) = (run.path(), state.path());
        let vault = VaultId::new();
        assert_eq!(Kept::load(run, state), None);
        let mut kept = Kept::default();
        for commit in 1..=3 {
            kept.note(&point(vault, commit), run, state).unwrap();
        }
        assert_eq!(Kept::load(run, state), Some(point(vault, 3)));
        // A reboot without an orderly end: what was written once in the hour.
        fs::remove_file(run.join(NAME)).unwrap();
        assert_eq!(Kept::load(run, state), Some(point(vault, 1)));
        kept.keep(&point(vault, 3), state).unwrap();
        assert_eq!(Kept::load(run, state), Some(point(vault, 3)));
        fs::write(state.join(NAME), "{").unwrap();
        assert_eq!(Kept::load(run, state), None, "what cannot be read is none");
        kept.note(&point(vault, 4), run, state).unwrap();
        kept.forget(run, state);
        assert_eq!(Kept::load(run, state), None);
    }

    #[test]
    fn belongs_to_the_vault_that_has_it() {
        let (one, other) = (VaultId::new(), VaultId::new());
        let point = point(one, 5);
        assert!(point.is_in(one, CommitId(5)) && point.is_in(one, CommitId(6)));
        assert!(!point.is_in(one, CommitId(4)) && !point.is_in(other, CommitId(6)));
    }
}
