//! What may be protected. The list is of cases where tracking would miss writes without noticing, so it refuses first.

use super::{BlockDevice, DeviceError, sysfs};
use crate::mounts;
use std::path::Path;

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
    let name = sysfs::name(&whole);
    if device.logical_block_bytes > 4096 {
        return Some(Refusal {
            reason: "its logical blocks are larger than 4096 bytes",
            action: "Such devices are not supported.",
        });
    }
    if name.starts_with("nvme") && !whole.join("mq").is_dir() {
        return Some(Refusal {
            reason: "it is an NVMe multipath head, which remaps writes in place",
            action: "Boot with nvme_core.multipath=N, or put a logical volume on it and protect that.",
        });
    }
    if let Ok(level) = sysfs::read(&whole, "md/level")
        && matches!(level.as_str(), "linear" | "raid0")
    {
        return Some(Refusal {
            reason: "it is an md array of level linear or raid0, which remaps writes in place",
            action: "Protect its member disks, or the logical volumes on it.",
        });
    }
    if sysfs::read(&whole, "dm/uuid").is_ok_and(|uuid| uuid.starts_with("mpath-")) {
        return Some(Refusal {
            reason: "it is a device-mapper multipath device",
            action: "Protect the logical volumes or partitions on it.",
        });
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

fn is_dax_capable(whole: &Path) -> bool {
    sysfs::read(whole, "queue/dax").is_ok_and(|dax| dax == "1")
}
