//! Virtual machines of tests: a stock kernel under QEMU, a script as its first program, disks of this machine.
//!
//! Kernel and base file system are those that `cargo xtask kernels fetch` makes below `target/kernels`. They are emulated, never virtualized: see
//! `xtask/src/kernels`.

mod initrd;
pub mod protected;
pub mod writing;

use crate::{command, daemon::Daemon};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

pub use initrd::Initrd;
pub use protected::ProtectedVm;
pub use writing::{WritingOptions, WritingVm, files_in};

const APPEND: &str = "console=ttyS0 panic=-1 quiet mitigations=off tsc=reliable no_timer_check cryptomgr.notests \
    random.trust_cpu=on nowatchdog oops=panic rcupdate.rcu_expedited=1";
/// From power on to what the script says first; emulated, on a machine that has other things to do.
const BOOT_MAX: Duration = Duration::from_secs(120);
const BOOTS_MAX: u32 = 3;
/// What the base file system says when the kernel is up; before that, an end is the emulator's (see `xtask/src/kernels/boot.rs`).
const UP: &str = "GUEST-INIT";

/// What to boot.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The name of QEMU's process.
    pub name: &'a str,
    /// As `cargo xtask kernels fetch` takes it, like `6.12`.
    pub kernel: &'a str,
    /// All that it starts with.
    pub initrd: &'a Path,
    /// Memory in MiB; its root file system lies in it.
    pub memory_mib: u32,
    /// QEMU's other arguments: disks, networks.
    pub devices: Vec<String>,
}

/// A machine that runs. Dropped: powered off, as by a pulled plug.
pub struct Vm {
    qemu: Daemon,
    dir: PathBuf,
}

impl Vm {
    /// Boots one; files of it are made in the directory. What its script says is as wanted on return.
    pub fn boot(dir: &Path, machine: &Machine, is_ready: impl Fn(&str) -> bool) -> Result<Self> {
        let mut left = BOOTS_MAX;
        loop {
            left -= 1;
            for file in ["console", "said"] {
                fs::write(dir.join(file), "")?;
            }
            let mut vm = Self { qemu: start(dir, machine)?, dir: dir.to_owned() };
            let until = Instant::now() + BOOT_MAX;
            loop {
                if is_ready(&vm.said()?) {
                    return Ok(vm);
                }
                if vm.qemu.is_running()? && Instant::now() < until {
                    thread::sleep(Duration::from_millis(50));
                    continue;
                }
                let console = String::from_utf8_lossy(&fs::read(dir.join("console"))?).into_owned();
                ensure!(
                    left > 0 && !console.contains(UP),
                    "{} did not start:\n{console}\n{}\n{}",
                    machine.name,
                    vm.said()?,
                    vm.qemu.log()
                );
                vm.qemu.kill_9()?;
                break;
            }
        }
    }

    /// What its script has said. The last line may not be all there yet.
    pub fn said(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.dir.join("said"))?).replace('\r', ""))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.qemu.pid()
    }

    /// Pulls the plug.
    pub fn power_off(mut self) -> Result<()> {
        self.qemu.kill_9()
    }
}

fn start(dir: &Path, machine: &Machine) -> Result<Daemon> {
    let mut qemu = Command::new(command::find("qemu-system-x86_64"));
    qemu.args(["-name", machine.name, "-M", "pc", "-accel", "tcg,thread=multi,tb-size=128"]);
    // cx16 off: the emulator of QEMU 7.2 corrupts 6.12 guests with it.
    qemu.args(["-cpu", "max,-cx16", "-smp", "1", "-m", &machine.memory_mib.to_string()]);
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot", "-append", APPEND]);
    let kernel = kernel_dir(machine.kernel)?.join("vmlinux");
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(machine.initrd);
    qemu.args(&machine.devices);
    qemu.arg("-serial").arg(format!("file:{}", dir.join("console").display()));
    qemu.arg("-serial").arg(format!("file:{}", dir.join("said").display()));
    Daemon::spawn("qemu", dir, qemu)
}

/// `target`, wherever it is.
fn target_dir() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/debug/deps/test-…
    Ok(test.ancestors().nth(3).context("a test lies in target")?.to_owned())
}

fn kernel_dir(version: &str) -> Result<PathBuf> {
    let dir = target_dir()?.join("kernels").join(version);
    ensure!(
        dir.join("vmlinux").is_file(),
        "there is no kernel to boot: use cargo xtask test, or cargo xtask kernels fetch {version}"
    );
    Ok(dir)
}
