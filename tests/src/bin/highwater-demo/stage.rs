//! What is on stage: the disk with its writers, and the installation of Highwater. Taken down in the right order by
//! whatever ends the demo.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{disk::Disk, journal::Journal, workload::Workload};
use highwater_tests::{Arena, Site};

/// See the module. Writers first, the agent before the disk it reads.
pub struct Stage {
    /// Documents and database.
    pub workload: Option<Workload>,
    /// The journal.
    pub journal: Option<Journal>,
    /// Collector and agent.
    pub site: Option<Site>,
    /// The disk.
    pub disk: Option<Disk>,
    dir: PathBuf,
}

impl Stage {
    /// An empty one.
    pub fn new(arena: &Arena) -> Self {
        Stage { workload: None, journal: None, site: None, disk: None, dir: arena.dir().to_path_buf() }
    }

    /// Where everything lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The installation.
    pub fn site(&self) -> Result<&Site> {
        self.site.as_ref().context("nothing is installed")
    }

    /// The same, to be changed.
    pub fn site_mut(&mut self) -> Result<&mut Site> {
        self.site.as_mut().context("nothing is installed")
    }

    /// The disk.
    pub fn disk(&self) -> Result<&Disk> {
        self.disk.as_ref().context("there is no disk")
    }

    /// Documents and database.
    pub fn workload(&self) -> Result<&Workload> {
        self.workload.as_ref().context("nobody writes")
    }

    /// The journal.
    pub fn journal(&self) -> Result<&Journal> {
        self.journal.as_ref().context("there is no journal")
    }

    /// All points in the vault, as `highwater points --json` tells them.
    pub fn points(&self) -> Result<Vec<Value>> {
        let site = self.site()?;
        let said: Value = serde_json::from_str(&site.operator(&["points", &site.machine()?, "--json"])?)?;
        said["points"].as_array().cloned().context("no points")
    }

    /// The daemons' last words, for a demo that failed.
    pub fn last_words(&self) -> String {
        let mut words = String::new();
        for name in ["agent", "collector"] {
            let log = std::fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(10)..] {
                words.push_str(&format!("{name}: {line}\n"));
            }
        }
        words
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop((self.workload.take(), self.journal.take()));
        if let Some(site) = &mut self.site {
            // What a daemon says of a demo that is taken down does not count.
            site.allow("");
            let _ = (site.kill_agent(), site.kill_collector());
        }
        // The agent has let go of the disk.
        drop(self.disk.take());
    }
}
