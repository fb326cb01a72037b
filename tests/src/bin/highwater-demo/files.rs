//! What the files of a directory hold: a checksum of each, and the differences between two such lists.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

/// Path below the root → size and BLAKE3 of the content.
pub type Files = BTreeMap<String, (u64, [u8; 32])>;

/// Reads every file below a directory, except one at its top.
pub fn checksums(root: &Path, except: &str) -> Result<Files> {
    let mut files = Files::new();
    let mut buffer = vec![0; 1 << 20];
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() {
                let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
                if name != except {
                    files.insert(name, checksum(&path, &mut buffer)?);
                }
            }
        }
    }
    Ok(files)
}

fn checksum(path: &Path, buffer: &mut [u8]) -> Result<(u64, [u8; 32])> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut size, mut hash) = (0, blake3::Hasher::new());
    loop {
        let count = file.read(buffer).with_context(|| path.display().to_string())?;
        if count == 0 {
            return Ok((size, *hash.finalize().as_bytes()));
        }
        size += count as u64;
        hash.update(&buffer[..count]);
    }
}

/// Their bytes.
pub fn bytes(files: &Files) -> u64 {
    files.values().map(|(size, _)| size).sum()
}

/// In words, for each file that is not the same.
pub fn differences(then: &Files, recovered: &Files) -> Vec<String> {
    let mut found = Vec::new();
    for (name, content) in then {
        match recovered.get(name) {
            None => found.push(format!("{name} is missing")),
            Some(other) if other != content => found.push(format!("{name} has other content")),
            Some(_) => {}
        }
    }
    found.extend(
        recovered.keys().filter(|name| !then.contains_key(*name)).map(|name| format!("{name} was not there")),
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_difference_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [("same", "1"), ("changed", "2"), ("lost", "3"), ("left-out", "4")] {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let then = checksums(dir.path(), "left-out").unwrap();
        assert_eq!(bytes(&then), 3);
        assert_eq!(differences(&then, &then), Vec::<String>::new());
        fs::write(dir.path().join("changed"), "x").unwrap();
        fs::remove_file(dir.path().join("lost")).unwrap();
        fs::write(dir.path().join("new"), "").unwrap();
        let now = checksums(dir.path(), "left-out").unwrap();
        assert_eq!(
            differences(&then, &now),
            ["changed has other content", "lost is missing", "new was not there"]
        );
    }
}
