//! What a collector keeps for its next process, in `state-dir`.
//!
//! Nothing there is needed: lost or garbled, the next process only does again what was done, or waits. How far a verification is lies
//! there ([`crate::verification`]), and as whom the collector maintains the vault: one that is started anew, after a crash too, goes on
//! at once with machines that are left to it, where a stranger would wait.

use crate::{CollectorError, Config};
use highwater_delta::Code;
use highwater_vault::maintain::Owner;
use std::fmt::Display;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Holds the owner's id; locked for as long as a process goes by it.
const OWNER: &str = "maintainer";

/// The directory, if there is one that can be used.
#[derive(Debug)]
pub struct StateDir {
    path: Option<PathBuf>,
    owner: Owner,
    /// Locked until it is dropped: of two processes by mistake in one directory, the second is somebody else.
    _locked: Option<File>,
}

impl StateDir {
    /// As configured, or what systemd has made for it; made if it is missing. One that cannot be used is told of, and gone without.
    pub fn open(config: &Config) -> Self {
        let made = || {
            let dirs = std::env::var("STATE_DIRECTORY").ok()?;
            dirs.split(':').map(PathBuf::from).find(|dir| dir.ends_with("state"))
        };
        let usable = |path: &PathBuf| {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.inspect_err(|error| not_kept(error)).is_ok()
        };
        Self::at(config.state_dir.clone().or_else(made).filter(usable))
    }

    fn at(path: Option<PathBuf>) -> Self {
        let kept = path.as_deref().and_then(|path| owner(path).inspect_err(|error| not_kept(error)).ok());
        let (owner, locked) = match kept {
            Some((owner, file)) => (owner, Some(file)),
            None => (Owner::new(), None),
        };
        Self { path, owner, _locked: locked }
    }

    /// Where it is.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// As whom this process maintains the vault: as the process before it, if that is known.
    pub const fn owner(&self) -> Owner {
        self.owner
    }
}

/// Says that something in the directory could not be written.
pub fn not_kept(error: &dyn Display) {
    let told = CollectorError::StateNotKept(error.to_string());
    tracing::warn!(code = %Code(told.code()), error = %told, action = told.action(), "the collector goes on without");
}

/// Whoever was kept, or somebody new from now on.
fn owner(dir: &Path) -> io::Result<(Owner, File)> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(dir.join(OWNER))?;
    file.try_lock()?;
    let mut kept = Vec::new();
    (&file).take(17).read_to_end(&mut kept)?;
    if let Ok(id) = <[u8; 16]>::try_from(kept)
        && id != [0; 16]
    {
        return Ok((Owner::from_bytes(id), file));
    }
    let owner = Owner::new();
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(&owner.to_bytes())?;
    file.sync_data()?;
    Ok((owner, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_vault::Location;

    #[test]
    fn a_process_is_who_the_one_before_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let at = || StateDir::at(Some(dir.path().to_path_buf()));
        let first = at();
        let second = at();
        assert_ne!(first.owner(), second.owner(), "both run");
        let owner = first.owner();
        drop((first, second));
        assert_eq!(at().owner(), owner);
        for garbled in [&b""[..], b"short", &[0; 16], &[7; 17]] {
            std::fs::write(dir.path().join(OWNER), garbled).unwrap();
            let owner = at().owner();
            assert_eq!(at().owner(), owner, "kept from now on");
        }
        assert_ne!(StateDir::at(None).owner(), StateDir::at(None).owner());
    }

    #[test]
    fn one_that_cannot_be_made_is_gone_without() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let (vault, key) = (Location::Directory(dir.path().join("vault")), dir.path().join("key"));
        let mut config = Config::new(vec!["localhost".into()], vault, key);
        config.state_dir = Some(dir.path().join("file/state"));
        assert_eq!(StateDir::open(&config).path(), None);
        config.state_dir = Some(dir.path().join("a/state"));
        assert_eq!(StateDir::open(&config).path(), config.state_dir.as_deref());
    }
}
