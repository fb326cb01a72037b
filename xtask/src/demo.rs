//! `cargo xtask demo` and `cargo xtask bench`: everything prepared, then one program of the tests package.

use std::process::Command;

use anyhow::{Result, bail};

use crate::setup::{self, Purpose};
use crate::test::cargo_for_host;
use crate::{ebpf, sh};

/// Shows a disk being protected, destroyed and recovered.
pub fn demo(args: &[String]) -> Result<()> {
    prepare(Purpose::Demo, "the demo")?;
    sh::run(&mut program("highwater-demo", &[], args))
}

/// Measures tracking or replication. The subject must be one the program knows.
pub fn bench(subject: &str, args: &[String]) -> Result<()> {
    prepare(Purpose::Bench, "the benchmark")?;
    sh::run(&mut program("highwater-bench", &[subject], args))
}

fn prepare(purpose: Purpose, what: &str) -> Result<()> {
    if !setup::is_root() {
        bail!("{what} makes disks and loads eBPF programs: run it as root");
    }
    setup::setup(purpose)?;
    ebpf::build()?;
    sh::step("building");
    // The daemons are started by the program, so they must be there before it.
    sh::run(cargo_for_host().args(["build", "--quiet", "--workspace", "--bins"]))
}

fn program(name: &str, first: &[&str], args: &[String]) -> Command {
    let mut cargo = cargo_for_host();
    cargo
        .args(["run", "--quiet", "--package", "highwater-tests", "--bin", name, "--"])
        .args(first)
        .args(args);
    cargo
}
