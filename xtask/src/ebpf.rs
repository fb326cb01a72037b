//! Compiles `agent-ebpf` for `bpfel-unknown-none` and puts the object where `agent/build.rs` picks it up.
//!
//! Two toolchains can do it, tried in this order:
//! - **prebuilt**: a system compiler that brings a compiled `core` for bpf (Debian's `rustc-web` with
//!   `libstd-rust-web-dev-bpf`);
//! - **build-std**: a rustup toolchain with the `rust-src` component, which compiles `core` itself.
//!
//! Cargo decides what is out of date. The object is replaced only when its content changed and by
//! a rename, so an unchanged object rebuilds nothing that embeds it, and an interrupted run leaves the old one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh;
use crate::workspace;

/// The binaries in `agent-ebpf/`, each an object: tracking, and write-ordered capture.
const NAMES: [&str; 2] = ["highwater-agent-ebpf", "highwater-capture-ebpf"];
const TARGET: &str = "bpfel-unknown-none";
/// Debug information becomes BTF in the link. The CPU must not be given to the linker a second time.
const FLAGS: [&str; 3] = ["-Cdebuginfo=2", "-Ctarget-cpu=v3", "-Clink-arg=--btf"];
/// Where a system compiler with a compiled `core` for bpf is looked for.
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
/// aya-ebpf's edition and features need at least this.
const SYSTEM_RUSTC_MINOR_MIN: u32 = 95;

/// A compiler that can produce bpf code.
#[derive(Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// A compiler whose sysroot has a compiled `core` for bpf.
    Prebuilt {
        /// The compiler.
        rustc: PathBuf,
    },
    /// A rustup toolchain that has the standard library's source.
    BuildStd {
        /// Its compiler.
        rustc: PathBuf,
    },
}

/// Where the objects are put.
pub fn objects_dir() -> PathBuf {
    workspace::target_dir().join("ebpf")
}

/// Builds the objects that are out of date and returns their directory.
pub fn build() -> Result<PathBuf> {
    build_in(&workspace::root().join("agent-ebpf"), &objects_dir())?;
    Ok(objects_dir())
}

fn build_in(dir: &Path, objects: &Path) -> Result<()> {
    let Some(toolchain) = find_toolchain() else { bail!(missing_compiler()) };
    let Some(linker) = find_linker() else { bail!(missing_linker()) };
    let build_dir = workspace::target_dir().join("ebpf/build");

    let mut cargo = Command::new(workspace::cargo());
    cargo.current_dir(dir).args(["build", "--quiet", "--release", "--target", TARGET]);
    cargo.env("CARGO_TARGET_DIR", &build_dir);
    // The surrounding cargo's settings are those of the host's code.
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET", "RUSTDOC"] {
        cargo.env_remove(name);
    }
    let linker = format!("-Clinker={}", linker.display());
    let flags: Vec<&str> = FLAGS.into_iter().chain([linker.as_str()]).collect();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // aya-ebpf and atomic intrinsics use unstable features; a released compiler needs to be told to allow them.
    cargo.env("RUSTC_BOOTSTRAP", "1");
    match &toolchain {
        Toolchain::Prebuilt { rustc } => cargo.env("RUSTC", rustc),
        Toolchain::BuildStd { rustc } => cargo.arg("-Zbuild-std=core").env("RUSTC", rustc),
    };
    sh::run(&mut cargo)
        .with_context(|| format!("the eBPF programs did not build with {}", toolchain.rustc().display()))?;
    for name in NAMES {
        let built = build_dir.join(TARGET).join("release").join(name);
        install(&built, &objects.join(format!("{name}.o")))?;
    }
    Ok(())
}

impl Toolchain {
    fn rustc(&self) -> &Path {
        match self {
            Toolchain::Prebuilt { rustc } | Toolchain::BuildStd { rustc } => rustc,
        }
    }

    /// The LLVM whose bitcode the compiler writes; the linker must read it.
    pub fn llvm_major(&self) -> Result<u32> {
        let verbose = sh::output(Command::new(self.rustc()).arg("-vV"))?;
        llvm_major(&verbose).with_context(|| format!("{} does not tell its LLVM", self.rustc().display()))
    }
}

/// Replaces the object if its content differs.
fn install(built: &Path, object: &Path) -> Result<()> {
    let new = fs::read(built).with_context(|| format!("no object at {}", built.display()))?;
    if fs::read(object).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let dir = object.parent().context("the object's path has a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let fresh = object.with_extension("o.new");
    fs::write(&fresh, &new).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, object).with_context(|| format!("cannot replace {}", object.display()))?;
    sh::step(format_args!("built {} ({} bytes)", object.display(), new.len()));
    Ok(())
}

/// Finds a compiler that can build the object.
pub fn find_toolchain() -> Option<Toolchain> {
    find_prebuilt().or_else(find_build_std)
}

fn find_prebuilt() -> Option<Toolchain> {
    let rustc = PathBuf::from(SYSTEM_RUSTC);
    let version = sh::output(Command::new(&rustc).arg("--version")).ok()?;
    if minor_version(&version)? < SYSTEM_RUSTC_MINOR_MIN {
        return None;
    }
    let libraries = sysroot(Command::new(&rustc))?.join("lib/rustlib").join(TARGET).join("lib");
    let has_core = fs::read_dir(libraries).ok()?.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    });
    has_core.then_some(Toolchain::Prebuilt { rustc })
}

/// The nightly toolchain first, as it is what the documentation tells to install; else the one that runs us.
fn find_build_std() -> Option<Toolchain> {
    let mut nightly = Command::new(workspace::find_program("rustup")?);
    nightly.args(["run", "nightly", "rustc"]);
    let current = Command::new("rustc");
    [nightly, current].into_iter().find_map(|command| {
        let sysroot = sysroot(command)?;
        let rustc = sysroot.join("bin/rustc");
        let source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
        (source.is_file() && rustc.is_file()).then_some(Toolchain::BuildStd { rustc })
    })
}

fn sysroot(mut rustc: Command) -> Option<PathBuf> {
    let sysroot = sh::output(rustc.args(["--print", "sysroot"])).ok()?;
    Some(PathBuf::from(sysroot.trim()))
}

/// The linker, if it is installed.
pub fn find_linker() -> Option<PathBuf> {
    workspace::find_program("bpf-linker")
}

/// The minor number in `rustc 1.96.0 (…)`.
fn minor_version(version: &str) -> Option<u32> {
    version.split_whitespace().nth(1)?.split('.').nth(1)?.parse().ok()
}

/// The major number in `LLVM version: 22.1.8`.
fn llvm_major(verbose: &str) -> Option<u32> {
    verbose.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

fn missing_compiler() -> String {
    format!(
        "no compiler for {TARGET} found. Do one of these:\n\
         - Debian, as root: cargo xtask setup --for build\n\
         - elsewhere, with rustup: rustup toolchain install nightly --component rust-src"
    )
}

fn missing_linker() -> String {
    "bpf-linker is not installed. Do one of these:\n\
     - Debian, as root: cargo xtask setup --for build\n\
     - elsewhere: cargo install bpf-linker (it needs the LLVM of the compiler's version; see its README)"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minor_version_is_read_from_what_rustc_prints() {
        assert_eq!(
            minor_version("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"),
            Some(96)
        );
        assert_eq!(minor_version("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)"), Some(97));
        assert_eq!(minor_version("cargo"), None);
    }

    #[test]
    fn an_unchanged_object_is_not_touched() {
        let dir = std::env::temp_dir().join(format!("xtask-install-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (built, object) = (dir.join("built"), dir.join("ebpf/object.o"));
        fs::write(&built, b"one").unwrap();
        install(&built, &object).unwrap();
        let before = fs::metadata(&object).unwrap().modified().unwrap();
        install(&built, &object).unwrap();
        assert_eq!(fs::metadata(&object).unwrap().modified().unwrap(), before);
        fs::write(&built, b"two").unwrap();
        install(&built, &object).unwrap();
        assert_eq!(fs::read(&object).unwrap(), b"two");
        fs::remove_dir_all(&dir).unwrap();
    }
}
