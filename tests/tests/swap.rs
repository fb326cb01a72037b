//! Swap areas: one that is a device of its own is refused, one on a partition of a protected disk is not copied behind its
//! header page.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Site, SiteOptions, command, compare_devices,
    raw::write_random,
};
use std::{fs::File, io::Read, os::unix::fs::FileExt, path::Path};

const MIB: u64 = 1 << 20;
const SENT: &str = "highwater_agent_sent_bytes_total";
/// Where the swap partition lies, in MiB.
const SWAP: std::ops::Range<u64> = 40..60;

fn mkswap(device: &Path) -> Result<()> {
    command::run("mkswap", &[device.as_os_str()]).map(drop)
}

/// In use as swap; no longer when dropped.
struct SwapOn<'a>(&'a Path);
impl<'a> SwapOn<'a> {
    fn new(device: &'a Path) -> Result<Self> {
        command::run("swapon", &[device.as_os_str()])?;
        Ok(Self(device))
    }
}
impl Drop for SwapOn<'_> {
    fn drop(&mut self) {
        if let Err(error) = command::run("swapoff", &[self.0.as_os_str()]) {
            eprintln!("{error:#}");
        }
    }
}

#[test]
fn a_swap_device_is_refused_with_the_reason() -> Result<()> {
    let arena = Arena::enter("swap")?;
    let disk = LoopDisk::new(Backing::File, 16 * MIB)?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    site.start_agent()?;
    mkswap(disk.path())?;
    let refused = |site: &mut Site| -> Result<String> {
        let error = site.protect(disk.path(), "swap").err().context("a swap area was protected")?;
        Ok(error.to_string())
    };
    let told = refused(&mut site)?;
    ensure!(told.contains("HW-1409") && told.contains("swap area"), "{told}");
    let on = SwapOn::new(disk.path())?;
    let told = refused(&mut site)?;
    ensure!(told.contains("HW-1409") && told.contains("swap area"), "{told}");
    drop(on);
    // A filesystem in its place is a disk like any other.
    let _data = Mounted::make(FileSystem::Ext4, disk.path())?;
    site.protect(disk.path(), "swap")?;
    site.stop_agent()
}

fn read(image: &mut File, at: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(bytes)?];
    image.read_exact_at(&mut content, at)?;
    Ok(content)
}

#[test]
fn a_swap_partition_of_a_protected_disk_is_not_copied_behind_its_header() -> Result<()> {
    let arena = Arena::enter("swapped")?;
    let mut disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    write_random(disk.path(), 0, 64 * MIB, 1)?;
    let data = disk.add_partition(2048, 32 * 2048)?;
    let swap = disk.add_partition(SWAP.start * 2048, (SWAP.end - SWAP.start) * 2048)?;
    let data = Mounted::make(FileSystem::Ext4, &data)?;
    mkswap(&swap)?;
    let mut header = vec![0; 4096];
    File::open(&swap)?.read_exact(&mut header)?;

    let options = SiteOptions { copy_frozen: false, ..SiteOptions::default() };
    let mut site = Site::new(&arena, &options)?;
    site.start_agent()?;
    site.protect(disk.path(), "disk")?;
    site.wait_replicated()?;
    let point = site.point()?;
    let mut image = File::open(site.recover(point)?.image("disk"))?;
    let (start, bytes) = (SWAP.start * MIB, (SWAP.end - SWAP.start) * MIB);
    ensure!(
        read(&mut image, start, 4096)? == header,
        "the header is not there: no swap area after a recovery"
    );
    let behind = read(&mut image, start + 4096, bytes - 4096)?;
    ensure!(behind.iter().all(|b| *b == 0), "swap was copied");
    for (what, at) in [("before", start - 2 * MIB), ("behind", SWAP.end * MIB)] {
        let mut now = File::open(disk.path())?;
        ensure!(read(&mut now, at, 2 * MIB)? == read(&mut image, at, 2 * MIB)?, "{what} the swap area");
    }

    // Busy swap makes no point larger, also while it is used.
    let on = SwapOn::new(&swap)?;
    site.point()?;
    let sent = site.metric(SENT)?;
    // As the kernel would, which lets nobody else write to the partition now.
    write_random(disk.path(), start + 4 * MIB, 8 * MIB, 2)?;
    site.point()?;
    let more = site.metric(SENT)? - sent;
    ensure!(more < 2e6, "{more} bytes were sent for swap");
    drop(on);

    // No swap any more: all of it belongs to the disk again, also what was written meanwhile and not since.
    write_random(&swap, 0, 4096, 3)?;
    let point = site.point()?;
    let differing = compare_devices(disk.path(), &site.recover(point)?.image("disk"), &[])?;
    ensure!(
        differing.iter().all(|at| !(start / 4096..SWAP.end * 256).contains(at)),
        "{} blocks",
        differing.len()
    );
    site.verify()?;
    drop(data);
    site.stop_agent()
}
