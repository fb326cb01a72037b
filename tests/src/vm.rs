//! A virtual machine: a stock kernel under QEMU whose disk is a block device of this machine, with QEMU's own guest agent in it, and a writer
//! that tells what is safe.
//!
//! Kernel and base file system are those that `cargo xtask kernels fetch` makes below `target/kernels`; the agent is taken from PATH or
//! `target/tools/bin`. It is emulated, never virtualized: see `xtask/src/kernels`.

use crate::{command, daemon::Daemon};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The kernel that is booted.
pub const KERNEL: &str = "6.12";
const APPEND: &str = "console=ttyS0 panic=-1 quiet mitigations=off tsc=reliable no_timer_check cryptomgr.notests \
    random.trust_cpu=on nowatchdog oops=panic";
/// From power on to the first file that is safe; emulated, on a machine that has other things to do.
const BOOT_MAX: Duration = Duration::from_secs(120);
const BOOTS_MAX: u32 = 3;
/// What the base file system says when the kernel is up; before that, an end is the emulator's (see `xtask/src/kernels/boot.rs`).
const UP: &str = "GUEST-INIT";

/// Mounts its disk, starts the agent, writes files, each with its number in it, and says of each when it is safe.
const SCRIPT: &str = r#"
mkdir -p /data /var/run /var/lock
modprobe ext4; modprobe virtio_console
mount -t ext4 /dev/vda /data || exit 9
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" = org.qemu.guest_agent.0 ] && node=/dev/${port##*/}
done
/sbin/qemu-ga -m virtio-serial -p $node -t /run > /run/qga.log 2>&1 &
agent=$!
if [ "$1" = deaf ]; then kill -STOP $agent; fi
n=0
while :; do
    n=$((n + 1))
    echo "file $n" > /data/$n
    dd if=/dev/urandom of=/data/$n bs=4k count=3 seek=1 conv=fsync,notrunc 2> /dev/null && echo "safe $n"
done
"#;

/// What may be chosen of it.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// QEMU's cache mode.
    pub cache: &'static str,
    /// The agent in it does not hear.
    pub deaf: bool,
}

impl Default for VmOptions {
    fn default() -> Self {
        Self { cache: "none", deaf: false }
    }
}

/// See the module. Dropped: powered off, as by a pulled plug.
pub struct Vm {
    qemu: Daemon,
    dir: PathBuf,
}

impl Vm {
    /// Boots one on an ext4 file system, which is made on the device; its writer writes on return.
    pub fn boot(dir: &Path, device: &Path, options: &VmOptions) -> Result<Self> {
        command::run("mkfs.ext4", &["-q", "-F", &device.to_string_lossy()])?;
        let dir = dir.join("vm");
        fs::create_dir_all(&dir)?;
        let initrd = write_initrd(&dir, options.deaf)?;
        let mut left = BOOTS_MAX;
        loop {
            left -= 1;
            for file in ["console", "said"] {
                fs::write(dir.join(file), "")?;
            }
            let mut vm = Self { qemu: start(&dir, device, &initrd, options)?, dir: dir.clone() };
            let until = Instant::now() + BOOT_MAX;
            loop {
                if vm.safe()? > 0 {
                    return Ok(vm);
                }
                if vm.qemu.is_running()? && Instant::now() < until {
                    thread::sleep(Duration::from_millis(50));
                    continue;
                }
                let console = String::from_utf8_lossy(&fs::read(dir.join("console"))?).into_owned();
                ensure!(
                    left > 0 && !console.contains(UP),
                    "the guest did not start:\n{console}\n{}",
                    vm.said()?
                );
                vm.qemu.kill_9()?;
                break;
            }
        }
    }

    /// The host's end of the channel to its agent.
    pub fn agent_socket(dir: &Path) -> PathBuf {
        dir.join("vm/qga")
    }

    /// The last file that is safe.
    pub fn safe(&self) -> Result<u64> {
        let said = self.said()?;
        // The last line may not be all there yet.
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut numbers =
            whole.lines().rev().filter_map(|line| line.trim().strip_prefix("safe ")?.parse().ok());
        Ok(numbers.next().unwrap_or(0))
    }

    /// Waits until so many more are safe; answers how long it took.
    pub fn wait_more(&self, more: u64, limit: Duration) -> Result<Duration> {
        let (before, began) = (self.safe()?, Instant::now());
        while self.safe()? < before + more {
            ensure!(
                began.elapsed() < limit,
                "the guest does not go on: {} of {before} + {more} after {limit:?}",
                self.safe()?
            );
            thread::sleep(Duration::from_millis(5));
        }
        Ok(began.elapsed())
    }

    fn said(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.dir.join("said"))?).into_owned())
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.qemu.pid()
    }

    /// Pulls the plug.
    pub fn power_off(mut self) -> Result<()> {
        self.qemu.kill_9()
    }
}

/// Files in the root of an image that begin as the writer makes them, with no gap from 1 on: how many.
pub fn files_in(dir: &Path) -> Result<u64> {
    let mut number = 0;
    while let Ok(content) = fs::read(dir.join((number + 1).to_string())) {
        number += 1;
        let begin = format!("file {number}\n");
        if !content.starts_with(begin.as_bytes()) || content.len() != 4 * 4096 {
            return Ok(number - 1);
        }
    }
    Ok(number)
}

fn start(dir: &Path, device: &Path, initrd: &Path, options: &VmOptions) -> Result<Daemon> {
    let mut qemu = Command::new(command::find("qemu-system-x86_64"));
    qemu.args([
        "-name",
        "hwtest-guest",
        "-M",
        "pc",
        "-accel",
        "tcg,thread=multi,tb-size=128",
        "-cpu",
        "max,-cx16",
    ]);
    qemu.args(["-smp", "1", "-m", "512", "-nodefaults", "-display", "none", "-no-reboot", "-append", APPEND]);
    qemu.arg("-kernel").arg(kernel_dir()?.join("vmlinux")).arg("-initrd").arg(initrd);
    let (device, cache) = (device.display(), options.cache);
    qemu.arg("-drive").arg(format!("file={device},if=none,id=d0,format=raw,cache={cache}"));
    qemu.args(["-device", "virtio-blk-pci,drive=d0", "-device", "virtio-serial-pci"]);
    let socket = dir.join("qga");
    qemu.arg("-chardev").arg(format!("socket,id=qga0,path={},server=on,wait=off", socket.display()));
    qemu.args(["-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"]);
    qemu.arg("-serial").arg(format!("file:{}", dir.join("console").display()));
    qemu.arg("-serial").arg(format!("file:{}", dir.join("said").display()));
    Daemon::spawn("qemu", dir, qemu)
}

/// The base archive, and one with the script and the agent behind it.
fn write_initrd(dir: &Path, deaf: bool) -> Result<PathBuf> {
    let root = dir.join("root");
    fs::create_dir_all(root.join("sbin"))?;
    let agent = find_agent()?;
    fs::copy(&agent, root.join("sbin/qemu-ga"))?;
    let linked = command::run("ldd", &[&agent.to_string_lossy().into_owned()])?;
    for library in linked.lines().filter_map(library) {
        let to = root.join(library.strip_prefix("/")?);
        fs::create_dir_all(to.parent().context("a file lies in a directory")?)?;
        fs::copy(&library, to).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    fs::write(root.join("guest.sh"), SCRIPT)?;
    fs::write(root.join("test.sh"), if deaf { "exec sh /guest.sh deaf\n" } else { "exec sh /guest.sh\n" })?;
    fs::write(root.join("test.disks"), "1")?;
    let path = dir.join("initrd");
    let mut archive = File::create(&path)?;
    let base = kernel_dir()?.join("initrd.cpio");
    io::copy(
        &mut File::open(&base).with_context(|| format!("cannot open {}", base.display()))?,
        &mut archive,
    )?;
    archive.flush()?;
    let pack = "find . | busybox cpio -o -H newc";
    let mut packed = Command::new("sh");
    packed.args(["-c", pack]).current_dir(&root).stdin(Stdio::null()).stdout(archive).stderr(Stdio::null());
    ensure!(packed.status()?.success(), "busybox could not pack the guest's files");
    Ok(path)
}

/// The file that a line of `ldd` names.
fn library(line: &str) -> Option<PathBuf> {
    let path = line.split_once("=>").map_or(line, |(_, path)| path).split_whitespace().next()?;
    path.starts_with('/').then(|| path.into())
}

/// `target`, wherever it is.
fn target_dir() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/debug/deps/test-…
    Ok(test.ancestors().nth(3).context("a test lies in target")?.to_owned())
}

fn kernel_dir() -> Result<PathBuf> {
    let dir = target_dir()?.join("kernels").join(KERNEL);
    if !dir.join("vmlinux").is_file() {
        bail!("there is no kernel to boot: use cargo xtask test, or cargo xtask kernels fetch {KERNEL}");
    }
    Ok(dir)
}

fn find_agent() -> Result<PathBuf> {
    let installed = command::find("qemu-ga");
    let unpacked = target_dir()?.join("tools/bin/qemu-ga");
    let found = [installed, unpacked].into_iter().find(|path| path.is_absolute() && path.is_file());
    found.context("there is no qemu-ga: use cargo xtask test, or cargo xtask setup --for test")
}
