//! What may be protected. The list is of cases where tracking would miss writes without noticing, so it refuses first.

use super::{BlockDevice, DeviceError, sysfs};
use crate::mounts;
use std::{fs, path::Path};

struct Refusal {
    reason: &'static str,
    action: &'static str,
}

/// Refuses a device some of whose writes tracking cannot see, or which holds nothing to protect.
///
/// # Errors
/// [`DeviceError::Unsupported`] with the reason and what to do instead.
pub fn admit(device: &BlockDevice) -> Result<(), DeviceError> {
    match refusal(device) {
        Some(Refusal { reason, action }) => {
            Err(DeviceError::Unsupported { path: device.path.clone(), reason, action })
        }
        None => Ok(()),
    }
}

fn refusal(device: &BlockDevice) -> Option<Refusal> {
    let whole = sysfs::dir(device.whole).ok()?;
    if device.logical_block_bytes > 4096 {
        return Some(Refusal {
            reason: "its logical blocks are larger than 4096 bytes",
            action: "Such devices are not supported.",
        });
    }
    if let Some(refusal) = of_kind(&sysfs::name(&whole), &whole) {
        return Some(refusal);
    }
    if mounts::is_swap(device) {
        return Some(Refusal {
            reason: "it is a swap area: nothing in it outlives a reboot",
            action: "Swap areas are recreated with mkswap on recovery; protect the other disks.",
        });
    }
    if mounts::dax_in_use(device, is_dax_capable(&whole)) {
        return Some(Refusal {
            reason: "a filesystem on it is mounted with DAX, whose writes bypass the block layer",
            action: "Mount it with the option dax=never.",
        });
    }
    None
}

/// What a driver's ways forbid, by the device's name and its directory in `/sys`.
///
/// A bio that is *remapped in place* (`bio_set_dev` on the submitter's own bio, no clone) completes under the name of the
/// device below, where `block_bio_complete` shows it; the writes of the device above would be missed. A device laid over it
/// (a logical volume) has bios of its own, and is tracked as any other.
fn of_kind(name: &str, whole: &Path) -> Option<Refusal> {
    let is_bio_based = !whole.join("mq").is_dir();
    if name.starts_with("nvme") && is_bio_based {
        return Some(Refusal {
            reason: "it is an NVMe multipath head, which remaps writes in place",
            action: "Boot with nvme_core.multipath=N, or put a logical volume on it and protect that.",
        });
    }
    if let Ok(level) = sysfs::read(whole, "md/level")
        && !MD_LEVELS.contains(&level.as_str())
    {
        return Some(Refusal {
            reason: "it is an md array that remaps writes in place (of level linear or raid0), or that is not in use",
            action: "Protect its member disks, or the logical volumes on it.",
        });
    }
    if is_multipath(whole) {
        return Some(Refusal {
            reason: "it is a device-mapper multipath device",
            action: "Protect the logical volumes or partitions on it.",
        });
    }
    if is_path_of_multipath(whole) {
        return Some(Refusal {
            reason: "it is one path to a disk: what is written over the other paths would be missed",
            action: "Protect the logical volumes or partitions on the multipath device.",
        });
    }
    if is_numbered(name, "bcache") {
        return Some(Refusal {
            reason: "it is a bcache device, which remaps writes in place",
            action: "Put a logical volume on it and protect that.",
        });
    }
    if is_numbered(name, "drbd") {
        return Some(Refusal {
            reason: "it is a DRBD device: what its peer writes reaches the disk below it unseen",
            action: "Protect the disk below it, on each node.",
        });
    }
    if NETWORK.iter().any(|driver| is_numbered(name, driver)) || name.starts_with("etherd/") {
        return Some(Refusal {
            reason: "it is a network block device: other machines may write to it unseen, and nothing tells which it is when it is \
                     connected again",
            action: "Protect it where it is served from; or, if this machine alone writes to it, put a logical volume on it and \
                     protect that.",
        });
    }
    None
}

/// Levels whose writes go out as bios of their own.
const MD_LEVELS: [&str; 5] = ["raid1", "raid4", "raid5", "raid6", "raid10"];
/// Drivers of disks that lie on another machine and have no identity here. (iSCSI and NVMe over fabrics have one.)
const NETWORK: [&str; 3] = ["nbd", "rbd", "rnbd"];

/// `nbd7` of `nbd`.
fn is_numbered(name: &str, driver: &str) -> bool {
    name.strip_prefix(driver).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Whether device-mapper multipath holds it.
fn is_path_of_multipath(whole: &Path) -> bool {
    let Ok(holders) = fs::read_dir(whole.join("holders")) else { return false };
    holders.flatten().any(|holder| is_multipath(&holder.path()))
}

fn is_multipath(dir: &Path) -> bool {
    sysfs::read(dir, "dm/uuid").is_ok_and(|uuid| uuid.starts_with("mpath-"))
}

fn is_dax_capable(whole: &Path) -> bool {
    sysfs::read(whole, "queue/dax").is_ok_and(|dax| dax == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device as `/sys` shows it: attributes, and whether it has a request queue.
    fn refused(name: &str, request_based: bool, attributes: &[(&str, &str)]) -> Option<&'static str> {
        let dir = tempfile::tempdir().unwrap();
        if request_based {
            fs::create_dir(dir.path().join("mq")).unwrap();
        }
        for (path, content) in attributes {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{content}\n")).unwrap();
        }
        of_kind(name, dir.path()).map(|refusal| {
            assert!(refusal.action.ends_with('.') && !refusal.reason.contains("  "));
            refusal.reason
        })
    }

    #[test]
    fn kinds_whose_writes_would_be_missed_are_refused_with_the_reason() {
        for (name, request_based, attributes, reason) in [
            ("nvme0n1", false, &[][..], "NVMe multipath"),
            ("md0", false, &[("md/level", "raid0")], "md array"),
            ("md0", false, &[("md/level", "linear")], "md array"),
            ("md127", false, &[("md/level", "container")], "md array"),
            ("md0", false, &[("md/level", "")], "not in use"),
            ("dm-3", true, &[("dm/uuid", "mpath-3600")], "multipath"),
            ("sda", true, &[("holders/dm-3/dm/uuid", "mpath-3600")], "one path"),
            ("bcache0", false, &[], "bcache"),
            ("drbd1", false, &[], "DRBD"),
            ("nbd0", true, &[], "network"),
            ("rbd12", true, &[], "network"),
            ("rnbd0", true, &[], "network"),
            ("etherd/e1.2", true, &[], "network"),
        ] {
            let found = refused(name, request_based, attributes);
            assert!(found.is_some_and(|found| found.contains(reason)), "{name}: {found:?}");
        }
    }

    #[test]
    fn all_others_are_admitted() {
        for (name, request_based, attributes) in [
            ("sda", true, &[][..]),
            ("vdb", true, &[]),
            // What an array or a volume writes to its members is seen there.
            ("sdb", true, &[("holders/md0/md/level", "raid1")]),
            ("sdc", true, &[("holders/md0/md/level", "raid0")]),
            ("sdd", true, &[("holders/dm-0/dm/uuid", "LVM-abc")]),
            ("nvme0n1", true, &[]),
            ("nbdisk", true, &[]),
            ("zram0", false, &[]),
            ("pmem0", false, &[]),
            ("md0", false, &[("md/level", "raid1")]),
            ("md0", false, &[("md/level", "raid10")]),
            ("md0", false, &[("md/level", "raid6")]),
            ("dm-0", false, &[("dm/uuid", "LVM-abc")]),
            ("dm-1", false, &[("dm/uuid", "CRYPT-LUKS2-abc")]),
        ] {
            assert_eq!(refused(name, request_based, attributes), None, "{name}");
        }
    }
}
