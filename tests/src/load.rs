//! A steady load of known size: blocks of one file rewritten, small files made, renamed, synced and removed.
//!
//! Unlike [`crate::Churn`], which does what the machine can, it leaves time for points every second on slow machines.

use crate::{Fio, FioKind, Random, fio::FioRunning};
use anyhow::{Context, Result};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

const FILES: u64 = 64;
const PAUSE: Duration = Duration::from_millis(10);

/// Going on until stopped or dropped.
pub struct Load {
    stop: Arc<AtomicBool>,
    files: Option<JoinHandle<Result<()>>>,
    _blocks: FioRunning,
}

impl Load {
    /// About 1 MiB/s, in files of `dir`.
    pub fn start(dir: &Path, seed: u64) -> Result<Self> {
        let blocks = Fio::new(&dir.join(format!("blocks-{seed}")), FioKind::Buffered, 8 << 20);
        let blocks = blocks.runtime_s(600).rate_bytes_per_s(512 << 10).seed(seed).start()?;
        let dir = dir.join(format!("load-{seed}"));
        fs::create_dir(&dir)?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let files = thread::spawn(move || {
            let mut random = Random::new(seed);
            while !flag.load(Ordering::Relaxed) {
                step(&dir, &mut random)?;
                thread::sleep(PAUSE);
            }
            Ok(())
        });
        Ok(Self { stop, files: Some(files), _blocks: blocks })
    }

    /// Ends it; an operation that failed shows here.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let files = self.files.take().context("it is running")?;
        files.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(files) = self.files.take() {
            files.join().ok();
        }
    }
}

fn step(dir: &Path, random: &mut Random) -> Result<()> {
    let name = |random: &mut Random| -> PathBuf { dir.join(format!("f{}", random.below(FILES))) };
    let path = name(random);
    match random.below(10) {
        0 => {
            fs::remove_file(&path).ok();
        }
        1 => {
            let to = name(random);
            fs::rename(&path, to).ok();
        }
        which => {
            let mut data = vec![0; 1 + random.below(16 << 10) as usize];
            random.fill(&mut data);
            let mut file = File::create(&path)?;
            file.write_all(&data)?;
            if which == 2 {
                file.sync_all()?;
            }
        }
    }
    Ok(())
}
