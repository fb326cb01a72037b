//! `cargo xtask check`: what must hold for every commit beside the tests. All checks run; all failures are told.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::setup::{self, Purpose};
use crate::test::cargo_for_host;
use crate::{ebpf, sh, workspace};

type Check = fn() -> Result<Verdict>;

const CHECKS: [(&str, Check); 7] = [
    ("fmt", fmt),
    ("fmt-ebpf", fmt_ebpf),
    ("clippy", clippy),
    ("doc", doc),
    ("deny", deny),
    ("units", units),
    ("hooks", hooks),
];

enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Runs the checks named, or all.
pub fn check(only: &[String]) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| !CHECKS.iter().any(|(known, _)| known == name)) {
        let known: Vec<&str> = CHECKS.iter().map(|(name, _)| *name).collect();
        bail!("there is no check `{unknown}`; there are {}", known.join(", "));
    }
    setup::setup(Purpose::Build)?;
    ebpf::build()?;
    let mut failed = Vec::new();
    let mut report = Vec::new();
    for (name, check) in
        CHECKS.into_iter().filter(|(name, _)| only.is_empty() || only.iter().any(|o| o == name))
    {
        sh::step(format_args!("check {name}"));
        let verdict = check().unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")));
        report.push(match verdict {
            Verdict::Passed => format!("  {name}: passed"),
            Verdict::Skipped(why) => format!("  {name}: SKIPPED, {why}"),
            Verdict::Failed(why) => {
                failed.push(name);
                format!("  {name}: FAILED, {why}")
            }
        });
    }
    println!("checks:\n{}", report.join("\n"));
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn fmt() -> Result<Verdict> {
    sh::run(cargo_for_host().args(["fmt", "--all", "--check"]))?;
    Ok(Verdict::Passed)
}

fn fmt_ebpf() -> Result<Verdict> {
    sh::run(cargo_for_host().current_dir(workspace::root().join("agent-ebpf")).args(["fmt", "--check"]))?;
    Ok(Verdict::Passed)
}

fn clippy() -> Result<Verdict> {
    sh::run(cargo_for_host().args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(Verdict::Passed)
}

fn doc() -> Result<Verdict> {
    let mut cargo = cargo_for_host();
    cargo.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    sh::run(cargo.env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(Verdict::Passed)
}

/// Licences, bans and sources always; advisories where their database can be had.
fn deny() -> Result<Verdict> {
    let Some(deny) = workspace::find_program("cargo-deny") else {
        return Ok(Verdict::Skipped(
            "cargo-deny is not installed (cargo xtask setup --for check)".to_owned(),
        ));
    };
    let deny = |words: &[&str]| {
        let mut command = Command::new(&deny);
        command.current_dir(workspace::root()).args(["--log-level", "warn"]).args(words);
        command
    };
    sh::run(&mut deny(&["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]))?;
    if !sh::succeeds(&mut deny(&["fetch", "db"])) {
        let why = "only its advisories: their database cannot be fetched; licences, bans and sources passed";
        return Ok(Verdict::Skipped(why.to_owned()));
    }
    sh::run(&mut deny(&["check", "--hide-inclusion-graph", "advisories"]))?;
    Ok(Verdict::Passed)
}

/// What is said of scripts that run as root on other people's machines.
fn hooks() -> Result<Verdict> {
    let Some(shellcheck) = workspace::find_program("shellcheck") else {
        return Ok(Verdict::Skipped(
            "shellcheck is not installed (cargo xtask setup --for check)".to_owned(),
        ));
    };
    let mut command = Command::new(shellcheck);
    command.args(["--shell", "sh"]);
    for entry in fs::read_dir(workspace::root().join("packaging/hooks"))? {
        command.arg(entry?.path());
    }
    sh::run(&mut command)?;
    Ok(Verdict::Passed)
}

/// systemd's own opinion of our units, on copies whose programs exist.
fn units() -> Result<Verdict> {
    let Some(analyze) = workspace::find_program("systemd-analyze") else {
        return Ok(Verdict::Skipped("systemd-analyze is not installed".to_owned()));
    };
    let scratch = workspace::target_dir().join("units");
    fs::create_dir_all(&scratch)?;
    let mut copies: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(workspace::root().join("packaging/systemd"))? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        // Verification wants each program to be there, and ours are not installed; nothing else is changed.
        let unit = fs::read_to_string(&path)?.replace("/usr/bin/highwater-", "/bin/true ");
        let copy = scratch.join(name);
        fs::write(&copy, unit)?;
        copies.push(copy);
    }
    let output = Command::new(analyze).arg("verify").arg("--man=no").args(&copies).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    // Other units of the machine are none of our business.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("highwater")).collect();
    if !ours.is_empty() {
        return Ok(Verdict::Failed(ours.join("; ")));
    }
    if !output.status.success() && said.trim().is_empty() {
        return Ok(Verdict::Failed(format!("systemd-analyze ended with {}", output.status)));
    }
    Ok(Verdict::Passed)
}
