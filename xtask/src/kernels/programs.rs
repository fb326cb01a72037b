//! Programs of this machine for guests, with the libraries they are linked to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;
use crate::workspace;

/// What tests start in guests. `lvm` is all of LVM's commands; `dumpe2fs` tells what is free.
pub const PROGRAMS: [&str; 2] = ["lvm", "dumpe2fs"];

/// Copies them below a guest's root: programs to `sbin`, libraries to where their loader looks.
pub fn copy(root: &Path) -> Result<()> {
    for name in PROGRAMS {
        let program = workspace::find_program(name)
            .with_context(|| format!("{name} is not installed: cargo xtask setup --for kernels"))?;
        copy_file(&program, &root.join("sbin").join(name))?;
        for library in libraries(&sh::output(Command::new("ldd").arg(&program))?) {
            copy_file(&library, &root.join(library.strip_prefix("/")?))?;
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().context("a file lies in a directory")?;
    fs::create_dir_all(dir)?;
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// The files that `ldd` names, the loader among them.
fn libraries(told: &str) -> Vec<PathBuf> {
    told.lines()
        .filter_map(|line| {
            let path = line.split_once("=>").map_or(line, |(_, path)| path);
            let path = path.split_whitespace().next()?;
            path.starts_with('/').then(|| path.into())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_tells() {
        let told = "\tlinux-vdso.so.1 (0x00007ffd489f2500)\n\
                    \tlibaio.so.1 => /lib/x86_64-linux-gnu/libaio.so.1 (0x00007fd489dad000)\n\
                    \tlibabsent.so.1 => not found\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007fd489f27000)\n";
        let expected = ["/lib/x86_64-linux-gnu/libaio.so.1", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(told), expected.map(PathBuf::from));
    }
}
