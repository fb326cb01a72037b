//! What exists on the machine that a test could have left: compared before and after.
//!
//! Only what the harness made is counted, by its names; other users of the machine come and go as they like.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// In the names of all directories that the harness makes, and so in all its mounts and images.
const OURS: &str = "/hwtest-";
/// Set for every daemon of a test and inherited by what it starts.
pub(crate) const ENVIRONMENT: &str = "HIGHWATER_TEST_PROCESS";

/// Loop devices, zram devices, mounts, pinned BPF objects, network namespaces and processes of ours, as names.
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
            if let Ok(file) = fs::read_to_string(attached)
                && file.contains(OURS)
            {
                things.insert(format!("loop device {entry} on {}", file.trim()));
            }
            if entry.starts_with("zram") {
                things.insert(format!("device {entry}"));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        for place in places.filter(|place| place.contains(OURS)) {
            things.insert(format!("mount {place}"));
        }
        pins(Path::new("/sys/fs/bpf"), &mut things);
        things.extend(
            entries("/run/netns")
                .filter(|name| name.starts_with("hwtest-"))
                .map(|name| format!("namespace {name}")),
        );
        for process in entries("/proc").filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            // A zombie's environment is empty: it is gone but for its parent's asking.
            let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(ENVIRONMENT.as_bytes())) {
                let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
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

fn pins(dir: &Path, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.to_string_lossy().contains("highwater-test") {
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
