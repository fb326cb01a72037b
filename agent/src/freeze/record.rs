//! What is armed, on record for whoever cleans up after agent and guardian.
//!
//! The record lies in the run directory (a tmpfs, so it never outlives the boot its mount numbers belong to), is written before
//! anything is frozen and removed when all is thawed.

use super::{FreezeError, ioctl};
use crate::mounts::{Filesystem, Place};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
    sync::mpsc::channel,
    time::{Duration, Instant},
};

const NAME: &str = "armed.json";
const BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Places kept of one filesystem; a container host has thousands.
const PLACES_MAX: usize = 16;
/// How long [`thaw_all`] keeps at it.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize, Deserialize)]
struct Record {
    agent_pid: u32,
    filesystems: Vec<Armed>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Armed {
    mount_point: PathBuf,
    fs_type: String,
    places: Vec<(PathBuf, u64)>,
}

/// What [`thaw_all`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThawedAll {
    /// How many were armed.
    pub armed: usize,
    /// How many of them were frozen and are thawed now.
    pub thawed: usize,
    /// Those that could not be reached or hang.
    pub stuck: Vec<PathBuf>,
    /// Guests that do not answer. (Those that do are counted above.)
    pub guests_stuck: Vec<String>,
}

pub(super) fn write(run_dir: &Path, filesystems: &[Filesystem]) -> Result<(), FreezeError> {
    let path = run_dir.join(NAME);
    let armed = |fs: &Filesystem| Armed {
        mount_point: fs.mount_point.clone(),
        fs_type: fs.fs_type.clone(),
        places: fs.places.iter().take(PLACES_MAX).map(|place| (place.path.clone(), place.mount_id)).collect(),
    };
    let filesystems = filesystems.iter().map(armed).collect();
    let record = Record { agent_pid: std::process::id(), filesystems };
    let fail = |source| FreezeError::Record { path: path.clone(), source };
    let text = serde_json::to_vec(&record).map_err(|error| fail(error.into()))?;
    let temporary = run_dir.join("armed.json.new");
    fs::create_dir_all(run_dir).map_err(fail)?;
    fs::write(&temporary, text).map_err(fail)?;
    fs::rename(&temporary, &path).map_err(fail)
}

pub(super) fn remove(run_dir: &Path) {
    // Left behind, it would make `thaw_all` try filesystems that are not frozen: harmless.
    let _ = fs::remove_file(run_dir.join(NAME));
}

/// Thaws whatever a dead agent left frozen, filesystems and guests, by its records; for `ExecStopPost=`. To be called only when neither agent nor guardian
/// is at work. Returns after at most 10 s.
///
/// # Errors
/// There is a record, and it cannot be read.
pub fn thaw_all(run_dir: &Path) -> Result<ThawedAll, FreezeError> {
    // Beside each other: a guest that hangs holds up no filesystem.
    let (filesystems, guests) = std::thread::scope(|scope| {
        let guests = scope.spawn(|| crate::guests::thaw_left(run_dir));
        (thaw_filesystems(run_dir), guests.join().unwrap_or_default())
    });
    let mut outcome = filesystems?;
    outcome.armed += guests.armed;
    outcome.thawed += guests.thawed;
    outcome.guests_stuck = guests.stuck;
    Ok(outcome)
}

fn thaw_filesystems(run_dir: &Path) -> Result<ThawedAll, FreezeError> {
    let path = run_dir.join(NAME);
    let fail = |source| FreezeError::Record { path: path.clone(), source };
    let mut text = Vec::new();
    match fs::File::open(&path) {
        Ok(file) => file.take(BYTES_MAX).read_to_end(&mut text).map_err(fail)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ThawedAll::default()),
        Err(error) => return Err(fail(error)),
    };
    let record: Record = serde_json::from_slice(&text).map_err(|error| fail(error.into()))?;
    let mut outcome = ThawedAll { armed: record.filesystems.len(), ..ThawedAll::default() };
    let (sender, receiver) = channel();
    // At once: one that hangs holds up no other, and those on top need those below.
    for (index, armed) in record.filesystems.iter().cloned().enumerate() {
        let sender = sender.clone();
        std::thread::spawn(move || sender.send((index, armed.thaw())));
    }
    let mut waiting: Vec<bool> = vec![true; record.filesystems.len()];
    let end = Instant::now() + PATIENCE;
    while waiting.contains(&true) {
        let Ok((index, result)) = receiver.recv_timeout(end.saturating_duration_since(Instant::now())) else {
            break;
        };
        match result {
            Ok(thawed) => {
                waiting[index] = false;
                outcome.thawed += usize::from(thawed);
            }
            Err(_) => outcome.stuck.push(record.filesystems[index].mount_point.clone()),
        }
        if outcome.stuck.len() + waiting.iter().filter(|w| !**w).count() == waiting.len() {
            break;
        }
    }
    for (armed, waits) in record.filesystems.iter().zip(&waiting) {
        if *waits && !outcome.stuck.contains(&armed.mount_point) {
            outcome.stuck.push(armed.mount_point.clone());
        }
    }
    if outcome.stuck.is_empty() {
        remove(run_dir);
    }
    Ok(outcome)
}

impl Armed {
    /// Whether it had been frozen.
    fn thaw(self) -> Result<bool, FreezeError> {
        let places = self.places.into_iter().map(|(path, mount_id)| Place { path, mount_id }).collect();
        let filesystem = Filesystem {
            mount_point: self.mount_point.clone(),
            places,
            fs_type: self.fs_type,
            dev: (0, 0),
            devices: Vec::new(),
            read_only: false,
            depth: 0,
        };
        let file = filesystem.open()?;
        let mut thawed = false;
        loop {
            match ioctl::thaw(&file) {
                Ok(()) => thawed = true,
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(thawed),
                Err(source) => return Err(FreezeError::Failed { mount_point: self.mount_point, source }),
            }
        }
    }
}
