//! Installs what is missing, and only that; quick when nothing is.
//!
//! A need is met by a program or a file, whoever brought it; only what is not met is installed. On Debian as root
//! with apt and cargo; elsewhere setup changes nothing and says exactly what to install.

mod apt;
mod azurite;
mod mounts;
mod needs;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::ebpf;
use crate::sh;
use crate::workspace;

pub use needs::Purpose;

/// The linker's version; it is built for the LLVM of the compiler that was found.
const BPF_LINKER_VERSION: &str = "0.13.0";
const CARGO_DENY_VERSION: &str = "0.20.2";

/// Makes the machine ready for a purpose.
pub fn setup(purpose: Purpose) -> Result<()> {
    let missing: Vec<&str> =
        needs::packages(purpose).iter().filter(|n| !n.is_met()).map(|n| n.package).collect();
    let compiler_missing = ebpf::find_toolchain().is_none();
    if !missing.is_empty() || compiler_missing {
        require_debian_root(&missing, compiler_missing)?;
    }
    if compiler_missing {
        apt::install(&apt::compiler_packages()?)?;
    }
    if !missing.is_empty() {
        apt::install(&missing.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
    }
    if ebpf::find_linker().is_none() {
        install_linker()?;
    }
    if purpose.uses_promtool() && promtool().is_none() {
        fetch_promtool()?;
    }
    if purpose.uses_guest_agent()
        && workspace::find_program("qemu-ga").is_none()
        && !tools_dir().join("qemu-ga").is_file()
    {
        // Not installed: this machine is no guest, and its service has nothing to do here. Its libraries are QEMU's.
        apt::unpack_program("qemu-guest-agent", "usr/sbin/qemu-ga", &tools_dir())?;
    }
    if purpose.uses_azurite() {
        azurite::install_if_missing()?;
    }
    if purpose == Purpose::Check && workspace::find_program("cargo-deny").is_none() {
        install_deny()?;
    }
    if purpose.runs_programs() {
        mounts::mount_missing()?;
    }
    Ok(())
}

/// Whether this process may do what needs root.
pub fn is_root() -> bool {
    sh::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

fn require_debian_root(missing: &[&str], compiler_missing: bool) -> Result<()> {
    if is_root() && apt::is_there() {
        return Ok(());
    }
    let mut todo = String::new();
    if apt::is_there() {
        todo.push_str("run this again as root, or install by hand:");
        if compiler_missing {
            todo.push_str("\n  apt-get install --no-install-recommends ");
            todo.push_str(&apt::COMPILER_PACKAGES.join(" "));
        }
        if !missing.is_empty() {
            todo.push_str("\n  apt-get install --no-install-recommends ");
            todo.push_str(&missing.join(" "));
        }
    } else {
        todo.push_str("this is not Debian, so install by your own means:");
        if compiler_missing {
            todo.push_str("\n  rustup toolchain install nightly --component rust-src");
        }
        for name in missing {
            todo.push_str(&format!("\n  what Debian calls {name}"));
        }
    }
    bail!("tools are missing and cannot be installed from here: {todo}")
}

/// Builds bpf-linker from its published source against the compiler's own LLVM, so that it reads its bitcode.
fn install_linker() -> Result<()> {
    let Some(toolchain) = ebpf::find_toolchain() else {
        bail!("no compiler for eBPF to build the linker for")
    };
    let llvm = toolchain.llvm_major()?;
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("bin/llvm-config").is_file() {
        let package = format!("llvm-{llvm}-dev");
        if !(is_root() && apt::is_there()) {
            bail!(
                "bpf-linker is missing and needs LLVM {llvm} to be built. Install {package} (Debian's name), or install \
                 bpf-linker by its README, then run this again"
            );
        }
        apt::install(&[package])?;
    }
    sh::step(format_args!("building bpf-linker {BPF_LINKER_VERSION} for LLVM {llvm} (about a minute)"));
    let mut cargo = Command::new(workspace::cargo());
    // Outside the workspace, whose .cargo/config.toml is not the linker's business.
    cargo.current_dir("/").args(["install", "--quiet", "bpf-linker", "--version", BPF_LINKER_VERSION]);
    cargo.args(["--no-default-features", "--features", &format!("llvm-{llvm}")]);
    cargo.env("CARGO_TARGET_DIR", workspace::target_dir().join("bpf-linker"));
    cargo.env("LLVM_PREFIX", &prefix);
    cargo.env("RUSTFLAGS", format!("-L {}", prefix.join("lib").display()));
    sh::run(&mut cargo).context("bpf-linker did not build")
}

/// Built without optimization: it reads one lock file, and its build is what takes the time.
fn install_deny() -> Result<()> {
    sh::step(format_args!("building cargo-deny {CARGO_DENY_VERSION} (about a minute)"));
    let mut cargo = Command::new(workspace::cargo());
    cargo.current_dir("/").args([
        "install",
        "--quiet",
        "--locked",
        "cargo-deny",
        "--version",
        CARGO_DENY_VERSION,
    ]);
    cargo.env("CARGO_TARGET_DIR", workspace::target_dir().join("cargo-deny"));
    for (setting, value) in
        [("LTO", "false"), ("OPT_LEVEL", "0"), ("CODEGEN_UNITS", "16"), ("DEBUG", "false")]
    {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    sh::run(&mut cargo).context("cargo-deny did not build")
}

/// Where programs are kept that are unpacked and not installed.
pub fn tools_dir() -> PathBuf {
    workspace::target_dir().join("tools/bin")
}

/// The checker of metrics, on PATH or unpacked.
pub fn promtool() -> Option<PathBuf> {
    let unpacked = tools_dir().join("promtool");
    workspace::find_program("promtool").or_else(|| unpacked.is_file().then_some(unpacked))
}

/// Takes promtool out of its package: to install that would start a server.
fn fetch_promtool() -> Result<()> {
    if !apt::is_there() {
        bail!("promtool is missing: install Prometheus's tools, then run this again");
    }
    apt::unpack_program("prometheus", "usr/bin/promtool", &tools_dir())
}
