//! Where things lie: the workspace's root, its target directory and the tools installed by cargo.

use std::env;
use std::path::{Path, PathBuf};

/// The root of the workspace.
///
/// Taken at compile time: xtask is always run from the tree it was built in.
pub fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// Cargo's target directory, as set by `CARGO_TARGET_DIR` or `target` at the root.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The cargo that runs this xtask, so that nested calls use the same one.
pub fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Where `cargo install` puts programs. It need not be on PATH.
pub fn cargo_bin_dir() -> Option<PathBuf> {
    if let Some(dir) = env::var_os("CARGO_INSTALL_ROOT").or_else(|| env::var_os("CARGO_HOME")) {
        return Some(PathBuf::from(dir).join("bin"));
    }
    env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin"))
}

/// Finds a program on PATH, in the system's administration directories, or among cargo's programs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .chain(cargo_bin_dir())
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
