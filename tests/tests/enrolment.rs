//! Enrolment: where the token may come from, and what a crash in the middle leaves.

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Backing, LoopDisk, Site, SiteOptions, daemon};
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
    time::Duration,
};

/// Runs `highwater-agent enroll`, with standard input and environment of one's own.
fn enroll(site: &Site, args: &[&str], input: &str, variable: Option<&str>) -> Result<Output> {
    let mut command = Command::new(daemon::program("highwater-agent")?);
    command.arg("--config").arg(site.agent_config()).args(["enroll", &site.management_url(), "--again"]);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(token) = variable {
        command.env("HIGHWATER_TOKEN", token);
    }
    let mut child = command.spawn()?;
    child.stdin.take().context("no input")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

#[test]
fn the_token_comes_from_a_file_standard_input_or_the_environment() -> Result<()> {
    let arena = Arena::enter("enrol")?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    let state = arena.dir().join("state");
    let identity = state.join("identity.pem");
    let mut machines = vec![fs::read_to_string(&identity)?];
    let file = arena.dir().join("next-token");
    for way in ["file", "input", "variable"] {
        // As a crash in the middle of an earlier enrolment would leave them, and readable for all.
        for stale in ["identity.pem.new", "enrolment.json.new"] {
            fs::write(state.join(stale), "half")?;
            fs::set_permissions(state.join(stale), fs::Permissions::from_mode(0o644))?;
        }
        let token = site.new_token()?;
        fs::write(&file, format!("{token}\n"))?;
        let path = file.to_string_lossy();
        let output = match way {
            "file" => enroll(&site, &["--token-file", &path], "", None)?,
            "input" => enroll(&site, &["-"], &format!("{token}\n"), None)?,
            _ => enroll(&site, &[], "", Some(&token))?,
        };
        ensure!(output.status.success(), "{way}: {}", String::from_utf8_lossy(&output.stderr));
        let now = fs::read_to_string(&identity)?;
        ensure!(!machines.contains(&now), "{way}: it is the same machine");
        machines.push(now);
        for name in ["identity.pem", "enrolment.json"] {
            let mode = fs::metadata(state.join(name))?.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "{way}: {name} has mode {mode:o}");
            ensure!(!state.join(format!("{name}.new")).exists(), "{way}: {name}.new was left");
        }
    }
    site.start_agent()?;
    site.wait_until("connected", Duration::from_secs(20), |s| {
        Ok(s.status()?["collector"]["state"] == "connected")
    })?;
    site.stop_agent()
}

#[test]
fn what_is_no_token_is_refused_and_changes_nothing() -> Result<()> {
    let arena = Arena::enter("no-token")?;
    let site = Site::new(&arena, &SiteOptions::default())?;
    let identity = arena.dir().join("state/identity.pem");
    let before = fs::read_to_string(&identity)?;
    let endless = arena.dir().join("endless");
    fs::write(&endless, vec![b'x'; 1 << 20])?;
    let endless = endless.to_string_lossy();
    let cases: [(&[&str], &str, &str); 5] = [
        (&["--token-file", "/nonexistent/token"], "", "HW-1484"),
        (&["--token-file", &endless], "", "HW-1115"),
        (&["-"], "", "HW-1115"),
        (&["-"], "hw1.what\n", "HW-1115"),
        (&[], "", "TOKEN"),
    ];
    for (args, input, told) in cases {
        let output = enroll(&site, args, input, None)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && error.contains(told), "{args:?}: {error}");
    }
    // Also where the machine is enrolled: without being asked for a token first.
    let said = site.agent_command(&["enroll", &site.management_url(), "-"]);
    ensure!(said.is_err_and(|error| error.to_string().contains("HW-1480")));
    ensure!(fs::read_to_string(&identity)? == before);
    Ok(())
}

/// A machine that is not enrolled tracks, and says to whoever asks for a point what to do.
#[test]
fn without_an_enrolment_a_point_is_refused_with_what_to_do() -> Result<()> {
    let arena = Arena::enter("unenrolled")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 16 << 20)?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    let identity = arena.dir().join("state/identity.pem");
    let kept = fs::read(&identity)?;
    fs::remove_file(&identity)?;
    site.allow("HW-1476");
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    let refused = site.point_within(Duration::ZERO).err().context("a point without a collector")?.to_string();
    ensure!(refused.contains("HW-1476") && refused.contains("highwater-agent enroll URL -"), "{refused}");
    ensure!(site.agent_log().contains("HW-1476"), "{}", site.agent_log());
    site.stop_agent()?;
    // What was tracked meanwhile is replicated after it.
    fs::write(&identity, kept)?;
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o600))?;
    site.start_agent()?;
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    site.stop_agent()
}
