//! Which hooks were called with `freeze` and not with `thaw` yet, in the run directory: for the case that whoever called them dies.
//!
//! A hook is recorded before it is called, and taken out after its `thaw`. A record is replaced whole: what a crash leaves is the one before or the one
//! after.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where it lies, in the run directory.
const NAME: &str = "hooks-called";

/// See the module.
#[derive(Debug)]
pub(super) struct Called {
    path: PathBuf,
    /// In the order in which they were called.
    names: Vec<String>,
}

impl Called {
    /// What an earlier life left, and nobody has called with `thaw` since: as a rule nothing.
    pub(super) fn left(run_dir: &Path) -> Self {
        let path = run_dir.join(NAME);
        let text = fs::read_to_string(&path).unwrap_or_default();
        Self { path, names: text.lines().map(str::to_owned).collect() }
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn add(&mut self, name: &str) -> io::Result<()> {
        self.names.push(name.to_owned());
        self.write().inspect_err(|_| {
            self.names.pop();
        })
    }

    /// If that fails, it is called with `thaw` once more than it need be.
    pub(super) fn remove(&mut self, name: &str) {
        self.names.retain(|other| other != name);
        let _ = if self.names.is_empty() { fs::remove_file(&self.path) } else { self.write() };
    }

    fn write(&self) -> io::Result<()> {
        let next = self.path.with_extension("new");
        fs::write(&next, self.names.join("\n"))?;
        fs::rename(&next, &self.path)
    }
}
