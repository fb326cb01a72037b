//! `config check --json` of both daemons, by example: what a script that checks configurations may rely on.

use anyhow::{Context, Result, ensure};
use highwater_tests::daemon::program;
use serde_json::{Value, json};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

/// What the daemon's `config check --json` says of a text; its exit code is as it says.
fn checked(daemon: &str, file: &Path, text: &str) -> Result<Value> {
    fs::write(file, text)?;
    let output = Command::new(program(daemon)?)
        .args(["config", "check", "--json", "--config"])
        .arg(file)
        .env_remove("RUST_LOG")
        .output()?;
    let said: Value = serde_json::from_slice(&output.stdout).context("it says no JSON")?;
    ensure!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(i32::from(said.get("error").is_some())), "{said:#}");
    Ok(said)
}

/// `{"error": {"code", "cause", "action", "problems": [{"line", "key", "message"}]}}`; the texts may change, the rest not.
fn refused(said: &Value, code: &str, problems: &[(Value, &str)]) -> Result<()> {
    let error = said["error"].as_object().context("no error")?;
    let keys: Vec<_> = error.keys().collect();
    ensure!(said.as_object().is_some_and(|all| all.len() == 1), "{said:#}");
    ensure!(keys == ["action", "cause", "code", "problems"] && error["code"] == code, "{said:#}");
    ensure!(error["action"].is_string() && error["cause"].is_string(), "{said:#}");
    let told = error["problems"].as_array().context("no list")?;
    ensure!(told.len() == problems.len(), "{said:#}");
    for (told, (line, key)) in told.iter().zip(problems) {
        let keys: Vec<_> = told.as_object().context("no object")?.keys().collect();
        ensure!(keys == ["key", "line", "message"], "{told:#}");
        ensure!(told["line"] == *line && told["key"] == *key, "{told:#}");
        ensure!(told["message"].as_str().is_some_and(|m| !m.is_empty() && !m.contains('\n')), "{told:#}");
    }
    Ok(())
}

#[test]
fn the_agents() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("agent.toml");
    let check = |text: &str| checked("highwater-agent", &file, text);
    let hooks = dir.path().join("hooks");
    let text = format!("[log]\nlevel = \"warn\"\n[application]\nhooks-dir = {hooks:?}\n");
    let valid = |called: &[&str], refused: Value, trouble: Value| {
        let hooks = json!({ "dir": hooks, "called": called, "refused": refused, "trouble": trouble });
        json!({ "valid": true, "file": file, "hooks": hooks })
    };
    ensure!(check(&text)? == valid(&[], json!([]), Value::Null));
    fs::create_dir(&hooks)?;
    for (name, mode) in [("20-b", 0o755), ("10-a", 0o755), ("30-c", 0o777), ("x.bak", 0o755)] {
        fs::write(hooks.join(name), "")?;
        fs::set_permissions(hooks.join(name), fs::Permissions::from_mode(mode))?;
    }
    let refused_file = json!([{ "file": hooks.join("30-c"), "why": "others than root can change it" }]);
    ensure!(check(&text)? == valid(&["10-a", "20-b"], refused_file, Value::Null));
    fs::set_permissions(&hooks, fs::Permissions::from_mode(0o777))?;
    let said = check(&text)?;
    ensure!(said["hooks"]["called"] == json!([]) && said["hooks"]["trouble"].is_string(), "{said:#}");
    let bad = "state-dr = \"x\"\n[replication]\nreaders = 0\npoint-interval = 5\n";
    let problems =
        [(json!(1), "state-dr"), (json!(3), "replication.readers"), (json!(4), "replication.point-interval")];
    refused(&check(bad)?, "HW-1401", &problems)?;
    refused(&check("[log\n")?, "HW-1401", &[(json!(1), "")])
}

#[test]
fn the_collectors() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let made = Command::new(program("highwater-collector")?)
        .args(["init", "--name", "localhost", "--dir"])
        .arg(dir.path())
        .arg("--vault")
        .arg(dir.path().join("vault"))
        .output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let file = dir.path().join("collector.toml");
    let (vault, key) = (dir.path().join("vault"), dir.path().join("vault.key"));
    let good = format!("names = [\"localhost\"]\nvault = {vault:?}\nkey-file = {key:?}\n");
    let check = |text: &str| checked("highwater-collector", &file, text);
    ensure!(check(&good)? == json!({ "valid": true, "file": file }));
    let bad = format!("{good}windw = \"1MiB\"\nlisten = 5\nsessions-max = 0\n");
    let problems = [(json!(4), "windw"), (json!(5), "listen"), (json!(6), "sessions-max")];
    refused(&check(&bad)?, "HW-1313", &problems)?;
    // A setting that is not there has no line, nor has what a right one names and cannot be used.
    refused(&check("names = [\"localhost\"]\nvault = \"/v\"\n")?, "HW-1313", &[(Value::Null, "key-file")])?;
    refused(&check(&good.replace("/vault\"", "/none\""))?, "HW-1313", &[(Value::Null, "vault")])?;
    refused(&check("names = [\n")?, "HW-1313", &[(json!(1), "")])
}
