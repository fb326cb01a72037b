//! Which hooks there are.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Most hooks of a directory.
const HOOKS_MAX: usize = 64;
/// Ends of names of files that packages and editors leave.
const PASSED_OVER: [&str; 10] =
    ["~", ".bak", ".orig", ".rpmnew", ".rpmorig", ".rpmsave", ".sample", ".swp", ".disabled", ".md"];
/// Parts of such names.
const PASSED_OVER_WITHIN: &str = ".dpkg-";

/// The hooks could not be looked for.
#[derive(Debug, thiserror::Error)]
pub enum HooksError {
    /// The directory cannot be read.
    #[error("cannot read {dir}")]
    Read {
        /// Which.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than root can put hooks there.
    #[error("others than root can write to {0}: nothing in it is called")]
    Open(PathBuf),
    /// More than are called.
    #[error("{dir} holds more than {HOOKS_MAX} hooks")]
    TooMany {
        /// Which.
        dir: PathBuf,
    },
}

/// A file that is not called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which.
    pub path: PathBuf,
    /// Why.
    pub why: &'static str,
}

/// An executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Its file's name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

/// All of a directory, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks(Vec<Hook>);

impl Hooks {
    /// Looks what there is. A directory that is not there holds none. Also answers what looks like a hook and is not called.
    ///
    /// # Errors
    /// The directory cannot be read, or is open to others.
    pub fn find(dir: &Path) -> Result<(Self, Vec<Refused>), HooksError> {
        let fail = |source| HooksError::Read { dir: dir.into(), source };
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default().with(vec![])),
            Err(error) => return Err(fail(error)),
        };
        if is_open(&fs::metadata(dir).map_err(fail)?) {
            return Err(HooksError::Open(dir.into()));
        }
        let (mut hooks, mut refused) = (vec![], vec![]);
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else {
                continue;
            };
            if is_passed_over(&name) {
                continue;
            }
            match look(&path) {
                Ok(true) => hooks.push(Hook { name, path }),
                Ok(false) => {}
                Err(why) => refused.push(Refused { path, why }),
            }
        }
        if hooks.len() > HOOKS_MAX {
            return Err(HooksError::TooMany { dir: dir.into() });
        }
        hooks.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        refused.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(Self(hooks).with(refused))
    }

    fn with(self, refused: Vec<Refused>) -> (Self, Vec<Refused>) {
        (self, refused)
    }

    /// In the order in which they are called.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Hook> {
        self.0.iter()
    }
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn is_passed_over(name: &str) -> bool {
    name.starts_with('.')
        || name.contains(PASSED_OVER_WITHIN)
        || PASSED_OVER.iter().any(|end| name.ends_with(end))
}

/// Whether a file is a hook; an error says why one that seems to be meant as such is not called.
fn look(path: &Path) -> Result<bool, &'static str> {
    // A link's target counts.
    let meta = fs::metadata(path).map_err(|_| "it cannot be looked at")?;
    if meta.is_dir() {
        return Ok(false);
    }
    if !meta.is_file() {
        return Err("it is no file");
    }
    if meta.mode() & 0o111 == 0 {
        return Err("it is not executable");
    }
    if is_open(&meta) {
        return Err("others than root can change it");
    }
    Ok(true)
}

/// Whether others than root, and who runs this, can change it.
fn is_open(meta: &fs::Metadata) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    meta.mode() & 0o022 != 0 || (meta.uid() != 0 && meta.uid() != own)
}
