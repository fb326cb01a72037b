//! A local, disposable copy of what was read of machines, so that lists of thousands of them cost three requests each: the
//! machine's key, the record that the copy continues, and a list of those behind it.
//!
//! # Contract
//!
//! - A file for each machine, `<dir>/<vault>/<machine>`: a checkpoint, sealed as in the vault, under a path of its own. Nothing in it can be
//!   read without a key of the vault, nor after the machine was erased: the machine's key is not in it.
//! - It is believed only if the vault has the very record that it continues; what came since is replayed. Whoever deletes it loses
//!   nothing; what is garbled, of another program or too large is passed over and written anew.
//! - Any number of programs may share it: files are replaced whole. What cannot be written is left.

use crate::{
    MachineState,
    key::MachineKeys,
    seal::{self, DOCUMENT_BYTES_MAX, OVERHEAD_BYTES},
    state,
};
use highwater_delta::{MachineId, SegmentId, VaultId};
use object_store::path::Path as ObjectPath;
use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// See the module.
#[derive(Clone, Debug)]
pub struct Index {
    dir: PathBuf,
}

impl Index {
    /// One in this directory, which is made when there is something to write.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Whether there is something of a machine, of use or not.
    pub(super) fn has(&self, vault: VaultId, machine: MachineId) -> bool {
        self.file(vault, machine).is_file()
    }

    pub(super) fn read(
        &self,
        vault: VaultId,
        machine: MachineId,
        keys: &MachineKeys,
        bytes_max: u64,
    ) -> Option<MachineState> {
        let file = fs::File::open(self.file(vault, machine)).ok()?;
        let bytes = file.metadata().ok()?.len();
        if bytes > DOCUMENT_BYTES_MAX || bytes.saturating_sub(OVERHEAD_BYTES) > bytes_max {
            return None;
        }
        let mut sealed = Vec::with_capacity(usize::try_from(bytes).ok()?);
        file.take(DOCUMENT_BYTES_MAX).read_to_end(&mut sealed).ok()?;
        let plain = seal::open(&keys.manifest, &path(vault, machine), &sealed).ok()?;
        state::decode(&plain).ok().filter(|state| state.machine == machine && state.last_record > 0)
    }

    pub(super) fn write(&self, vault: VaultId, keys: &MachineKeys, state: &MachineState) {
        let Ok(plain) = state::encode(state) else { return };
        let Ok(sealed) = seal::seal(&keys.manifest, &path(vault, state.machine), &plain) else { return };
        let file = self.file(vault, state.machine);
        let Some(dir) = file.parent() else { return };
        // It is a copy: a failure costs time only.
        let _ = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        let new = dir.join(format!(".{}.{}", state.machine, SegmentId::new()));
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let written = options.open(&new).and_then(|mut file| file.write_all(&sealed));
        if written.and_then(|()| fs::rename(&new, &file)).is_err() {
            let _ = fs::remove_file(&new);
        }
    }

    fn file(&self, vault: VaultId, machine: MachineId) -> PathBuf {
        self.dir.join(vault.to_string()).join(machine.to_string())
    }
}

/// What the document is sealed for: no object has such a name.
fn path(vault: VaultId, machine: MachineId) -> ObjectPath {
    ObjectPath::from(format!("index/{vault}/{machine}"))
}
