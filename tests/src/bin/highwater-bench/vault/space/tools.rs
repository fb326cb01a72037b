//! restic and borg, each with a repository and caches of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::results::Series;

/// A tool and its repository.
pub struct Tool {
    pub name: &'static str,
    home: PathBuf,
    repository: PathBuf,
    /// Of its program, without the image; `{}` is the number of the backup.
    back_up: &'static [&'static str],
    backups: u64,
    /// Seconds of the first backup.
    pub first: f64,
    /// And of each later one.
    pub daily: Series,
}

/// Both, with new repositories.
pub fn all(dir: &Path) -> Result<Vec<Tool>> {
    let restic = Tool::new(dir, "restic", &["backup", "--quiet"])?;
    restic.run(&["init", "--quiet"])?;
    let borg = Tool::new(dir, "borg", &["create", "--compression", "zstd,1", "::{}"])?;
    borg.run(&["init", "--encryption", "repokey-blake2"])?;
    Ok(vec![restic, borg])
}

impl Tool {
    fn new(dir: &Path, name: &'static str, back_up: &'static [&'static str]) -> Result<Self> {
        let home = dir.join(name);
        fs::create_dir_all(&home)?;
        let repository = home.join("repository");
        Ok(Self { name, home, repository, back_up, backups: 0, first: 0.0, daily: Series::default() })
    }

    pub fn repository(&self) -> &Path {
        &self.repository
    }

    /// Keeps the image as it is now.
    pub fn back_up(&mut self, image: &Path) -> Result<()> {
        let number = self.backups.to_string();
        let mut arguments: Vec<String> =
            self.back_up.iter().map(|argument| argument.replace("{}", &number)).collect();
        arguments.push(image.to_string_lossy().into_owned());
        let began = Instant::now();
        self.run(&arguments)?;
        let seconds = began.elapsed().as_secs_f64();
        if self.backups == 0 {
            self.first = seconds
        } else {
            self.daily.push(seconds)
        }
        self.backups += 1;
        Ok(())
    }

    fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<()> {
        let mut command = Command::new(self.name);
        command.args(arguments).stdin(Stdio::null());
        // Everything of it goes with the directory.
        command.env("HOME", &self.home).env("XDG_CACHE_HOME", self.home.join("cache"));
        command.env("RESTIC_REPOSITORY", &self.repository).env("RESTIC_PASSWORD", "bench");
        command.env("BORG_REPO", &self.repository).env("BORG_PASSPHRASE", "bench");
        command.env("BORG_BASE_DIR", &self.home);
        let said = command.output().with_context(|| format!("cannot start {}", self.name))?;
        let complaint = String::from_utf8_lossy(&said.stderr);
        ensure!(said.status.success(), "{} failed: {}", self.name, complaint.trim());
        Ok(())
    }
}
