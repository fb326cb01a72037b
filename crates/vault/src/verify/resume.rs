//! Where a verification keeps how far it is: a local file.
//!
//! A JSON document with a [`Pass`] and a checksum over it. It is written beside its name (`….new`), synced, renamed, and its directory is
//! synced: a crash leaves the one before. It says nothing that is secret, but what is stored and damaged; only its owner may
//! read it.

use super::Pass;
use crate::{Result, Vault, VaultError, verify::Sample};
use highwater_delta::MachineId;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Problems that are told make most of it.
const BYTES_MAX: u64 = 64 << 20;
const FORMAT: u32 = 2;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Document<P> {
    /// What it is, for people who meet it.
    highwater_verification: u32,
    /// BLAKE3 of the pass, as JSON without spaces.
    blake3: String,
    pass: P,
}

/// What a file says of a verification of this vault; `None` if there is none.
///
/// # Errors
/// [`VaultError::ResumeFile`]: it is garbled; [`VaultError::ResumeOther`]: of another vault, machine or sample. `sample: None` of the
/// outer kind takes whatever sample it has.
pub fn load(
    path: &Path,
    vault: &Vault,
    machine: Option<MachineId>,
    sample: Option<Option<Sample>>,
) -> Result<Option<Pass>> {
    let refuse = |cause: String| VaultError::ResumeFile { path: path.to_owned(), cause };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(VaultError::io(path, e)),
    };
    let mut text = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut text).map_err(|e| VaultError::io(path, e))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(refuse("it is larger than any such file".to_owned()));
    }
    let read: Document<Pass> = serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
    if read.highwater_verification != FORMAT {
        return Err(refuse("this program does not know its format".to_owned()));
    }
    let plain = serde_json::to_vec(&read.pass).map_err(|e| refuse(e.to_string()))?;
    if blake3::hash(&plain).to_hex().as_str() != read.blake3 {
        return Err(refuse("its checksum does not fit".to_owned()));
    }
    let wanted = sample.unwrap_or(read.pass.sample());
    let fits = read.pass.fits(vault, machine, wanted);
    fits.map_err(|cause| VaultError::ResumeOther { path: path.to_owned(), cause })?;
    Ok(Some(read.pass))
}

/// Puts it into the file, durably. Blocks.
pub fn save(path: &Path, pass: &Pass) -> Result<()> {
    let new = beside(path);
    let io = |e| VaultError::io(path, e);
    let plain = serde_json::to_vec(pass).map_err(|e| io(e.into()))?;
    let blake3 = blake3::hash(&plain).to_hex().to_string();
    let document = Document { highwater_verification: FORMAT, blake3, pass };
    let mut text = serde_json::to_vec(&document).map_err(|e| io(e.into()))?;
    text.push(b'\n');
    let written = (|| {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_dir(path)
    })();
    written.map_err(io)
}

/// [`save`] by a thread that may block.
pub async fn save_beside(path: PathBuf, pass: Pass) -> Result<()> {
    let saved = tokio::task::spawn_blocking(move || save(&path, &pass)).await;
    saved.unwrap_or(Err(VaultError::Order("a state was not written")))
}

/// Removes it, if it is there: the verification is at its end. Blocks.
pub fn remove(path: &Path) -> Result<()> {
    for path in [path, &beside(path)] {
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(VaultError::io(path, e)),
            _ => {}
        }
    }
    sync_dir(path).map_err(|e| VaultError::io(path, e))
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

fn sync_dir(path: &Path) -> std::io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(dir)?.sync_all()
}
