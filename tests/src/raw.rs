//! Writing to a block device beneath whatever is mounted on it, if need be out of the tracker's sight.

use crate::buffer::{Aligned, open_direct};
use crate::{Arena, Random};
use anyhow::{Context, Result};
use highwater_agent::tracker::object::Object;
use std::{fs, os::unix::fs::FileExt, os::unix::fs::MetadataExt, path::Path};

/// Writes whole blocks of a device past the page cache.
pub fn write_blocks(device: &Path, first: u64, count: u64, byte: u8) -> Result<()> {
    let file = open_direct(device, true)?;
    let mut block = Aligned::zeroed(4096);
    block.fill(byte);
    (first..first + count).try_for_each(|at| Ok(file.write_all_at(&block, at * 4096)?))
}

/// Writes random bytes to a device, past the page cache; both numbers multiples of a block.
pub fn write_random(device: &Path, at: u64, bytes: u64, seed: u64) -> Result<()> {
    let mut buffer = Aligned::zeroed(usize::try_from(bytes)?);
    Random::new(seed).fill(&mut buffer);
    Ok(open_direct(device, true)?.write_all_at(&buffer, at)?)
}

/// Does something while the kernel's programs are told that the device is none of theirs.
pub fn hidden(arena: &Arena, device: &Path, what: impl FnOnce() -> Result<()>) -> Result<()> {
    let dev = kernel_number(device)?;
    let mut object = Object::open(arena.bpf_dir())?;
    let target = object.target(dev)?.context("the device is not tracked")?;
    object.remove_target(dev)?;
    what()?;
    Ok(object.set_target(dev, &target)?)
}

/// A device's number as the kernel has it.
pub fn kernel_number(device: &Path) -> Result<u32> {
    let number = fs::metadata(device)?.rdev();
    Ok((nix::sys::stat::major(number) << 20 | nix::sys::stat::minor(number)) as u32)
}
