//! Device-mapper devices, made, spoken to and removed by ioctl: what `dmsetup` does, without it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::machine;

/// linux/dm-ioctl.h: `struct dm_ioctl`.
#[repr(C)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// linux/dm-ioctl.h: `struct dm_target_spec`; its parameters follow.
#[repr(C)]
struct DmTargetSpec {
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; 16],
}

const DM_DEV_CREATE: u8 = 3;
const DM_DEV_REMOVE: u8 = 4;
const DM_DEV_SUSPEND: u8 = 6;
const DM_TABLE_LOAD: u8 = 9;
const DM_TARGET_MSG: u8 = 14;
/// Room for answers, which are not read.
const ANSWER_BYTES: usize = 1024;

/// A stretch of a device-mapper device.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its first sector.
    pub start: u64,
    /// How long it is.
    pub sectors: u64,
    /// The target's type.
    pub kind: &'static str,
    /// As in a table of `dmsetup`.
    pub parameters: String,
}

impl Target {
    /// Sectors of the device below, from one of them on.
    pub fn linear(start: u64, sectors: u64, below: &Path, first: u64) -> Result<Self> {
        let parameters = format!("{} {first}", number(below)?);
        Ok(Self { start, sectors, kind: "linear", parameters })
    }
}

/// A device of these targets.
#[derive(Debug)]
pub struct Mapped {
    control: File,
    name: &'static str,
    /// Its node.
    pub path: PathBuf,
}

impl Mapped {
    /// Makes it.
    pub fn new(name: &'static str, targets: &[Target]) -> Result<Self> {
        machine::modprobe("dm_mod");
        let control = File::options().read(true).write(true).open("/dev/mapper/control");
        let control = control.context("device-mapper is not there")?;
        let dev = call(&control, DM_DEV_CREATE, name, 0, &[])?;
        let table = targets.iter().flat_map(spec).collect::<Vec<u8>>();
        call(&control, DM_TABLE_LOAD, name, targets.len() as u32, &table)?;
        call(&control, DM_DEV_SUSPEND, name, 0, &[])?;
        let path = machine::wait_for(&format!("/dev/dm-{}", libc::minor(dev)))?;
        Ok(Self { control, name, path })
    }

    /// Says something to its first target.
    pub fn message(&self, text: &str) -> Result<()> {
        // linux/dm-ioctl.h: `struct dm_target_msg`: a sector, then the text and a zero.
        let message = [&[0; 8], text.as_bytes(), &[0]].concat();
        call(&self.control, DM_TARGET_MSG, self.name, 0, &message).map(drop)
    }

    /// Takes it away; nobody may have it open any more.
    pub fn remove(self) -> Result<()> {
        call(&self.control, DM_DEV_REMOVE, self.name, 0, &[]).map(drop)
    }
}

/// A device-mapper device of two linear targets, which swap the halves of the disk below: a sector taken on the wrong
/// level shows as a wrong block.
pub fn swapped_halves(below: &Path) -> Result<PathBuf> {
    let half = machine::attribute(below, "size")? / 2 / 8 * 8;
    let halves = [Target::linear(0, half, below, half)?, Target::linear(half, half, below, 0)?];
    Ok(Mapped::new("highwater", &halves)?.path)
}

/// A device as tables name it.
pub fn number(device: &Path) -> Result<String> {
    let number = fs::metadata(device)?.rdev();
    Ok(format!("{}:{}", libc::major(number), libc::minor(number)))
}

/// One target of a table, padded for the one behind it.
fn spec(target: &Target) -> Vec<u8> {
    let length = (size_of::<DmTargetSpec>() + target.parameters.len() + 1).next_multiple_of(8);
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(target.start.to_ne_bytes());
    bytes.extend(target.sectors.to_ne_bytes());
    bytes.extend(0_i32.to_ne_bytes());
    bytes.extend((length as u32).to_ne_bytes());
    let mut kind = [0; 16];
    kind[..target.kind.len()].copy_from_slice(target.kind.as_bytes());
    bytes.extend(kind);
    bytes.extend(target.parameters.as_bytes());
    bytes.resize(length, 0);
    bytes
}

/// One command. Answers the device's number.
fn call(control: &File, command: u8, name: &str, targets: u32, content: &[u8]) -> Result<u64> {
    let start = size_of::<DmIoctl>();
    // Words, for the structures' alignment.
    let mut buffer = vec![0_u64; (start + content.len() + ANSWER_BYTES).div_ceil(8)];
    let mut header = DmIoctl {
        version: [4, 0, 0],
        data_size: (buffer.len() * 8) as u32,
        data_start: start as u32,
        target_count: targets,
        open_count: 0,
        flags: 0,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    ensure!(name.len() < header.name.len(), "{name} is too long a name");
    header.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the buffer is aligned for the header, and longer than it and the content behind it.
    unsafe {
        buffer.as_mut_ptr().cast::<DmIoctl>().write(header);
        let place = buffer.as_mut_ptr().cast::<u8>().add(start);
        place.copy_from_nonoverlapping(content.as_ptr(), content.len());
    }
    // _IOWR(0xfd, command, struct dm_ioctl)
    let request = 3 << 30 | (start as u32) << 16 | 0xfd << 8 | u32::from(command);
    // SAFETY: the buffer is as long as `data_size` tells.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request as libc::Ioctl, buffer.as_mut_ptr()) };
    nix::errno::Errno::result(result)
        .with_context(|| format!("device-mapper command {command} for {name}"))?;
    // SAFETY: the kernel has written a header there.
    Ok(unsafe { (*buffer.as_ptr().cast::<DmIoctl>()).dev })
}
