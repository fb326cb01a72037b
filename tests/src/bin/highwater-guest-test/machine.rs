//! The guest's devices: modules, zram, and what a device can do.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Loads a kernel module; one that is built in, or absent, is no error: what needs it will tell.
pub fn modprobe(name: &str) {
    let _ = Command::new("/sbin/modprobe").arg(name).status();
}

/// Keeps two probes of others on each tracepoint that programs are attached to. The kernel patches its code when the first or the
/// second probe of a tracepoint comes or goes, and the emulator now and then lets another processor run into that; with these,
/// whatever is attached and detached later patches nothing.
pub fn keep_tracepoints_busy() -> Result<()> {
    const EVENTS: [&str; 4] =
        ["block_bio_queue", "block_bio_complete", "block_rq_issue", "block_rq_complete"];
    for instance in ["first", "second"] {
        let dir = Path::new("/sys/kernel/tracing/instances").join(instance);
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        // Nothing is to be recorded.
        fs::write(dir.join("tracing_on"), "0")?;
        for event in EVENTS {
            fs::write(dir.join("events/block").join(event).join("enable"), "1")?;
        }
    }
    Ok(())
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
