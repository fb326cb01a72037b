//! What interrupted uploads leave in a directory: files beside the object that was to be, named like it with `#` and a number.
//! No store lists them, and nobody goes on with them.

use super::LEVELS_MAX;
use std::{
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

/// One that nobody has written to for so long is nobody's: an upload that makes no progress is given up much earlier.
const AGE_MIN: Duration = Duration::from_secs(3600);

/// Deletes those beneath a vault's directory that are old enough. Answers how many. Blocks.
///
/// # Errors
/// The first one; what could be deleted is.
pub fn remove_left_over(dir: &Path) -> io::Result<u64> {
    walk(dir, LEVELS_MAX, SystemTime::now(), &|path| fs::remove_file(path))
}

/// How many [`remove_left_over`] would delete. Blocks.
pub fn left_over(dir: &Path) -> io::Result<u64> {
    walk(dir, LEVELS_MAX, SystemTime::now(), &|_| Ok(()))
}

/// Does something with each; answers how many.
fn walk(
    dir: &Path,
    levels: usize,
    now: SystemTime,
    each: &dyn Fn(&Path) -> io::Result<()>,
) -> io::Result<u64> {
    let (mut removed, mut failed) = (0, None);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let done = if kind.is_dir() && levels > 0 {
            walk(&entry.path(), levels - 1, now, each)
        } else if kind.is_file() && entry.file_name().to_str().is_some_and(is_staged) {
            if_old(&entry.path(), now, each)
        } else {
            Ok(0)
        };
        match done {
            Ok(more) => removed += more,
            // Completed, or given up, meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    failed.map_or(Ok(removed), Err)
}

fn if_old(path: &Path, now: SystemTime, each: &dyn Fn(&Path) -> io::Result<()>) -> io::Result<u64> {
    let modified = fs::symlink_metadata(path)?.modified()?;
    if now.duration_since(modified).is_ok_and(|age| age >= AGE_MIN) {
        each(path)?;
        return Ok(1);
    }
    Ok(0)
}

fn is_staged(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("relays/r/machines/m/segments");
        fs::create_dir_all(&deep).unwrap();
        let old = SystemTime::now() - AGE_MIN - Duration::from_secs(1);
        for (name, is_old) in
            [("s.seg", true), ("s.seg#1", true), ("t.seg#12", true), ("u.seg#1", false), ("v#x", true)]
        {
            let file = fs::File::create(deep.join(name)).unwrap();
            if is_old {
                file.set_modified(old).unwrap();
            }
        }
        assert_eq!(left_over(dir.path()).unwrap(), 2);
        assert_eq!(remove_left_over(dir.path()).unwrap(), 2);
        let mut left: Vec<_> = fs::read_dir(&deep).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["s.seg", "u.seg#1", "v#x"]);
    }
}
