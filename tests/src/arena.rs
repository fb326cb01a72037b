//! The place of one test: alone on the machine's devices, with directories of its own, and clean when it goes.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::census::Census;

const LOCK: &str = "/tmp/highwater-tests.lock";
const BPF: &str = "/sys/fs/bpf";
/// Kernel objects go a moment after the last user does.
const SETTLE: Duration = Duration::from_secs(5);

/// Held for the length of a test; declared first in it, so that it goes last.
///
/// When it goes, anything left over fails the test, unless it is failing already.
pub struct Arena {
    dir: TempDir,
    bpf_dir: PathBuf,
    before: Census,
    // Last: the next test starts when all the rest is gone.
    _lock: Flock<File>,
}

impl Arena {
    /// Waits for the tests before it, in any process.
    pub fn enter(name: &str) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("this test makes devices: run it as root (cargo xtask test)");
        }
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(LOCK)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).context(LOCK)?;
        let before = Census::take();
        let dir = tempfile::Builder::new().prefix(&format!("hwtest-{name}-")).tempdir_in("/var/tmp")?;
        let bpf_dir = Path::new(BPF).join(format!("highwater-test-{}", std::process::id()));
        Ok(Arena { dir, bpf_dir, before, _lock: lock })
    }

    /// A directory for configuration, state and vault.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the agent is to pin its objects (`bpf-dir` in its configuration). Removed with all it holds at the end,
    /// which is how the kernel is told to forget them.
    pub fn bpf_dir(&self) -> &Path {
        &self.bpf_dir
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.bpf_dir).ok();
        let deadline = Instant::now() + SETTLE;
        let left = loop {
            let left = Census::left_over(&self.before, &Census::take());
            if left.is_empty() || Instant::now() > deadline {
                break left;
            }
            thread::sleep(Duration::from_millis(50));
        };
        if left.is_empty() {
            return;
        }
        let text = format!("the test left behind: {}", left.join(", "));
        if thread::panicking() {
            eprintln!("harness: {text}");
        } else {
            panic!("{text}");
        }
    }
}
