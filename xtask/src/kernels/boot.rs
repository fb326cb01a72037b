//! One run of a guest: its disks, its program, QEMU under a deadline, and what came out.
//!
//! The guest's exit code arrives through `isa-debug-exit`, its output through the second serial port; the first is
//! the kernel's console. All three files stay in the kernel's directory until the next run.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Kernel, cpio};
use crate::sh;
use crate::workspace;

/// Grace periods are expedited: under emulation an ordinary one takes a second of a loaded guest.
const APPEND: &str = "console=ttyS0 panic=-1 quiet mitigations=off tsc=reliable no_timer_check cryptomgr.notests \
    random.trust_cpu=on nowatchdog oops=panic rcupdate.rcu_expedited=1";
const DISK_SYNTAX: &str = "virtio:MIB[:QUEUES[:ext4]] or nvme:MIB[:QUEUES[:ext4]]";
const BOOT_TRIES_MAX: u32 = 3;
/// What `init.sh` says once the kernel is up; before it, a failure is the emulator's.
const UP: &str = "GUEST-INIT";
/// The program ended; what follows is the machine going down.
const EXIT: &str = "GUEST-EXIT";

/// A disk of the guest, made anew for every run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The kind of controller.
    pub kind: DiskKind,
    /// Size in MiB.
    pub size_mib: u64,
    /// Hardware queues.
    pub queues: u32,
    /// Made by the host before the guest starts.
    pub content: DiskContent,
}

/// What a guest's disk holds at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskContent {
    /// Zeros.
    Empty,
    /// An empty ext4 file system.
    Ext4,
}

/// Controllers a guest's disk can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskKind {
    /// `/dev/vdX`, completed in softirq or task context.
    Virtio,
    /// `/dev/nvmeXn1`, completed in hard interrupts when it has several queues.
    Nvme,
}

impl FromStr for Disk {
    type Err = anyhow::Error;

    /// `virtio:256`, `nvme:256:4` or `virtio:64:1:ext4`: kind, MiB, queues, content.
    fn from_str(text: &str) -> Result<Disk> {
        let mut parts = text.split(':');
        let kind = match parts.next() {
            Some("virtio") => DiskKind::Virtio,
            Some("nvme") => DiskKind::Nvme,
            _ => bail!("a disk is {DISK_SYNTAX}, not `{text}`"),
        };
        let size_mib = parts.next().context("a disk needs a size in MiB, like virtio:256")?.parse()?;
        let queues = parts.next().map_or(Ok(1), str::parse)?;
        let content = match parts.next() {
            None => DiskContent::Empty,
            Some("ext4") => DiskContent::Ext4,
            Some(_) => bail!("a disk is {DISK_SYNTAX}, not `{text}`"),
        };
        if parts.next().is_some() || size_mib == 0 || queues == 0 {
            bail!("a disk is {DISK_SYNTAX}, not `{text}`");
        }
        Ok(Disk { kind, size_mib, queues, content })
    }
}

/// What to run in a guest, and in what machine.
pub struct Guest {
    /// The static program.
    pub payload: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// A directory laid over the guest's root.
    pub overlay: Option<PathBuf>,
    /// Its disks, in order.
    pub disks: Vec<Disk>,
    /// Processors.
    pub cpus: u32,
    /// The kernel is to choose its addresses at random, as it does on machines: it unpacks itself then.
    pub kaslr: bool,
    /// Memory in MiB; the file system of the guest lives in it too.
    pub memory_mib: u32,
    /// How long it may take.
    pub timeout: Duration,
}

/// How a run ended.
pub struct Outcome {
    /// The program's exit code; none if the guest never got to tell.
    pub exit_code: Option<u8>,
    /// The program's output, both streams.
    pub output: String,
    /// Whether the deadline passed.
    pub timed_out: bool,
    /// Seconds from power on to the program's start, by the guest's clock.
    pub boot_s: Option<f64>,
}

impl Outcome {
    /// One phrase for a report.
    pub fn verdict(&self) -> String {
        let boot = self.boot_s.map_or(String::new(), |seconds| format!(", up in {seconds:.1} s"));
        match self.exit_code {
            Some(0) => format!("passed{boot}"),
            Some(code) => format!("FAILED with exit code {code}{boot}"),
            None if self.timed_out => format!("TIMED OUT{boot}"),
            None => format!("DIED without an exit code{boot}"),
        }
    }
}

/// Runs the guest on a kernel. A crash of the emulated machine before its first process is the emulator's (it patches running
/// code under several processors, and gets that wrong in one boot of ten), and is tried again.
pub fn boot(kernel: &Kernel, guest: &Guest) -> Result<Outcome> {
    let initrd = write_initrd(kernel, guest)?;
    let mut left = BOOT_TRIES_MAX;
    loop {
        let (outcome, came_up) = boot_once(kernel, guest, &initrd)?;
        left -= 1;
        if came_up || left == 0 {
            return Ok(outcome);
        }
        sh::step(format_args!(
            "kernel {} did not come up; its console is kept, trying again",
            kernel.version
        ));
        fs::rename(kernel.dir.join("console.log"), kernel.dir.join("console.first.log")).ok();
    }
}

fn boot_once(kernel: &Kernel, guest: &Guest, initrd: &Path) -> Result<(Outcome, bool)> {
    let (console, output) = (kernel.dir.join("console.log"), kernel.dir.join("test.out"));
    for file in [&console, &output] {
        fs::write(file, "")?;
    }
    let disks = make_disks(kernel, guest)?;
    let mut qemu = command(kernel, guest, initrd)?;
    add_disks(&mut qemu, guest, &disks);
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    qemu.arg("-serial").arg(format!("file:{}", output.display()));
    qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(kernel.dir.join("qemu.log"))?);
    let child = qemu.spawn().with_context(|| format!("cannot start {}", sh::describe(&qemu)))?;
    let status = Running(child).wait_until(Instant::now() + guest.timeout)?;
    for disk in &disks {
        fs::remove_file(disk).ok();
    }
    let console = read_text(&console)?;
    let outcome = Outcome {
        exit_code: status.and_then(exit_code).filter(|_| console.contains(EXIT)),
        output: read_text(&output)?,
        timed_out: status.is_none(),
        boot_s: uptime(&console, "GUEST-TEST"),
    };
    Ok((outcome, console.contains(UP)))
}

fn command(kernel: &Kernel, guest: &Guest, initrd: &Path) -> Result<Command> {
    let program = workspace::find_program("qemu-system-x86_64")
        .context("QEMU is not installed: cargo xtask setup --for kernels")?;
    let mut qemu = Command::new(program);
    // cx16 off: the emulator of QEMU 7.2 corrupts 6.12 guests with it.
    qemu.args(["-M", "pc", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,-cx16"]);
    qemu.arg("-smp").arg(guest.cpus.to_string()).arg("-m").arg(guest.memory_mib.to_string());
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    // Only the kernel's own first stage chooses addresses.
    let image = if guest.kaslr { kernel.packed()? } else { kernel.vmlinux() };
    qemu.arg("-kernel").arg(image).arg("-initrd").arg(initrd).args(["-append", APPEND]);
    Ok(qemu)
}

fn make_disks(kernel: &Kernel, guest: &Guest) -> Result<Vec<PathBuf>> {
    guest
        .disks
        .iter()
        .enumerate()
        .map(|(at, disk)| {
            let path = kernel.dir.join(format!("disk-{at}.img"));
            File::create(&path)?.set_len(disk.size_mib << 20)?;
            if disk.content == DiskContent::Ext4 {
                let mkfs = workspace::find_program("mkfs.ext4")
                    .context("mkfs.ext4 is not installed: cargo xtask setup --for kernels")?;
                sh::output(Command::new(mkfs).args(["-q", "-F"]).arg(&path))?;
            }
            Ok(path)
        })
        .collect()
}

fn add_disks(qemu: &mut Command, guest: &Guest, files: &[PathBuf]) {
    for (at, (disk, file)) in guest.disks.iter().zip(files).enumerate() {
        let file = file.display();
        qemu.arg("-drive").arg(format!("file={file},if=none,id=d{at},format=raw,cache=unsafe,discard=unmap"));
        let queues = disk.queues;
        qemu.arg("-device").arg(match disk.kind {
            DiskKind::Virtio => format!("virtio-blk-pci,drive=d{at},serial=disk{at},num-queues={queues}"),
            DiskKind::Nvme => format!("nvme,drive=d{at},serial=disk{at},max_ioqpairs={queues}"),
        });
    }
}

/// The kernel's base archive and, after it, one with this run's program and overlay.
fn write_initrd(kernel: &Kernel, guest: &Guest) -> Result<PathBuf> {
    let path = kernel.dir.join("initrd.run.cpio");
    let mut out = BufWriter::new(File::create(&path)?);
    io::copy(&mut File::open(kernel.initrd())?, &mut out)?;
    let mut archive = cpio::Archive::new(out);
    let program = fs::read(&guest.payload)
        .with_context(|| format!("cannot read the guest's program {}", guest.payload.display()))?;
    archive.file("test", 0o755, &program)?;
    let words: Vec<String> =
        std::iter::once("/test").chain(guest.args.iter().map(String::as_str)).map(quote).collect();
    archive.file("test.sh", 0o644, format!("exec {}\n", words.join(" ")).as_bytes())?;
    archive.file("test.disks", 0o644, guest.disks.len().to_string().as_bytes())?;
    if let Some(overlay) = &guest.overlay {
        archive.tree(overlay, "").with_context(|| format!("cannot add {}", overlay.display()))?;
    }
    archive.finish()?.flush()?;
    Ok(path)
}

fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A running QEMU, killed when dropped.
struct Running(Child);

impl Running {
    /// Waits for its end; none if it had to be killed.
    fn wait_until(mut self, deadline: Instant) -> Result<Option<ExitStatus>> {
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// isa-debug-exit ends QEMU with `code * 2 + 1`.
fn exit_code(status: ExitStatus) -> Option<u8> {
    let code = u8::try_from(status.code()?).ok()?;
    (code & 1 == 1).then_some(code >> 1)
}

/// The guest's uptime in a line of `init.sh`.
fn uptime(console: &str, line: &str) -> Option<f64> {
    let rest = console.split_once(line)?.1.split_once("up=")?.1;
    rest.split_whitespace().next()?.parse().ok()
}

/// A serial port's file: carriage returns out, bad bytes replaced.
fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_from_text() {
        let disk: Disk = "nvme:256:4".parse().unwrap();
        assert_eq!(
            disk,
            Disk { kind: DiskKind::Nvme, size_mib: 256, queues: 4, content: DiskContent::Empty }
        );
        let disk: Disk = "virtio:64:1:ext4".parse().unwrap();
        assert_eq!(
            disk,
            Disk { kind: DiskKind::Virtio, size_mib: 64, queues: 1, content: DiskContent::Ext4 }
        );
        assert_eq!("virtio:64".parse::<Disk>().unwrap().queues, 1);
        for bad in
            ["", "scsi:1", "virtio", "virtio:0", "nvme:1:0", "nvme:1:1:1", "nvme:1:1:ext4:1", "virtio:x"]
        {
            assert!(bad.parse::<Disk>().is_err(), "{bad}");
        }
    }

    #[test]
    fn arguments_survive_the_shell() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    #[test]
    fn the_guests_clock_is_read_from_the_console() {
        let console = "noise\nGUEST-INIT up=1.52 release=6.1\nGUEST-TEST up=2.25\n";
        assert_eq!(uptime(console, "GUEST-TEST"), Some(2.25));
        assert_eq!(uptime(console, "GUEST-EXIT"), None);
    }
}
