//! `cargo xtask test`: unit tests first, then the end-to-end package, then kernels if asked; the cheap and the
//! pure fail before the slow and the real.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::kernels::{self, Disk, Guest};
use crate::setup::{self, Purpose};
use crate::{ebpf, sh, workspace};

/// The package of the end-to-end tests.
const END_TO_END: &str = "highwater-tests";
/// The program run in guests.
const GUEST_TEST: &str = "highwater-guest-test";
/// The kernels of virtual machines that are protected, from their host and from within (`tests/src/vm`).
const VM_KERNELS: [&str; 3] = ["6.1", "6.12", "7"];
/// Disks of the guest tests, as the program expects them: completions in softirq (one queue) and in hard interrupts
/// together, one disk to lay device-mapper over, one with a file system, one with several queues without, one for LVM, one whose
/// writes are logged, one for their log.
const GUEST_DISKS: [&str; 8] = [
    "virtio:128",
    "virtio:64",
    "virtio:64:4:ext4",
    "virtio:32:4",
    "virtio:64:4",
    "virtio:16:4",
    "virtio:256",
    "nvme:128:4",
];
/// Memory that it needs.
pub const GUEST_MEMORY_MIB: u32 = 1536;
const GUEST_TIMEOUT: Duration = Duration::from_secs(480);
/// Its arguments that leave out all but capture.
const ONLY_CAPTURE: [&str; 4] = ["0", "0", "0", "8"];

/// Runs the tests whose name contains the filter; kernels only if versions are given (empty: the usual ones).
pub fn test(filter: Option<&str>, kernels: Option<&[String]>) -> Result<()> {
    setup::setup(Purpose::Test)?;
    ebpf::build()?;
    let filters: Vec<&str> = filter.into_iter().collect();
    sh::step("unit tests");
    run_tests(&["--workspace", "--exclude", END_TO_END], &filters)?;
    if !setup::is_root() {
        bail!(
            "the unit tests passed; the end-to-end tests make devices and load eBPF, run this again as root"
        );
    }
    sh::step("end-to-end tests");
    // The tests start the daemons as programs, which testing the tests alone would not build.
    sh::run(cargo_for_host().args(["build", "--workspace", "--bins"]))?;
    kernels::fetch(&VM_KERNELS.map(str::to_owned))?;
    run_tests(&["--package", END_TO_END], &filters)?;
    if let Some(versions) = kernels {
        test_kernels(versions)?;
    }
    Ok(())
}

fn run_tests(selection: &[&str], filters: &[&str]) -> Result<()> {
    let mut cargo = cargo_for_host();
    cargo.arg("test").args(selection).arg("--").args(filters);
    sh::run(&mut cargo)
}

/// A cargo whose programs find the tools that were unpacked and not installed.
pub fn cargo_for_host() -> Command {
    let mut cargo = Command::new(workspace::cargo());
    cargo.current_dir(workspace::root());
    let path = std::env::var("PATH").unwrap_or_default();
    cargo.env("PATH", format!("{path}:/usr/sbin:/sbin:{}", setup::tools_dir().display()));
    cargo
}

/// Builds the guest's program statically and runs it on each kernel; its part about capture once more where addresses are chosen
/// at random, on the last of them.
pub fn test_kernels(versions: &[String]) -> Result<()> {
    setup::setup(Purpose::Kernels)?;
    let payload = build_guest_test()?;
    let kernels = kernels::fetch(&kernels::versions_or_default(versions)?)?;
    let guest = Guest {
        payload,
        args: Vec::new(),
        overlay: None,
        disks: guest_disks()?,
        cpus: 4,
        kaslr: false,
        memory_mib: GUEST_MEMORY_MIB,
        timeout: GUEST_TIMEOUT,
    };
    kernels::run(&kernels, &guest)?;
    let args = ONLY_CAPTURE.map(str::to_owned).to_vec();
    kernels::run(&kernels[kernels.len().saturating_sub(1)..], &Guest { args, kaslr: true, ..guest })
}

/// The disks that the guest's program expects.
pub fn guest_disks() -> Result<Vec<Disk>> {
    GUEST_DISKS.iter().map(|text| text.parse()).collect()
}

/// The program for guests, linked statically. Only its own link is: whatever it is made of is compiled as for the host, and
/// shared with it.
pub fn build_guest_test() -> Result<PathBuf> {
    ebpf::build()?;
    let mut cargo = cargo_for_host();
    cargo.args(["rustc", "--quiet", "--package", END_TO_END, "--bin", GUEST_TEST]);
    cargo.args(["--", "-Ctarget-feature=+crt-static"]);
    sh::run(&mut cargo).context("the guest's test program did not build")?;
    // Any other build of the workspace would replace it by one that is not static.
    let built = workspace::target_dir().join("debug").join(GUEST_TEST);
    let kept = workspace::target_dir().join("kernels").join(GUEST_TEST);
    fs::create_dir_all(workspace::target_dir().join("kernels"))?;
    fs::copy(&built, &kept).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(kept)
}
