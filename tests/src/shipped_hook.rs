//! A hook as it is shipped, with settings of its own, installed for a test.

use crate::command;
use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        signal::{Signal, killpg},
        stat::Mode,
    },
    unistd::{Pid, mkdir},
};
use std::{
    fs,
    io::Write,
    os::unix::{
        fs::{OpenOptionsExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::Duration,
};

/// Where it lies, and what it uses.
pub struct ShippedHook {
    path: PathBuf,
    conf: PathBuf,
    run: PathBuf,
}

impl ShippedHook {
    /// Installs a hook into the directory of hooks, under a name, with its settings below `dir`.
    pub fn install(hook: &str, hooks: &Path, name: &str, dir: &Path, settings: &str) -> Result<Self> {
        let place = dir.join(format!("hook-{name}"));
        mkdir(&place, Mode::S_IRWXU)?;
        let (program, conf, run) = (place.join(hook), place.join("conf"), place.join("run"));
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/hooks").join(hook);
        command::run("install", &["-m", "755", &text(&shipped), &text(&program)])?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&conf)?;
        file.write_all(settings.as_bytes())?;
        let path = hooks.join(name);
        // As somebody would who has two of a kind.
        let script = format!(
            "#!/bin/sh\nexport HIGHWATER_HOOK_CONF={} HIGHWATER_HOOK_RUN={}\nexec {} \"$@\"\n",
            conf.display(),
            run.display(),
            program.display()
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { path, conf, run })
    }

    /// Its settings.
    #[must_use]
    pub fn conf(&self) -> &Path {
        &self.conf
    }

    /// Whether it has nothing left to end.
    pub fn is_idle(&self) -> Result<bool> {
        let Ok(mut kinds) = fs::read_dir(&self.run) else { return Ok(true) };
        kinds.try_fold(true, |idle, kind| Ok(idle && fs::read_dir(kind?.path())?.next().is_none()))
    }

    /// The processes that it left, and that hear what it says to them.
    pub fn left_running(&self) -> Result<Vec<Pid>> {
        let is_of_it =
            |process: &Path| fs::read_link(process.join("fd/0")).is_ok_and(|to| to.starts_with(&self.run));
        let processes = fs::read_dir("/proc")?.filter_map(|entry| {
            let path = entry.ok()?.path();
            let number = path.file_name()?.to_str()?.parse().ok()?;
            is_of_it(&path).then_some(Pid::from_raw(number))
        });
        Ok(processes.collect())
    }

    /// Calls it as the agent does, with what its unit leaves it; answers whether it succeeded, and what it said.
    pub fn call(&self, what: &str, hold_s: u64) -> Result<(bool, String)> {
        // To the end of its output: a process that it leaves must not keep that open.
        let Output { status, stdout, stderr } = self.command(what, hold_s)?.output()?;
        let said = String::from_utf8([stdout, stderr].concat())?;
        println!("{what}: {status}: {said}");
        Ok((status.success(), said))
    }

    /// Calls it, and ends it after a while, as the agent ends one that takes too long and minds no polite word.
    pub fn call_and_kill(&self, what: &str, hold_s: u64, after: Duration) -> Result<()> {
        let mut child = self.command(what, hold_s)?.process_group(0).spawn()?;
        thread::sleep(after);
        let early = child.try_wait()?;
        killpg(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL)?;
        child.wait()?;
        ensure!(early.is_none(), "it ended by itself: {early:?}");
        Ok(())
    }

    fn command(&self, what: &str, hold_s: u64) -> Result<Command> {
        let mut command = Command::new(command::find("setpriv"));
        command.args(["--no-new-privs", "--bounding-set", &capabilities()?, "--"]).arg(&self.path);
        command.arg(what).env_clear().env("LANG", "C.UTF-8").env("HIGHWATER_HOLD_S", hold_s.to_string());
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
        Ok(command)
    }
}

/// Of the agent's unit, as `setpriv` takes them.
fn capabilities() -> Result<String> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd/highwater-agent.service");
    let unit = fs::read_to_string(unit)?;
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).context("no set")?;
    let names =
        set.split_whitespace().map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()));
    Ok(names.fold(String::from("-all"), |all, name| all + &name))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
