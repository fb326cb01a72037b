//! `cargo xtask demo` and `cargo xtask bench`: everything prepared, then one program of the tests package.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};

use crate::setup::{self, Purpose};
use crate::test::cargo_for_host;
use crate::{ebpf, sh};

/// What is measured is what is delivered.
const RELEASE: &[&str] = &["--release"];

/// Shows a disk being protected, destroyed and recovered.
pub fn demo(args: &[String]) -> Result<()> {
    prepare(Purpose::Demo, "the demo", &[])?;
    become_program("highwater-demo", &[], &[], args)
}

/// Measures tracking, capture, replication or the vault. The subject must be one the program knows.
pub fn bench(subject: &str, args: &[String]) -> Result<()> {
    prepare(Purpose::Bench, "the benchmark", RELEASE)?;
    become_program("highwater-bench", RELEASE, &[subject], args)
}

fn prepare(purpose: Purpose, what: &str, profile: &[&str]) -> Result<()> {
    if !setup::is_root() {
        bail!("{what} makes disks and loads eBPF programs: run it as root");
    }
    setup::setup(purpose)?;
    ebpf::build()?;
    sh::step("building");
    // The daemons are started by the program, so they must be there before it.
    sh::run(cargo_for_host().args(["build", "--quiet", "--workspace", "--bins"]).args(profile))
}

/// Replaces this process, so that the shell waits for the program's cleaning up after a Ctrl-C, and not only for us.
fn become_program(name: &str, profile: &[&str], first: &[&str], args: &[String]) -> Result<()> {
    let mut cargo = cargo_for_host();
    cargo.args(["run", "--quiet", "--package", "highwater-tests", "--bin", name]).args(profile);
    let error = cargo.arg("--").args(first).args(args).exec();
    Err(error).with_context(|| format!("cannot start {}", sh::describe(&cargo)))
}
