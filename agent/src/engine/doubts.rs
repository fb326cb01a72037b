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
    /// The last change could not be written down.
    unsaved: bool,
}

impl Doubts {
    /// Reads them. A file that is there and cannot be read or understood puts every disk in `all` in doubt.
    #[must_use]
    pub fn load(run_dir: &Path, all: impl Iterator<Item = DiskId>) -> Self {
        let path = run_dir.join("doubts.json");
        let read = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(std::io::Error::from),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        };
        let by_disk = read.unwrap_or_else(|error| {
            let reason = format!("which disks were in doubt cannot be read: {error}");
            tracing::error!(code = "HW-1461", %error, path = %path.display(), "every disk is taken to be in doubt");
            all.map(|disk| (disk, Doubt { reason: reason.clone(), comparing: false })).collect()
        });
        Self { by_disk, path, unsaved: false }
    }

    /// The doubt about a disk.
    #[must_use]
    pub fn of(&self, disk: DiskId) -> Option<&Doubt> {
        self.by_disk.get(&disk)
    }

    /// Whether all of them would outlive the process. If not, writing them is tried again.
    pub fn written(&mut self) -> bool {
        if self.unsaved {
            self.save();
        }
        !self.unsaved
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
    fn save(&mut self) {
        let next = self.path.with_extension("new");
        let written = serde_json::to_vec(&self.by_disk)
            .map_err(std::io::Error::from)
            .and_then(|bytes| fs::write(&next, bytes))
            .and_then(|()| fs::rename(&next, &self.path));
        self.unsaved = written.is_err();
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
        let load = |dir: &tempfile::TempDir| Doubts::load(dir.path(), [disk].into_iter());
        load(&dir).raise(disk, "counts".into());
        let mut next = load(&dir);
        assert_eq!(next.of(disk), Some(&Doubt { reason: "counts".into(), comparing: false }));
        next.comparing(disk, "counts".into());
        assert!(load(&dir).of(disk).is_some_and(|d| d.comparing));
        next.settle(disk);
        assert_eq!(load(&dir).of(disk), None);
        // Where they cannot be written, whoever told of them is to go on telling.
        let mut lost = load(&dir);
        fs::create_dir(dir.path().join("doubts.new")).unwrap();
        lost.raise(disk, "counts".into());
        assert!(!lost.written());
        fs::remove_dir(dir.path().join("doubts.new")).unwrap();
        assert!(lost.written() && load(&dir).of(disk).is_some());
        fs::write(dir.path().join("doubts.json"), "{").unwrap();
        assert!(load(&dir).of(disk).is_some_and(|d| !d.comparing));
    }
}
