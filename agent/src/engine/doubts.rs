//! Which disks are in doubt, in the run directory: a doubt outlives the agent's process, as the tracking does.
//!
//! After a reboot there is neither: everything is in doubt then. A doubt is written down before anything else is done about
//! it, and taken away when the comparison that it led to is complete.

use highwater_delta::DiskId;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Why a disk's copy in the vault can't be trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// For operators.
    pub reason: String,
    /// All of the disk was marked to be compared; what is still pending is not yet compared.
    pub comparing: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Doubts {
    path: PathBuf,
    by_disk: BTreeMap<DiskId, Doubt>,
}

impl Doubts {
    /// Reads them; what cannot be read is as after a reboot: none here, and the tracker's record tells the rest.
    #[must_use]
    pub fn load(run_dir: &Path) -> Self {
        let path = run_dir.join("doubts.json");
        let read = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Self { by_disk: read.unwrap_or_default(), path }
    }

    /// The doubt about a disk.
    #[must_use]
    pub fn of(&self, disk: DiskId) -> Option<&Doubt> {
        self.by_disk.get(&disk)
    }

    /// A disk is in doubt, and nothing is done about it yet.
    pub fn raise(&mut self, disk: DiskId, reason: String) {
        self.set(disk, Doubt { reason, comparing: false });
    }

    /// All of the disk is marked now.
    pub fn comparing(&mut self, disk: DiskId, reason: String) {
        self.set(disk, Doubt { reason, comparing: true });
    }

    /// The disk is in doubt no more.
    pub fn settle(&mut self, disk: DiskId) {
        if self.by_disk.remove(&disk).is_some() {
            self.save();
        }
    }

    fn set(&mut self, disk: DiskId, doubt: Doubt) {
        if self.by_disk.get(&disk) != Some(&doubt) {
            self.by_disk.insert(disk, doubt);
            self.save();
        }
    }

    /// By rename. In memory: not synced.
    fn save(&self) {
        let next = self.path.with_extension("new");
        let written = serde_json::to_vec(&self.by_disk)
            .map_err(std::io::Error::from)
            .and_then(|bytes| fs::write(&next, bytes))
            .and_then(|()| fs::rename(&next, &self.path));
        if let Err(error) = written {
            tracing::error!(code = "HW-1461", %error, path = %self.path.display(), "cannot note which disks are in doubt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubt_outlives_the_process_until_it_is_settled() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskId::new();
        Doubts::load(dir.path()).raise(disk, "counts".into());
        let mut next = Doubts::load(dir.path());
        assert_eq!(next.of(disk), Some(&Doubt { reason: "counts".into(), comparing: false }));
        next.comparing(disk, "counts".into());
        assert!(Doubts::load(dir.path()).of(disk).is_some_and(|d| d.comparing));
        next.settle(disk);
        assert_eq!(Doubts::load(dir.path()).of(disk), None);
    }
}
