//! Objects of a local vault, made so that whoever owns the vault's directory can use them.
//!
//! A vault's directory is written by its collector, under a user of its own, and by an operator's commands beside it, as a rule as
//! root and under any umask. A revocation that root alone can read would hold for nobody. So directories get the mode of the
//! vault's directory, files the same without execution, and if root writes, both get the directory's owner and group: all of it
//! **before** an object has its name, so that nobody ever meets one that he cannot read.
//!
//! A put is durable when it returns: the file is synced, then linked (create) or renamed (overwrite), then its directory is synced. A
//! crash leaves at most a file named `…#N`, which is no object's name, or a directory that is still root's, which the next put
//! into it gives away.

use object_store::{Error, PutMode, PutPayload, PutResult, Result};
use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown},
    path::{Path, PathBuf},
};

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Ownership {
    root: PathBuf,
    dir_mode: u32,
    /// Whom to give things to: nobody but root can.
    owner: Option<(u32, u32)>,
}

impl Ownership {
    /// As a vault's directory has it. `root` is canonical.
    pub(super) fn of(root: &Path) -> io::Result<Self> {
        let meta = fs::metadata(root)?;
        // SAFETY: takes nothing and cannot fail.
        let is_root = unsafe { libc::geteuid() } == 0;
        let owner = is_root.then(|| (meta.uid(), meta.gid()));
        // With the bit that hands a directory's group down, and whatever else its owner must be able to do.
        Ok(Self { root: root.to_owned(), dir_mode: meta.mode() & 0o2777 | 0o700, owner })
    }

    fn file_mode(&self) -> u32 {
        self.dir_mode & 0o666
    }

    /// Makes the directories above an object.
    pub(super) fn make_parents(&self, object: &Path) -> Result<()> {
        let dirs: Vec<&Path> = object
            .ancestors()
            .skip(1)
            .take_while(|dir| *dir != self.root && dir.starts_with(&self.root))
            .collect();
        for dir in dirs.into_iter().rev() {
            self.make_dir(dir).map_err(|e| failed(dir, e))?;
        }
        Ok(())
    }

    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        let is_new = match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(e) if e.kind() == ErrorKind::AlreadyExists => false,
            Err(e) => return Err(e),
        };
        if let Some((user, group)) = self.owner
            && (is_new || fs::symlink_metadata(dir)?.uid() != user)
        {
            chown(dir, Some(user), Some(group))?;
        }
        if is_new {
            // After the change of owner, which takes bits away.
            fs::set_permissions(dir, Permissions::from_mode(self.dir_mode))?;
            sync_dir_of(dir)?;
        }
        Ok(())
    }

    /// Gives a file that was just made its owner and mode.
    pub(super) fn adopt(&self, file: &File) -> io::Result<()> {
        if let Some((user, group)) = self.owner {
            fchown(file, Some(user), Some(group))?;
        }
        file.set_permissions(Permissions::from_mode(self.file_mode()))
    }

    /// Writes an object as a whole. Blocks.
    pub(super) fn put(&self, object: &Path, payload: &PutPayload, mode: &PutMode) -> Result<PutResult> {
        if matches!(mode, PutMode::Update(_)) {
            let operation = "a conditional update".to_owned();
            return Err(Error::NotImplemented { operation, implementer: "a vault's directory".to_owned() });
        }
        self.make_parents(object)?;
        let (mut file, staged) = stage(object)?;
        let written = self
            .adopt(&file)
            .and_then(|()| payload.iter().try_for_each(|part| file.write_all(part)))
            .and_then(|()| file.sync_all());
        let named = written.and_then(|()| match mode {
            PutMode::Create => fs::hard_link(&staged, object),
            _ => fs::rename(&staged, object),
        });
        // After a rename there is none, and one that stays is no object.
        let _ = fs::remove_file(&staged);
        match named.and_then(|()| sync_dir_of(object)) {
            Ok(()) => Ok(PutResult { e_tag: None, version: None, extensions: Default::default() }),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                // Whoever finds it there may know it for his own, put a moment ago: then it must be as durable as if he were told so.
                sync_dir_of(object).map_err(|e| failed(object, e))?;
                Err(Error::AlreadyExists { path: object.display().to_string(), source: e.into() })
            }
            Err(e) => Err(failed(object, e)),
        }
    }
}

/// A new file beside an object, under a name that no object has: as the store names its uploads.
fn stage(object: &Path) -> Result<(File, PathBuf)> {
    for number in 1_u64.. {
        let mut name = object.as_os_str().to_owned();
        name.push(format!("#{number}"));
        let staged = PathBuf::from(name);
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged) {
            Ok(file) => return Ok((file, staged)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed(&staged, e)),
        }
    }
    Err(failed(object, ErrorKind::AlreadyExists.into()))
}

fn sync_dir_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

pub(super) fn failed(path: &Path, error: io::Error) -> Error {
    let source = format!("{}: {error}", path.display()).into();
    Error::Generic { store: "vault directory", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_made_is_as_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        // SAFETY: takes nothing and cannot fail.
        let is_root = unsafe { libc::geteuid() } == 0;
        fs::set_permissions(&root, Permissions::from_mode(0o750)).unwrap();
        if is_root {
            chown(&root, Some(65534), Some(65533)).unwrap();
        }
        let ownership = Ownership::of(&root).unwrap();
        let object = root.join("control/revoked/m.0");
        let create = PutMode::Create;
        ownership.put(&object, &"one".into(), &create).unwrap();
        let again = ownership.put(&object, &"two".into(), &create).unwrap_err();
        assert!(matches!(again, Error::AlreadyExists { .. }), "{again}");
        assert_eq!(fs::read(&object).unwrap(), b"one");
        ownership.put(&object, &"three".into(), &PutMode::Overwrite).unwrap();
        assert_eq!(fs::read(&object).unwrap(), b"three");
        assert_eq!(fs::read_dir(object.parent().unwrap()).unwrap().count(), 1, "nothing staged is left");
        for (path, mode) in
            [(root.join("control"), 0o750), (root.join("control/revoked"), 0o750), (object.clone(), 0o640)]
        {
            let meta = fs::metadata(&path).unwrap();
            assert_eq!(meta.mode() & 0o7777, mode, "{}", path.display());
            if is_root {
                assert_eq!((meta.uid(), meta.gid()), (65534, 65533), "{}", path.display());
            }
        }
        if is_root {
            // Left by a crash between making and giving away, or by an earlier release.
            chown(root.join("control"), Some(0), Some(0)).unwrap();
            ownership.put(&root.join("control/x"), &"".into(), &create).unwrap();
            assert_eq!(fs::metadata(root.join("control")).unwrap().uid(), 65534);
        }
    }

    #[test]
    fn a_failure_names_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::write(root.join("control"), "a file").unwrap();
        let ownership = Ownership::of(&root).unwrap();
        let error = ownership.put(&root.join("control/x/y"), &"".into(), &PutMode::Create).unwrap_err();
        assert!(error.to_string().contains("control/x: Not a directory"), "{error}");
    }
}
