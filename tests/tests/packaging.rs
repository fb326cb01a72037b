//! What is shipped beside the programs agrees with them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use highwater_tests::daemon::program;

type Test = anyhow::Result<()>;

fn packaging(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging").join(path)
}

/// The example as it is, and with every commented setting switched on.
fn variants(example: &str) -> anyhow::Result<[String; 2]> {
    let text = fs::read_to_string(packaging(example))?;
    let is_setting = |line: &str| {
        line.strip_prefix('#').is_some_and(|rest| {
            rest.starts_with("[[")
                || rest.starts_with(|c: char| c.is_ascii_lowercase()) && rest.contains(" = ")
        })
    };
    let on = text.lines().map(|line| if is_setting(line) { &line[1..] } else { line });
    Ok([text.clone(), on.collect::<Vec<_>>().join("\n")])
}

fn check(daemon: &str, example: &str) -> Test {
    check_in(&tempfile::tempdir()?, daemon, example)
}

/// With vault and key of this directory, if the example names any.
fn check_in(dir: &tempfile::TempDir, daemon: &str, example: &str) -> Test {
    let path = dir.path().join("config.toml");
    for text in variants(example)? {
        let (vault, key) = (dir.path().join("vault"), dir.path().join("vault.key"));
        let text = text
            .replace("\"/var/lib/highwater-collector/vault\"", &format!("{vault:?}"))
            .replace("\"/etc/highwater/vault.key\"", &format!("{key:?}"))
            // The operator's own program: any that is there will do.
            .replace("\"/etc/highwater/freeze-hook\"", "\"/bin/true\"");
        fs::write(&path, &text)?;
        let output = std::process::Command::new(program(daemon)?)
            .args(["config", "check", "--config"])
            .arg(&path)
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{example}: {}\n{text}", String::from_utf8_lossy(&said));
    }
    Ok(())
}

#[test]
fn the_agents_example_is_accepted_with_every_setting() -> Test {
    check("highwater-agent", "examples/agent.toml")
}

#[test]
fn the_collectors_example_is_accepted_with_every_setting() -> Test {
    let dir = tempfile::tempdir()?;
    let made = std::process::Command::new(program("highwater-collector")?)
        .args(["init", "--name", "localhost", "--dir"])
        .arg(dir.path())
        .arg("--vault")
        .arg(dir.path().join("vault"))
        .output()?;
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    check_in(&dir, "highwater-collector", "examples/collector.toml")
}

#[test]
fn units_start_commands_that_exist() -> Test {
    for (unit, daemon) in [
        ("highwater-agent.service", "highwater-agent"),
        ("highwater-collector.service", "highwater-collector"),
    ] {
        let text = fs::read_to_string(packaging("systemd").join(unit))?;
        let mut commands = 0;
        for line in text.lines().filter(|line| line.starts_with("Exec")) {
            let words: Vec<&str> = line.split('=').nth(1).unwrap_or_default().split_whitespace().collect();
            assert_eq!(words[0], format!("/usr/bin/{daemon}"), "{unit}: {line}");
            let mut help = std::process::Command::new(program(daemon)?);
            let output = help.args(&words[1..]).arg("--help").output()?;
            assert!(output.status.success(), "{unit}: {line}");
            commands += 1;
        }
        assert!(commands > 0, "{unit} starts nothing");
    }
    Ok(())
}

/// Each can be installed as it is, tells what it is called with, and is described.
#[test]
fn hooks_are_executable_and_described() -> Test {
    let operations = fs::read_to_string(packaging("../docs/OPERATIONS.md"))?;
    let mut hooks = 0;
    for entry in fs::read_dir(packaging("hooks"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        assert_eq!(entry.metadata()?.permissions().mode() & 0o755, 0o755, "{name}");
        assert!(operations.contains(&format!("| `{name}`")), "{name} is not in OPERATIONS.md");
        let text = fs::read_to_string(entry.path())?;
        for part in ["#!/bin/sh\n", "# freeze: ", "# Guaranteed", "# Not guaranteed:", "# Settings, in "] {
            assert!(text.contains(part), "{name} has no {part:?}");
        }
        hooks += 1;
    }
    assert!(hooks > 0);
    Ok(())
}

/// The values of a unit's setting.
fn values(unit: &str, key: &str) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(packaging("systemd").join(unit))?;
    let of_key = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
    Ok(text.lines().filter_map(of_key).collect())
}

/// Both daemons may run on one machine: what the one keeps private must not be on the other's way.
#[test]
fn the_daemons_directories_are_their_own() -> Test {
    let defaults = std::process::Command::new(program("highwater-agent")?)
        .args(["--json", "--config", "/dev/null", "config", "show", "--effective"])
        .output()?;
    let defaults: serde_json::Value = serde_json::from_slice(&defaults.stdout)?;
    let help =
        std::process::Command::new(program("highwater-collector")?).args(["init", "--help"]).output()?;
    let example = fs::read_to_string(packaging("examples/collector.toml"))?;
    let [state, _, _] = &values("highwater-collector.service", "StateDirectory")?[..] else {
        panic!("one vault")
    };
    let vault = format!("/var/lib/{state}");
    // Wherever its lines break.
    let help = String::from_utf8_lossy(&help.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains(&format!("[default: {vault}]")), "{vault}");
    assert!(example.contains(&format!("vault = \"{vault}\"")), "{vault}");
    let agents = defaults["state-dir"].as_str().unwrap_or_default();
    assert!(agents.starts_with('/') && !Path::new(&vault).starts_with(agents), "{vault} in {agents}");
    let run = values("highwater-agent.service", "RuntimeDirectory")?;
    assert_eq!(defaults["run-dir"], format!("/run/{}", run[0]).as_str());
    assert_ne!(run, values("highwater-collector.service", "RuntimeDirectory")?);
    Ok(())
}

/// With the unit's capabilities and no others, the agent can see what is mounted in another's namespace.
#[test]
fn the_agents_capabilities_let_it_see_the_mounts_of_all_processes() -> Test {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root to give capabilities up");
        return Ok(());
    }
    let [set] = &values("highwater-agent.service", "CapabilityBoundingSet")?[..] else { panic!("one set") };
    let names: Vec<String> =
        set.split_whitespace().map(|c| format!("+{}", c.trim_start_matches("CAP_").to_lowercase())).collect();
    // An own process with all the capabilities that the agent lacks, as a container's may have.
    let mut other = std::process::Command::new("sleep").arg("60").spawn()?;
    let seen = std::process::Command::new("setpriv")
        .arg(format!("--bounding-set=-all,{}", names.join(",")))
        .args(["readlink", &format!("/proc/{0}/ns/mnt", other.id()), &format!("/proc/{0}/root", other.id())])
        .output();
    other.kill()?;
    other.wait()?;
    let seen = seen?;
    assert!(seen.status.success() && seen.stdout.starts_with(b"mnt:"), "{seen:?}");
    Ok(())
}
