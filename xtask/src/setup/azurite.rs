//! Azurite, Azure's own emulator of Blob Storage, below target/tools: npm brings it, with nothing of it run meanwhile.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{apt, is_root, needs, tools_dir};
use crate::{sh, workspace};

const VERSION: &str = "3.37.0";
const PROGRAM: &str = "azurite-blob";

/// On PATH it is taken as it is; ours is replaced when another version is wanted.
pub fn install_if_missing() -> Result<()> {
    let dir = workspace::target_dir().join("tools/azurite");
    let (mark, link) = (dir.join("version"), tools_dir().join(PROGRAM));
    let installed = fs::read_to_string(&mark).is_ok_and(|version| version == VERSION) && link.exists();
    if installed || workspace::find_program(PROGRAM).is_some() {
        return Ok(());
    }
    let missing: Vec<String> =
        needs::NODE.iter().filter(|need| !need.is_met()).map(|need| need.package.to_owned()).collect();
    if !missing.is_empty() {
        if !(is_root() && apt::is_there()) {
            bail!(
                "Azurite is missing, and npm to bring it: install {}, then run this again",
                missing.join(" ")
            );
        }
        apt::install(&missing)?;
    }
    sh::step(format_args!("fetching Azurite {VERSION}"));
    // Half an installation has no mark, and is thrown away here.
    fs::remove_dir_all(&dir)
        .or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
    fs::create_dir_all(&dir)?;
    fs::create_dir_all(tools_dir())?;
    let mut npm = Command::new("npm");
    npm.args(["install", "--silent", "--no-audit", "--no-fund", "--no-save", "--no-package-lock"]);
    npm.args(["--ignore-scripts", "--omit=optional", "--omit=dev", "--prefix"]).arg(&dir);
    npm.arg(format!("azurite@{VERSION}"));
    sh::run(&mut npm).context("npm could not bring Azurite")?;
    let _ = fs::remove_file(&link);
    symlink(format!("../azurite/node_modules/.bin/{PROGRAM}"), &link).context("cannot name Azurite")?;
    fs::write(&mark, VERSION).context("cannot mark what was installed")?;
    Ok(())
}
