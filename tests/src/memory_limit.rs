//! A control group that has only so much memory, for a daemon to be in; of either version of control groups.

use crate::device::{report, retry};
use anyhow::{Context, Result};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

const ROOT: &str = "/sys/fs/cgroup";

/// What becomes of those who want more than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beyond {
    /// They wait, or become very slow, until there is more. What they ask the kernel for, like a thread, may be refused.
    Stall,
    /// One of them is killed.
    Kill,
}

/// Names of its files, and the word for no limit.
#[derive(Debug)]
struct Names {
    used: &'static str,
    limit: &'static str,
    /// If there is one that only makes slow; there is a switch for the other otherwise.
    slow: Option<&'static str>,
    unlimited: &'static str,
    events: &'static str,
    reached: &'static str,
}

const V1: Names = Names {
    used: "memory.usage_in_bytes",
    limit: "memory.limit_in_bytes",
    slow: None,
    unlimited: "-1",
    events: "memory.oom_control",
    reached: "memory.failcnt",
};
const V2: Names = Names {
    used: "memory.current",
    limit: "memory.max",
    slow: Some("memory.high"),
    unlimited: "max",
    events: "memory.events",
    reached: "memory.events",
};

/// The group, without a limit at first. Dropped: removed, so whoever was in it must be gone.
#[derive(Debug)]
pub struct MemoryLimit {
    dir: PathBuf,
    names: Names,
}

impl MemoryLimit {
    /// Makes an empty group beside all others.
    ///
    /// # Errors
    /// This machine can limit no memory.
    pub fn new() -> Result<Self> {
        let root = Path::new(ROOT);
        let (root, names) = if root.join("cgroup.controllers").exists() {
            // Only what is given to the groups below can be limited there.
            fs::write(root.join("cgroup.subtree_control"), "+memory")
                .context("no memory in control groups")?;
            (root.to_path_buf(), V2)
        } else {
            (root.join("memory"), V1)
        };
        let dir = root.join(format!("hwtest-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make the control group {}", dir.display()))?;
        Ok(Self { dir, names })
    }

    /// Writes a program that runs another one; within the group, if this is one of its arguments.
    pub fn wrap(&self, program: &Path, argument: &str, wrapper: &Path) -> Result<()> {
        let processes = self.dir.join("cgroup.procs");
        let script = format!(
            "#!/bin/sh\nfor word; do [ \"$word\" = {argument} ] && echo $$ > {}; done\nexec {} \"$@\"\n",
            processes.display(),
            program.display()
        );
        fs::write(wrapper, script)?;
        fs::set_permissions(wrapper, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// What is in use in it.
    pub fn used_bytes(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.dir.join(self.names.used))?.trim().parse()?)
    }

    /// Allows so much from now on. Answers whether that can be: more than that may be in use already, and not be to be had back.
    pub fn set(&self, bytes: u64, beyond: Beyond) -> Result<bool> {
        let mut file = self.names.limit;
        match (beyond, self.names.slow) {
            (Beyond::Stall, Some(slow)) => file = slow,
            (_, Some(_)) => {}
            (Beyond::Stall, None) => fs::write(self.dir.join(self.names.events), "1")?,
            (Beyond::Kill, None) => fs::write(self.dir.join(self.names.events), "0")?,
        }
        match fs::write(self.dir.join(file), bytes.to_string()) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            done => Ok(done.map(|()| true)?),
        }
    }

    /// Allows everything again.
    pub fn lift(&self) -> Result<()> {
        for file in [Some(self.names.limit), self.names.slow].into_iter().flatten() {
            fs::write(self.dir.join(file), self.names.unlimited)?;
        }
        Ok(())
    }

    /// How often somebody in it was killed because there was no memory.
    pub fn kills(&self) -> Result<u64> {
        let told = fs::read_to_string(self.dir.join(self.names.events))?;
        let line = told.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(line.context("nothing is told of kills")?.parse()?)
    }

    /// How often the limit was in somebody's way.
    pub fn reached(&self) -> Result<u64> {
        let told = fs::read_to_string(self.dir.join(self.names.reached))?;
        // A number alone, or one of each limit among others.
        let of_limits = told.lines().filter_map(|l| l.strip_prefix("max ").or(l.strip_prefix("high ")));
        let numbers: Vec<u64> = of_limits.map(str::parse).collect::<Result<_, _>>()?;
        if numbers.is_empty() { Ok(told.trim().parse()?) } else { Ok(numbers.iter().sum()) }
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Nobody is to wait in it for what never comes.
        report(self.lift());
        // Processes that were killed leave a moment later.
        report(retry(|| fs::remove_dir(&self.dir).context("cannot remove the control group")));
    }
}
