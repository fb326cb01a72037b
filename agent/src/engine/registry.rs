//! The protected disks, as the agent remembers them across reboots: `disks.json` in the state directory.
//!
//! Written only when a disk is protected, unprotected, or reaches or leaves full replication: never by a round, so that a
//! tracked disk may hold it. Written by rename with syncs, so a power cut leaves the old or the new one.

use crate::device::StableIdentity;
use highwater_delta::{CommitId, DiskId, VaultId};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// One protected disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Protected {
    /// Given at protection.
    pub disk: DiskId,
    /// For people.
    pub name: String,
    /// By what it is found again.
    pub identity: StableIdentity,
    /// Its size when it was last looked at.
    pub size_bytes: u64,
    /// Whether all of it has been in the vault once.
    pub replicated: bool,
}

/// All of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Registry {
    /// In the order of protection.
    pub disks: Vec<Protected>,
}

/// What was last acknowledged as stored. Lies in the run directory: it is of use only while the bits live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {
    /// By which vault.
    pub vault: VaultId,
    /// Its last commit known here.
    pub commit: CommitId,
}

impl Registry {
    /// Reads it; none yet is an empty one.
    ///
    /// # Errors
    /// It cannot be read or understood.
    pub fn load(state_dir: &Path) -> io::Result<Self> {
        match fs::read(path(state_dir)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
        }
    }

    /// Writes it durably.
    ///
    /// # Errors
    /// It cannot be written; the old one stays.
    pub fn save(&self, state_dir: &Path) -> io::Result<()> {
        let next = path(state_dir).with_extension("new");
        let mut file = File::create(&next)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&next, path(state_dir))?;
        File::open(state_dir)?.sync_all()
    }
}

impl Acknowledged {
    /// Reads it.
    #[must_use]
    pub fn load(run_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(run_dir.join("acknowledged.json")).ok()?).ok()
    }
    /// Writes it (to memory).
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, run_dir: &Path) -> io::Result<()> {
        let next = run_dir.join("acknowledged.new");
        fs::write(&next, serde_json::to_vec(self)?)?;
        fs::rename(next, run_dir.join("acknowledged.json"))
    }
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("disks.json")
}
