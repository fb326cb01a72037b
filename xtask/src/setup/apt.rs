//! Installing Debian packages: without recommendations or questions, with the lists refreshed only if needed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;
use crate::workspace;

/// The compiler with a `core` for bpf. The version is chosen by [`compiler_packages`].
pub const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "libstd-rust-web-dev", "libstd-rust-web-dev-bpf"];

/// Whether packages can be installed this way at all.
pub fn is_there() -> bool {
    Path::new("/etc/debian_version").is_file() && workspace::find_program("apt-get").is_some()
}

/// Installs packages; refreshes the lists if a package is not in them, and once more if the mirror has moved on.
pub fn install(packages: &[String]) -> Result<()> {
    let unique: BTreeSet<&str> = packages.iter().map(String::as_str).collect();
    let names: Vec<&str> = unique.into_iter().collect();
    sh::step(format_args!("installing {}", names.join(" ")));
    if !names.iter().all(|name| is_known(name)) {
        update()?;
    } else if try_install(&names).is_ok() {
        return Ok(());
    } else {
        update()?;
    }
    try_install(&names)
}

/// The compiler's packages, pinned to the newest version where more than one is offered.
///
/// Debian keeps an older `rustc-web` beside the newer in its security archive; all must be of one version.
pub fn compiler_packages() -> Result<Vec<String>> {
    if versions("libstd-rust-web-dev-bpf").is_empty() {
        update()?;
    }
    let version = versions("libstd-rust-web-dev-bpf").into_iter().next().context(
        "apt offers no libstd-rust-web-dev-bpf: Debian 12 or later with its security archive is needed",
    )?;
    Ok(COMPILER_PACKAGES.map(|name| format!("{name}={version}")).to_vec())
}

/// Takes one program out of a package without installing it.
pub fn unpack_program(package: &str, path: &str, into: &Path) -> Result<()> {
    if !is_known(package) {
        update()?;
    }
    let scratch = into.with_file_name(format!("unpack-{package}"));
    fs::create_dir_all(&scratch)?;
    sh::step(format_args!("fetching {path} of {package}"));
    let fetch = || sh::output(apt_get().args(["-qq", "download", package]).current_dir(&scratch));
    if fetch().is_err() {
        update()?;
        fetch()?;
    }
    for entry in fs::read_dir(&scratch)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            sh::run(Command::new("dpkg").arg("-x").arg(entry.path()).arg(&scratch))?;
        }
    }
    fs::create_dir_all(into)?;
    let from = scratch.join(path);
    let name = from.file_name().context("a program has a name")?;
    fs::rename(&from, into.join(name)).with_context(|| format!("{package} has no {path}"))?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

fn try_install(names: &[&str]) -> Result<()> {
    sh::output(apt_get().args(["-qq", "install", "--yes", "--no-install-recommends"]).args(names)).map(drop)
}

/// A source that cannot be reached is no error here: what is then missing is named by the install.
fn update() -> Result<()> {
    sh::step("refreshing the package lists");
    let update = apt_get().args(["-qq", "update"]).output().context("cannot start apt-get")?;
    if !update.status.success() {
        eprint!("{}", String::from_utf8_lossy(&update.stderr));
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args([
        "-o",
        "Acquire::Retries=3",
        "-o",
        "DPkg::Lock::Timeout=120",
    ]);
    apt
}

/// Whether the lists offer a package; a version after `=` is taken on trust, it came from the lists.
fn is_known(name: &str) -> bool {
    !versions(name.split('=').next().unwrap_or(name)).is_empty()
}

/// The versions offered, newest first.
fn versions(name: &str) -> Vec<String> {
    let table = sh::output(Command::new("apt-cache").args(["madison", name])).unwrap_or_default();
    parse_madison(&table)
}

fn parse_madison(table: &str) -> Vec<String> {
    table.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_newest_first() {
        let table = " rustc-web | 1.96.0+dfsg1-1~deb12u2 | http://a.example/security x/main amd64 Packages\n \
                     rustc-web | 1.85.0+dfsg3-1~deb12u3 | http://a.example/debian y/main amd64 Packages\n";
        assert_eq!(parse_madison(table), ["1.96.0+dfsg1-1~deb12u2", "1.85.0+dfsg3-1~deb12u3"]);
        assert!(parse_madison("").is_empty());
    }
}
