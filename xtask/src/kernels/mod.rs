//! Real kernels in virtual machines: fetched from the Debian archive, booted by QEMU, running one static program.
//!
//! Nothing is installed on the host: kernel packages are unpacked below `target/kernels/<version>/`, where the
//! log of the last run stays too. QEMU emulates (`-accel tcg`) and never uses `/dev/kvm`: nested and
//! restricted virtualization boots some kernels and silently not others, emulation boots them all alike.
//!
//! A version is a prefix by components: `6.1` is the newest 6.1.x to be had, `7` the newest 7.x.

mod apt;
mod boot;
mod cpio;
mod image;
mod initrd;
mod programs;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::sh;
use crate::workspace;

pub use boot::{Disk, Guest};

/// The kernels tested where none are named: two long-term ones, and the newest series whose tracepoints can be
/// preempted.
pub const VERSIONS_DEFAULT: [&str; 3] = ["6.1", "6.12", "7"];

/// An unpacked kernel, ready to boot.
pub struct Kernel {
    /// As asked for, like `6.12`.
    pub version: String,
    /// The full release, like `6.12.107+deb13-amd64`.
    pub release: String,
    /// Where everything of it lies.
    pub dir: PathBuf,
}

impl Kernel {
    fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    fn packed(&self) -> Result<PathBuf> {
        image::find_image(self)
    }

    fn initrd(&self) -> PathBuf {
        self.dir.join("initrd.cpio")
    }
}

/// The versions asked for, or the usual ones; each must be a path component, as it names a directory.
pub fn versions_or_default(versions: &[String]) -> Result<Vec<String>> {
    if versions.is_empty() {
        return Ok(VERSIONS_DEFAULT.map(str::to_owned).to_vec());
    }
    for version in versions {
        if version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            bail!("`{version}` is no kernel version: give numbers, like 6.1 or 7");
        }
    }
    Ok(versions.to_vec())
}

/// Makes the kernels ready to boot; what is there already is kept.
pub fn fetch(versions: &[String]) -> Result<Vec<Kernel>> {
    let base = workspace::target_dir().join("kernels");
    let mut archive = apt::Archive::new(&base);
    versions.iter().map(|version| fetch_one(&base, &mut archive, version)).collect()
}

fn fetch_one(base: &Path, archive: &mut apt::Archive, version: &str) -> Result<Kernel> {
    let dir = base.join(version);
    let release = image::unpack(archive, version, &dir)?;
    let kernel = Kernel { version: version.to_owned(), release, dir };
    image::extract_vmlinux(&kernel)?;
    initrd::build(&kernel)?;
    Ok(kernel)
}

/// Boots each kernel with the guest's program, one after the other, and tells how each ended.
///
/// All kernels are tried even if one fails.
pub fn run(kernels: &[Kernel], guest: &Guest) -> Result<()> {
    let mut failed = Vec::new();
    for kernel in kernels {
        let started = Instant::now();
        let outcome = boot::boot(kernel, guest)?;
        let took = started.elapsed().as_secs_f64();
        for line in outcome.output.lines() {
            println!("{line}");
        }
        println!("kernel {} ({}): {}, {took:.1} s", kernel.version, kernel.release, outcome.verdict());
        if outcome.exit_code != Some(0) {
            println!("  console and output: {}", kernel.dir.display());
            failed.push(kernel.release.clone());
        }
    }
    if !failed.is_empty() {
        bail!("{} of {} kernels failed: {}", failed.len(), kernels.len(), failed.join(", "));
    }
    sh::step(format_args!("{} kernels passed", kernels.len()));
    Ok(())
}
