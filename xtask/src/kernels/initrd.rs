//! The base file system of a guest: busybox, programs and modules that tests need with all they depend on, and `init.sh`.
//!
//! Built once per kernel and kept; a run appends its own archive to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Kernel, cpio, image, programs};
use crate::sh;
use crate::workspace;

const INIT: &str = include_str!("init.sh");

/// What tests may load, beyond what it depends on. A kernel that has one built in, or lacks it, is no error:
/// the test that needs it says so.
const MODULES: [&str; 44] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_scsi",
    "nvme",
    "nvme_fabrics",
    "nvmet",
    "nvme_loop",
    "dm_mod",
    "dm_log_writes",
    "dm_flakey",
    "dm_snapshot",
    "dm_crypt",
    "dm_multipath",
    "raid0",
    "raid1",
    "raid456",
    "loop",
    "zram",
    "brd",
    "null_blk",
    "nbd",
    "scsi_debug",
    "sd_mod",
    "ext4",
    "xfs",
    "btrfs",
    "fuse",
    "overlay",
    "configfs",
    "failover",
    "net_failover",
    // Found at run time by name, so no dependency tells of them.
    "crc32c_generic",
    "crc32c_intel",
    "crc32c_cryptoapi",
    "libcrc32c",
    "xxhash_generic",
    "blake2b_generic",
    "lzo",
    "lzo_rle",
    "lz4",
    "zstd",
    "sha256_generic",
];

/// Builds the archive unless it is there for the same modules, programs and script.
pub fn build(kernel: &Kernel) -> Result<()> {
    let stamp = format!("{}\n{INIT}\n{MODULES:?}\n{:?}", kernel.release, programs::PROGRAMS);
    let stamp_path = kernel.dir.join("initrd.stamp");
    if kernel.initrd().is_file() && fs::read_to_string(&stamp_path).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    let busybox = workspace::find_program("busybox")
        .context("busybox is not installed: cargo xtask setup --for kernels")?;
    let root = kernel.dir.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for dir in ["bin", "sbin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy(&busybox, root.join("bin/busybox"))?;
    std::os::unix::fs::symlink("/bin/busybox", root.join("sbin/modprobe"))?;
    programs::copy(&root)?;
    copy_modules(kernel, &root)?;

    let fresh = kernel.dir.join("initrd.new");
    let mut archive = cpio::Archive::new(BufWriter::new(File::create(&fresh)?));
    archive.tree(&root, "")?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.finish()?.flush()?;
    fs::rename(&fresh, kernel.initrd())?;
    fs::remove_dir_all(&root)?;
    fs::write(stamp_path, stamp)?;
    Ok(())
}

/// Copies the wanted modules and their dependencies, unpacked, and writes the indexes modprobe reads.
fn copy_modules(kernel: &Kernel, root: &Path) -> Result<()> {
    let from = image::modules_dir(&kernel.dir.join("files"))?;
    // `<base>/lib/modules/<release>`; depmod is given the base.
    let base = from.ancestors().nth(3).context("modules lie in lib/modules")?;
    if !from.join("modules.dep").is_file() {
        depmod(base, &kernel.release)?;
    }
    let listing = fs::read_to_string(from.join("modules.dep"))?;
    let wanted = closure(&listing, &MODULES);
    if wanted.is_empty() {
        bail!("none of the wanted modules is in {}", from.display());
    }
    let to = root.join("lib/modules").join(&kernel.release);
    for path in wanted {
        copy_module(&from.join(&path), &to.join(&path))?;
    }
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if from.join(name).is_file() {
            fs::copy(from.join(name), to.join(name))?;
        }
    }
    depmod(root, &kernel.release)
}

fn depmod(base: &Path, release: &str) -> Result<()> {
    let depmod = workspace::find_program("depmod")
        .context("depmod is not installed: cargo xtask setup --for kernels")?;
    sh::output(Command::new(depmod).arg("-b").arg(base).arg(release)).map(drop)
}

/// The paths of the modules named and of all they depend on, out of a `modules.dep`.
fn closure(listing: &str, names: &[&str]) -> BTreeSet<PathBuf> {
    let mut by_name = BTreeMap::new();
    for line in listing.lines() {
        if let Some((path, depends)) = line.split_once(':') {
            by_name.insert(module_name(path), (path, depends));
        }
    }
    // Each line of modules.dep lists indirect dependencies as well.
    names
        .iter()
        .filter_map(|name| by_name.get(*name))
        .flat_map(|(path, depends)| std::iter::once(*path).chain(depends.split_whitespace()))
        .map(PathBuf::from)
        .collect()
}

/// `kernel/drivers/md/dm-mod.ko.xz` is `dm_mod`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Copies a module, unpacking it: busybox's modprobe reads plain ones only.
fn copy_module(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().context("a module lies in a directory")?;
    fs::create_dir_all(dir)?;
    let unpacker: &[&str] = match from.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => &["xz", "-dc"],
        Some("zst") => &["zstd", "-dcq"],
        Some("gz") => &["gzip", "-dc"],
        _ => {
            fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
            return Ok(());
        }
    };
    let mut unpack = Command::new(unpacker[0]);
    unpack
        .args(&unpacker[1..])
        .stdin(File::open(from)?)
        .stdout(Stdio::from(File::create(to.with_extension(""))?));
    sh::run(&mut unpack)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_along() {
        let listing = "kernel/fs/xfs/xfs.ko.xz: kernel/lib/libcrc32c.ko.xz\n\
                       kernel/lib/libcrc32c.ko.xz:\n\
                       kernel/drivers/md/dm-mod.ko:\n\
                       kernel/fs/jfs/jfs.ko: kernel/x.ko\n";
        let paths: Vec<_> = closure(listing, &["xfs", "dm_mod", "absent"]).into_iter().collect();
        let expected =
            ["kernel/drivers/md/dm-mod.ko", "kernel/fs/xfs/xfs.ko.xz", "kernel/lib/libcrc32c.ko.xz"];
        assert_eq!(paths, expected.map(PathBuf::from));
    }

    #[test]
    fn module_names_use_underscores() {
        assert_eq!(module_name("kernel/drivers/md/dm-log-writes.ko.zst"), "dm_log_writes");
        assert_eq!(module_name("zram.ko"), "zram");
    }
}
