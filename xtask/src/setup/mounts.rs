//! The kernel's file systems that eBPF needs, mounted where a minimal system has not.

use std::fs;
use std::process::Command;

use anyhow::{Result, bail};

use crate::sh;

const MOUNTS: [(&str, &str); 2] = [("bpf", "/sys/fs/bpf"), ("tracefs", "/sys/kernel/tracing")];

/// Mounts what is not mounted.
pub fn mount_missing() -> Result<()> {
    let mounted = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for (kind, place) in MOUNTS {
        if is_mounted(&mounted, kind, place) {
            continue;
        }
        if !super::is_root() {
            bail!("{place} is not mounted; as root: mount -t {kind} {kind} {place}");
        }
        sh::step(format_args!("mounting {place}"));
        sh::run(Command::new("mount").args(["-t", kind, kind, place]))?;
    }
    Ok(())
}

fn is_mounted(mounts: &str, kind: &str, place: &str) -> bool {
    mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        words.next() == Some(place) && words.next() == Some(kind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_told_by_place_and_kind() {
        let mounts = "bpf /sys/fs/bpf bpf rw 0 0\nsysfs /sys sysfs rw 0 0\n";
        assert!(is_mounted(mounts, "bpf", "/sys/fs/bpf"));
        assert!(!is_mounted(mounts, "tracefs", "/sys/kernel/tracing"));
        assert!(!is_mounted(mounts, "tracefs", "/sys/fs/bpf"));
    }
}
