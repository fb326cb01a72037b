//! The guest's devices: modules, a device-mapper device made by ioctl, zram, and what a device can do.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

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
const DM_DEV_SUSPEND: u8 = 6;
const DM_TABLE_LOAD: u8 = 9;
/// Room for the tables made here.
const DM_BUFFER_BYTES: usize = 4096;
/// Parameters of one target, padded.
const DM_PARAMETERS_BYTES: usize = 88;

/// Loads a kernel module; one that is built in, or absent, is no error: what needs it will tell.
pub fn modprobe(name: &str) {
    let _ = Command::new("/sbin/modprobe").arg(name).status();
}

/// Waits until a block device's node is there.
pub fn wait_for(path: &str) -> Result<PathBuf> {
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        if fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device()) {
            return Ok(path.into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("{path} did not appear");
}

/// A device-mapper device of two linear targets, which swap the halves of the disk below: a sector taken on the wrong
/// level shows as a wrong block.
pub fn swapped_halves(below: &Path) -> Result<PathBuf> {
    modprobe("dm_mod");
    let control = File::options().read(true).write(true).open("/dev/mapper/control");
    let control = control.context("device-mapper is not there")?;
    let number = fs::metadata(below)?.rdev();
    let number = format!("{}:{}", libc::major(number), libc::minor(number));
    let sectors: u64 = attribute(below, "size")?;
    let half = sectors / 2 / 8 * 8;
    call(&control, DM_DEV_CREATE, &[])?;
    call(
        &control,
        DM_TABLE_LOAD,
        &[(0, half, format!("{number} {half}")), (half, half, format!("{number} 0"))],
    )?;
    call(&control, DM_DEV_SUSPEND, &[])?;
    wait_for("/dev/dm-0")
}

fn call(control: &File, number: u8, targets: &[(u64, u64, String)]) -> Result<()> {
    // Words, for the structures' alignment.
    let mut buffer = vec![0_u64; DM_BUFFER_BYTES / 8];
    let start = size_of::<DmIoctl>();
    let mut header = DmIoctl {
        version: [4, 0, 0],
        data_size: DM_BUFFER_BYTES as u32,
        data_start: start as u32,
        target_count: targets.len() as u32,
        open_count: 0,
        flags: 0,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    header.name[..9].copy_from_slice(b"highwater");
    // SAFETY: the buffer is aligned for and longer than the header.
    unsafe { buffer.as_mut_ptr().cast::<DmIoctl>().write(header) };
    let step = size_of::<DmTargetSpec>() + DM_PARAMETERS_BYTES;
    for (index, (sector_start, length, parameters)) in targets.iter().enumerate() {
        let mut spec = DmTargetSpec {
            sector_start: *sector_start,
            length: *length,
            status: 0,
            next: step as u32,
            target_type: [0; 16],
        };
        spec.target_type[..6].copy_from_slice(b"linear");
        let at = start + index * step;
        if at + step > DM_BUFFER_BYTES || parameters.len() >= DM_PARAMETERS_BYTES {
            bail!("the table is too long");
        }
        // SAFETY: `at` is a multiple of 8 (both structures' sizes and the parameters' are), and the buffer reaches
        // behind the parameters, as checked; the terminating zero is there already.
        unsafe {
            let place = buffer.as_mut_ptr().cast::<u8>().add(at);
            place.cast::<DmTargetSpec>().write(spec);
            let text = place.add(size_of::<DmTargetSpec>());
            text.copy_from_nonoverlapping(parameters.as_ptr(), parameters.len());
        }
    }
    // _IOWR(0xfd, number, struct dm_ioctl)
    let request = 3 << 30 | (size_of::<DmIoctl>() as u32) << 16 | 0xfd << 8 | u32::from(number);
    // SAFETY: the buffer is as long as `data_size` tells.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request as libc::Ioctl, buffer.as_mut_ptr()) };
    nix::errno::Errno::result(result).map(drop).with_context(|| format!("device-mapper command {number}"))
}

/// A zram device of so many MiB.
pub fn zram(size_mib: u64) -> Result<PathBuf> {
    modprobe("zram");
    let path = wait_for("/dev/zram0")?;
    fs::write("/sys/block/zram0/disksize", format!("{size_mib}M")).context("cannot size zram0")?;
    Ok(path)
}

/// Mounts an ext4 device.
pub fn mount_ext4(device: &Path, at: &Path) -> Result<()> {
    modprobe("ext4");
    fs::create_dir_all(at)?;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some(device), at, Some("ext4"), flags, None::<&str>)
        .with_context(|| format!("cannot mount {}", device.display()))
}

/// A number below `/sys/block/<device>`.
pub fn attribute(device: &Path, name: &str) -> Result<u64> {
    let block = device.file_name().context("a device has a name")?;
    let path = Path::new("/sys/block").join(block).join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{} is no number", path.display()))
}

/// The running kernel's release.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| "?".to_owned(), |name| name.release().to_string_lossy().into_owned())
}

/// Whether the kernel lies at addresses that were chosen at random, memory's included; none if it does not tell.
pub fn kaslr() -> Option<bool> {
    /// Documentation/arch/x86/boot.rst: `loadflags`, and in it KASLR_FLAG, which the kernel's own first stage sets.
    const LOADFLAGS: usize = 0x211;
    const KASLR: u8 = 1 << 1;
    let parameters = fs::read("/sys/kernel/boot_params/data").ok()?;
    Some(parameters.get(LOADFLAGS)? & KASLR != 0)
}

/// Sends one block to an NVMe namespace past the block layer's own writing: NVME_IOCTL_IO_CMD with opcode 1.
pub fn nvme_passthrough_write(namespace: &Path, block: u64, data: &mut [u8]) -> Result<()> {
    /// linux/nvme_ioctl.h: `struct nvme_passthru_cmd`.
    #[repr(C)]
    #[derive(Default)]
    struct Passthrough {
        opcode: u8,
        flags: u8,
        reserved: u16,
        nsid: u32,
        cdw2: [u32; 2],
        metadata: u64,
        addr: u64,
        metadata_len: u32,
        data_len: u32,
        cdw10: u32,
        cdw11: u32,
        cdw12: u32,
        cdw13: [u32; 3],
        timeout_ms: u32,
        result: u32,
    }
    const NVME_IOCTL_IO_CMD: u32 = 0xC048_4E43;
    let logical = attribute(namespace, "queue/logical_block_size")?;
    let first = block * 4096 / logical;
    let file = File::options().read(true).write(true).open(namespace)?;
    let mut command = Passthrough {
        opcode: 1,
        nsid: 1,
        addr: data.as_mut_ptr() as u64,
        data_len: data.len() as u32,
        cdw10: first as u32,
        cdw11: (first >> 32) as u32,
        // Count of logical blocks, from 0.
        cdw12: (data.len() as u64 / logical) as u32 - 1,
        ..Passthrough::default()
    };
    // SAFETY: the command is of the size in the request's number; its data outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_IO_CMD as libc::Ioctl, &raw mut command) };
    if result != 0 {
        // SAFETY: the C library's text for the last error, copied at once.
        let text = unsafe { CStr::from_ptr(libc::strerror(*libc::__errno_location())) };
        bail!("the passthrough write failed: {result}, {}", text.to_string_lossy());
    }
    Ok(())
}
