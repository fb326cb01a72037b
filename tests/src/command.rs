//! Running the system's tools: the error names the whole command and what it said.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a tool to its end and returns its standard output, trimmed.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Result<String> {
    let mut command = Command::new(find(program));
    command.args(args).stdin(Stdio::null());
    let said = || {
        let words: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
        format!("{program} {}", words.join(" "))
    };
    let out = command.output().with_context(|| format!("cannot start {}", said()))?;
    if !out.status.success() {
        bail!("{} failed ({}): {}", said(), out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// A tool's path; administration tools are found although PATH may lack their directories.
pub fn find(program: &str) -> PathBuf {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .map(|dir| PathBuf::from(dir).join(program))
        .find(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(program))
}
