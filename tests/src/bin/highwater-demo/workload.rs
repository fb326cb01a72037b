//! What keeps the disk busy: documents that are made, rewritten, renamed and deleted, and a database file whose pages are
//! overwritten in place. Both can be paused between two operations, so that the content of all files can be noted down.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::interrupt;
use highwater_tests::{Random, command};

const PAGE_BYTES: usize = 8192;
const DATABASE_BYTES: u64 = 64 << 20;
const DOCUMENTS: u64 = 600;
const DOCUMENT_BYTES_MAX: u64 = 512 << 10;
const TEXT: &[u8] = b"The high watermark is the point up to which everything is safe elsewhere. ";
const PAUSE_PATIENCE: Duration = Duration::from_secs(60);

/// Fills the disk with what the writers then change.
pub fn fill(root: &Path) -> Result<()> {
    let mut random = Random::new(1);
    fs::create_dir(root.join("documents"))?;
    for number in 0..DOCUMENTS {
        interrupt::check()?;
        document(root, number, &mut random)?;
    }
    let file = File::create(root.join("database"))?;
    for page in 0..DATABASE_BYTES / PAGE_BYTES as u64 {
        file.write_all_at(&content(PAGE_BYTES, &mut random), page * PAGE_BYTES as u64)?;
    }
    // The documents too: what is in use is to be seen in the disk's size.
    command::run("sync", &["--file-system", &root.to_string_lossy()])?;
    Ok(())
}

#[derive(Default)]
struct Wanted {
    pause: bool,
    stop: bool,
    resting: usize,
}

/// Where writers stop between two operations.
#[derive(Default)]
struct Gate {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits while there is a pause; false at the end.
    fn pass(&self) -> bool {
        let mut wanted = self.lock();
        if wanted.pause && !wanted.stop {
            wanted.resting += 1;
            self.changed.notify_all();
            while wanted.pause && !wanted.stop {
                wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
            }
            wanted.resting -= 1;
        }
        !wanted.stop
    }
}

/// The writers; stopped when dropped.
pub struct Workload {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Workload {
    /// Starts them.
    pub fn start(root: &Path) -> Self {
        let gate = Arc::new(Gate::default());
        let writers: [fn(&Path, &Gate) -> io::Result<()>; 2] = [documents, database];
        let threads = writers.map(|writer| {
            let (root, gate) = (root.to_path_buf(), Arc::clone(&gate));
            thread::spawn(move || {
                // A disk that is destroyed ends them; before that an error shows as a pause that does not come.
                let _ = writer(&root, &gate);
            })
        });
        Workload { gate, threads: threads.into() }
    }

    /// Pauses them; they rest on return.
    pub fn pause(&self) -> Result<()> {
        self.gate.change(|wanted| wanted.pause = true);
        let (wanted, _) = self
            .gate
            .changed
            .wait_timeout_while(self.gate.lock(), PAUSE_PATIENCE, |wanted| {
                wanted.resting < self.threads.len()
            })
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(wanted.resting == self.threads.len(), "a writer failed, or waits for the disk for too long");
        Ok(())
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.gate.change(|wanted| wanted.pause = false);
    }

    /// Ends them.
    pub fn stop(&mut self) {
        self.gate.change(|wanted| wanted.stop = true);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.stop();
    }
}

fn documents(root: &Path, gate: &Gate) -> io::Result<()> {
    let mut random = Random::new(2);
    let mut next = DOCUMENTS;
    while gate.pass() {
        let path = path(root, random.below(next));
        match random.below(4) {
            0 => {
                document(root, next, &mut random)?;
                next += 1;
            }
            1 if path.exists() => {
                let target = path.with_extension("renamed");
                fs::rename(&path, target)?;
            }
            2 if path.exists() => fs::remove_file(&path)?,
            _ => {
                let number = random.below(next);
                document(root, number, &mut random)?;
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn database(root: &Path, gate: &Gate) -> io::Result<()> {
    let mut random = Random::new(3);
    let file = File::options().write(true).open(root.join("database"))?;
    while gate.pass() {
        for _ in 0..16 {
            let page = random.below(DATABASE_BYTES / PAGE_BYTES as u64);
            file.write_all_at(&content(PAGE_BYTES, &mut random), page * PAGE_BYTES as u64)?;
        }
        file.sync_data()?;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn path(root: &Path, number: u64) -> PathBuf {
    root.join(format!("documents/{number:05}"))
}

fn document(root: &Path, number: u64, random: &mut Random) -> io::Result<()> {
    let bytes = 1 + random.below(DOCUMENT_BYTES_MAX);
    fs::write(path(root, number), content(bytes as usize, random))
}

/// About half of it can be compressed away, as with most data.
fn content(bytes: usize, random: &mut Random) -> Vec<u8> {
    let mut content = vec![0; bytes];
    for part in content.chunks_mut(4096) {
        let (noise, text) = part.split_at_mut(part.len() / 2);
        random.fill(noise);
        for (to, from) in text.iter_mut().zip(TEXT.iter().cycle()) {
            *to = *from;
        }
    }
    content
}
