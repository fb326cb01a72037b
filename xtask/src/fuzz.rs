//! `cargo xtask fuzz`: libFuzzer on every decoder, one after the other. Its first build takes minutes, so `.ci/run` does
//! without: the tests of `crates/fuzz` try the same decoders for a moment each, without instrumentation.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::test::cargo_for_host;
use crate::{sh, workspace};

/// More memory than this for one input is a finding.
const MEMORY_MIB_MAX: u32 = 2048;
/// Longer than this for one input likewise.
const INPUT_SECONDS_MAX: u32 = 10;

/// Runs each target, or one, for so many seconds.
pub fn fuzz(seconds: u64, only: Option<&str>) -> Result<()> {
    let dir = workspace::root().join("fuzz");
    let mut targets: Vec<String> = fs::read_dir(dir.join("fuzz_targets"))?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .filter(|name| only.is_none_or(|only| only == name))
        .collect();
    targets.sort();
    if targets.is_empty() {
        bail!("there is no fuzz target `{}`", only.unwrap_or_default());
    }
    install()?;
    sh::step("seeds");
    let seeds = ["run", "--quiet", "--package", "highwater-fuzz", "--example", "seeds", "--"];
    sh::run(cargo_for_host().args(seeds).arg(dir.join("corpus")))?;
    sh::step("build the fuzz targets");
    sh::run(cargo_fuzz()?.arg("build").args(only))?;
    let mut failed = Vec::new();
    for target in targets {
        sh::step(format_args!("fuzz {target} for {seconds} s"));
        let mut run = cargo_fuzz()?;
        run.args(["run", &target, "--", "-print_final_stats=0", "-verbosity=0"]);
        run.arg(format!("-max_total_time={seconds}")).arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"));
        run.arg(format!("-timeout={INPUT_SECONDS_MAX}"));
        if sh::run(&mut run).is_err() {
            failed.push(target);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("findings in {}; the inputs are in fuzz/artifacts", failed.join(", "))
}

fn cargo_fuzz() -> Result<Command> {
    let program = workspace::find_program("cargo-fuzz").context("cargo-fuzz is not installed")?;
    let mut command = Command::new(program);
    // The coverage flags of libFuzzer are nightly's; the stable compiler has them too.
    command.current_dir(workspace::root()).env("RUSTC_BOOTSTRAP", "1");
    Ok(command)
}

fn install() -> Result<()> {
    if workspace::find_program("cargo-fuzz").is_some() {
        return Ok(());
    }
    sh::step("install cargo-fuzz");
    sh::run(cargo_for_host().args(["install", "--quiet", "--locked", "cargo-fuzz"]))
}
