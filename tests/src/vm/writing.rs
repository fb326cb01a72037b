//! A virtual machine with nothing of ours in it: its disk is a block device of this machine, QEMU's own guest agent runs in it, and a writer that
//! tells what is safe.
//!
//! The guest agent is taken from PATH or `target/tools/bin`.

use super::{Initrd, Machine, Vm, target_dir};
use crate::command;
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// The kernel that is booted.
const KERNEL: &str = "6.12";

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
pub struct WritingOptions {
    /// QEMU's cache mode.
    pub cache: &'static str,
    /// The agent in it does not hear.
    pub deaf: bool,
}

impl Default for WritingOptions {
    fn default() -> Self {
        Self { cache: "none", deaf: false }
    }
}

/// See the module. Dropped: powered off, as by a pulled plug.
pub struct WritingVm(Vm);

impl WritingVm {
    /// Boots one on an ext4 file system, which is made on the device; its writer writes on return.
    pub fn boot(dir: &Path, device: &Path, options: &WritingOptions) -> Result<Self> {
        command::run("mkfs.ext4", &["-q", "-F", &device.to_string_lossy()])?;
        let dir = dir.join("vm");
        fs::create_dir_all(&dir)?;
        let script = Initrd::new(&dir, SCRIPT, if options.deaf { &["deaf"] } else { &[] })?;
        script.add_program(&find_agent()?, "qemu-ga")?;
        let initrd = script.pack(KERNEL, 1)?;
        let (device, cache, socket) = (device.display(), options.cache, dir.join("qga"));
        let devices = [
            "-drive",
            &format!("file={device},if=none,id=d0,format=raw,cache={cache}"),
            "-device",
            "virtio-blk-pci,drive=d0",
            "-device",
            "virtio-serial-pci",
            "-chardev",
            &format!("socket,id=qga0,path={},server=on,wait=off", socket.display()),
            "-device",
            "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        ];
        let machine = Machine {
            name: "hwtest-guest",
            kernel: KERNEL,
            initrd: &initrd,
            memory_mib: 512,
            devices: devices.map(str::to_owned).to_vec(),
        };
        Vm::boot(&dir, &machine, |said| last_safe(said) > 0).map(Self)
    }

    /// The last file that is safe.
    pub fn safe(&self) -> Result<u64> {
        Ok(last_safe(&self.0.said()?))
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

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.0.pid()
    }

    /// Pulls the plug.
    pub fn power_off(self) -> Result<()> {
        self.0.power_off()
    }
}

fn last_safe(said: &str) -> u64 {
    // The last line may not be all there yet.
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut numbers = whole.lines().rev().filter_map(|line| line.trim().strip_prefix("safe ")?.parse().ok());
    numbers.next().unwrap_or(0)
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

fn find_agent() -> Result<PathBuf> {
    let installed = command::find("qemu-ga");
    let unpacked = target_dir()?.join("tools/bin/qemu-ga");
    let found = [installed, unpacked].into_iter().find(|path| path.is_absolute() && path.is_file());
    found.context("there is no qemu-ga: use cargo xtask test, or cargo xtask setup --for test")
}
