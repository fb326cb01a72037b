//! What a virtual machine starts with: the base file system of its kernel, and behind it programs of this machine with their libraries.

use super::kernel_dir;
use crate::command;
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// One that is being made, in a directory of the test's.
pub struct Initrd {
    dir: PathBuf,
    root: PathBuf,
}

impl Initrd {
    /// Empty but for the script that is run first; `$1` and so on are its arguments.
    pub fn new(dir: &Path, script: &str, args: &[&str]) -> Result<Self> {
        let root = dir.join("root");
        fs::create_dir_all(root.join("sbin"))?;
        fs::write(root.join("guest.sh"), script)?;
        fs::write(root.join("test.sh"), format!("exec sh /guest.sh {}\n", args.join(" ")))?;
        Ok(Self { dir: dir.to_owned(), root })
    }

    /// Adds a program below `/sbin`, without its symbols, and what it is linked to.
    pub fn add_program(&self, program: &Path, name: &str) -> Result<()> {
        let to = self.root.join("sbin").join(name);
        fs::copy(program, &to).with_context(|| format!("cannot copy {}", program.display()))?;
        command::run("strip", &[&to])?;
        for library in command::run("ldd", &[program])?.lines().filter_map(library) {
            let to = self.root.join(library.strip_prefix("/")?);
            fs::create_dir_all(to.parent().context("a file lies in a directory")?)?;
            fs::copy(&library, to).with_context(|| format!("cannot copy {}", library.display()))?;
        }
        Ok(())
    }

    /// Adds a file; its path is without the leading slash.
    pub fn add_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let to = self.root.join(path);
        fs::create_dir_all(to.parent().context("a file lies in a directory")?)?;
        Ok(fs::write(to, content)?)
    }

    /// Packs it for a kernel; that many disks are waited for before the script runs.
    pub fn pack(&self, kernel: &str, disks: usize) -> Result<PathBuf> {
        fs::write(self.root.join("test.disks"), disks.to_string())?;
        let path = self.dir.join("initrd");
        let mut archive = File::create(&path)?;
        let base = kernel_dir(kernel)?.join("initrd.cpio");
        io::copy(
            &mut File::open(&base).with_context(|| format!("cannot open {}", base.display()))?,
            &mut archive,
        )?;
        archive.flush()?;
        let pack = "find . | busybox cpio -o -H newc";
        let mut packed = Command::new("sh");
        packed.args(["-c", pack]).current_dir(&self.root);
        packed.stdin(Stdio::null()).stdout(archive).stderr(Stdio::null());
        ensure!(packed.status()?.success(), "busybox could not pack the guest's files");
        Ok(path)
    }
}

/// The file that a line of `ldd` names.
fn library(line: &str) -> Option<PathBuf> {
    let path = line.split_once("=>").map_or(line, |(_, path)| path).split_whitespace().next()?;
    path.starts_with('/').then(|| path.into())
}
