//! Which guests are armed, on record for whoever cleans up after agent and guardian. One file a guest, in the run directory.

use super::qga::Qga;
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
    sync::mpsc::channel,
    time::{Duration, Instant},
};

const PREFIX: &str = "guest-armed-";
const BYTES_MAX: u64 = 64 << 10;
/// How long [`thaw_left`] keeps at it.
const PATIENCE: Duration = Duration::from_secs(8);

#[derive(Serialize, Deserialize)]
struct Armed {
    name: String,
    socket: PathBuf,
}

pub(super) fn path(run_dir: &Path, slot: usize) -> PathBuf {
    run_dir.join(format!("{PREFIX}{slot}.json"))
}

pub(super) fn write(path: &Path, name: &str, socket: &Path) -> io::Result<()> {
    let armed = Armed { name: name.into(), socket: socket.into() };
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(&armed)?)?;
    fs::rename(&temporary, path)
}

pub(super) fn remove(path: &Path) {
    // Left behind, it would make `thaw_left` ask a guest that is not frozen: harmless.
    let _ = fs::remove_file(path);
}

/// What came of [`thaw_left`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// On record.
    pub armed: usize,
    /// Were frozen, and are thawed.
    pub thawed: usize,
    /// Did not answer, by name.
    pub stuck: Vec<String>,
}

/// Thaws the guests that a dead agent may have left frozen. Takes 8 s at most.
#[must_use]
pub fn thaw_left(run_dir: &Path) -> Left {
    let found: Vec<PathBuf> = (fs::read_dir(run_dir).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(PREFIX) && name.ends_with(".json")
        })
        .take(super::GUESTS_MAX)
        .collect();
    let mut left = Left { armed: found.len(), ..Left::default() };
    let until = Instant::now() + PATIENCE;
    let (sender, receiver) = channel();
    for path in found.iter().cloned() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let thawed = read(&path).and_then(|armed| {
                let thawed = Qga::connect(&armed.socket, until).and_then(|mut qga| qga.thaw(until));
                thawed.map_err(|_| armed.name)
            });
            let _ = sender.send((path, thawed));
        });
    }
    drop(sender);
    let mut open = found;
    while let Ok((path, thawed)) = receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
        match thawed {
            Ok(count) => {
                left.thawed += usize::from(count > 0);
                remove(&path);
            }
            Err(name) => left.stuck.push(name),
        }
        open.retain(|other| *other != path);
    }
    left.stuck.extend(open.iter().map(|path| read(path).map_or_else(|name| name, |armed| armed.name)));
    left
}

/// An error is what to call it.
fn read(path: &Path) -> Result<Armed, String> {
    let mut text = vec![];
    let file = fs::File::open(path).map_err(|_| path.display().to_string())?;
    file.take(BYTES_MAX).read_to_end(&mut text).map_err(|_| path.display().to_string())?;
    serde_json::from_slice(&text).map_err(|_| path.display().to_string())
}
