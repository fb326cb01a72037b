//! A volume group with a volume for data and one for a log, made by LVM's own commands.
//!
//! The data's volume has two segments: it was extended when the log's volume lay behind it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::machine;

/// Extents, of a MiB, of either segment of the data's volume, and of the log's.
pub const SEGMENT_MIB: u64 = 8;
const LOG_MIB: u64 = 6;
/// There is no udev in the guest, and no daemon.
const CONFIGURATION: &str = "activation { udev_sync = 0 udev_rules = 0 verify_udev_operations = 0 monitoring = 0 }\n\
    devices { obtain_device_list_from_udev = 0 external_device_info_source = \"none\" use_devicesfile = 0 }\n\
    global { use_lvmpolld = 0 event_activation = 0 }\n\
    backup { backup = 0 archive = 0 }\n";
const SYSTEM: &str = "/tmp/lvm";

/// The volumes of data and of the log, on this disk.
pub fn volumes(disk: &Path) -> Result<[PathBuf; 2]> {
    machine::modprobe("dm_mod");
    fs::create_dir_all(SYSTEM)?;
    fs::write(Path::new(SYSTEM).join("lvm.conf"), CONFIGURATION)?;
    // One process for all: it takes a second to start.
    let disk = disk.display();
    let commands = Path::new(SYSTEM).join("commands");
    fs::write(
        &commands,
        format!(
            "#!/sbin/lvm\n\
             vgcreate -s 1m database {disk}\n\
             lvcreate -y -l {SEGMENT_MIB} -n data database\n\
             lvcreate -y -l {LOG_MIB} -n log database\n\
             lvextend -l +{SEGMENT_MIB} database/data\n\
             lvs -a -o lv_name,seg_count,devices database\n"
        ),
    )?;
    let output = Command::new("/sbin/lvm").arg(&commands).env("LVM_SYSTEM_DIR", SYSTEM).output();
    let output = output.context("cannot start lvm")?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "lvm: {}: {told}{failed}", output.status);
    told.lines().for_each(|line| println!("  {}", line.trim()));
    let volumes = [node("data")?, node("log")?];
    let sizes = [SEGMENT_MIB * 2, LOG_MIB];
    for (volume, size) in volumes.iter().zip(sizes) {
        let sectors = machine::attribute(volume, "size")?;
        ensure!(sectors == size << 11, "{} has {sectors} sectors: {told}{failed}", volume.display());
    }
    Ok(volumes)
}

/// The kernel's own node of a volume.
fn node(name: &str) -> Result<PathBuf> {
    let path = format!("/dev/mapper/database-{name}");
    let number = fs::metadata(&path).with_context(|| format!("there is no {path}"))?.rdev();
    machine::wait_for(&format!("/dev/dm-{}", libc::minor(number)))
}
