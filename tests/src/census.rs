//! What exists on the machine that a test could have left: compared before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Loop devices, zram devices, mounts, pinned BPF objects and processes of ours, as names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    things: BTreeSet<String>,
}

impl Census {
    /// Counts now.
    pub fn take() -> Self {
        let mut things = BTreeSet::new();
        for entry in entries("/sys/block") {
            let attached = Path::new("/sys/block").join(&entry).join("loop/backing_file");
            if let Ok(file) = fs::read_to_string(attached) {
                things.insert(format!("loop device {entry} on {}", file.trim()));
            }
            if entry.starts_with("zram") {
                things.insert(format!("device {entry}"));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for place in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            things.insert(format!("mount {place}"));
        }
        pins(Path::new("/sys/fs/bpf"), &mut things);
        for process in entries("/proc").filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            // The kernel cuts names at 15 bytes, and tests have names of their own.
            if ["highwater-agent", "highwater-colle"].contains(&name.trim()) {
                things.insert(format!("process {process} {}", name.trim()));
            }
        }
        Census { things }
    }

    /// What is there now and was not before.
    pub fn left_over(before: &Census, now: &Census) -> Vec<String> {
        now.things.difference(&before.things).cloned().collect()
    }
}

fn entries(dir: &str) -> impl Iterator<Item = String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// Only those of ours: others' come and go as they like.
fn pins(dir: &Path, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.to_string_lossy().contains("highwater") {
            things.insert(format!("pin {}", path.display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pins(&path, things);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_left_over() {
        let set = |names: &[&str]| Census { things: names.iter().map(|name| (*name).to_owned()).collect() };
        let left = Census::left_over(&set(&["a", "b"]), &set(&["b", "c"]));
        assert_eq!(left, ["c"]);
    }
}
