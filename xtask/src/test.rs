//! `cargo xtask test`: unit tests first, then the end-to-end package, then kernels if asked; the cheap and the
//! pure fail before the slow and the real.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::kernels::{self, Guest};
use crate::setup::{self, Purpose};
use crate::{ebpf, sh, workspace};

/// The package of the end-to-end tests.
const END_TO_END: &str = "highwater-tests";
/// The program run in guests.
const GUEST_TEST: &str = "highwater-guest-test";
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";
/// Disks of the guest tests: both kinds of completion context together.
const GUEST_DISKS: [&str; 3] = ["virtio:256", "virtio:256:4", "nvme:256:4"];
const GUEST_TIMEOUT: Duration = Duration::from_secs(300);

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

/// Builds the guest's program statically and runs it on each kernel.
pub fn test_kernels(versions: &[String]) -> Result<()> {
    setup::setup(Purpose::Kernels)?;
    let payload = build_guest_test()?;
    let kernels = kernels::fetch(&kernels::versions_or_default(versions)?)?;
    let disks = GUEST_DISKS.iter().map(|text| text.parse()).collect::<Result<_>>()?;
    let guest = Guest {
        payload,
        args: Vec::new(),
        overlay: None,
        disks,
        cpus: 4,
        memory_mib: 1536,
        timeout: GUEST_TIMEOUT,
    };
    kernels::run(&kernels, &guest)
}

/// The static program for guests; `--target` keeps its flags off build scripts and macros.
pub fn build_guest_test() -> Result<std::path::PathBuf> {
    let mut cargo = cargo_for_host();
    cargo.args(["build", "--package", END_TO_END, "--bin", GUEST_TEST, "--target", GUEST_TARGET]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    sh::run(&mut cargo).context("the guest's test program did not build")?;
    Ok(workspace::target_dir().join(GUEST_TARGET).join("debug").join(GUEST_TEST))
}
