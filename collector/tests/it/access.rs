//! The collector as a user of its own, with an operator who is root beside it.

use crate::command::{any_ports, init, json};
use crate::support::Agent;
use highwater_wire::enroll::enroll;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Stands for the collector's user.
const NOBODY: u32 = 65534;

struct Place {
    dir: tempfile::TempDir,
    program: PathBuf,
    config: String,
}

/// A vault, a configuration and the program, all of them nobody's. None where the test is not root.
fn place() -> Option<Place> {
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    // Nobody may not be let through to where it was built.
    let (built, program) = (env!("CARGO_BIN_EXE_highwater-collector"), dir.path().join("program"));
    std::fs::copy(built, &program).unwrap();
    let config = init(dir.path());
    any_ports(&config);
    for name in ["collector.toml", "vault.key"] {
        chown(dir.path().join(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    chown_all(&dir.path().join("vault"));
    Some(Place { dir, program, config })
}

fn chown_all(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    if path.is_dir() {
        std::fs::read_dir(path).unwrap().for_each(|entry| chown_all(&entry.unwrap().path()));
    }
}

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Place {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.env_remove("RUST_LOG").args(words).args(["--config", &self.config]);
        command
    }

    fn daemon(&self) -> (Daemon, PathBuf) {
        let log = self.dir.path().join("log");
        let mut command = self.command(&["run"]);
        command.uid(NOBODY).gid(NOBODY).stderr(std::fs::File::create(&log).unwrap());
        (Daemon(command.spawn().unwrap()), log)
    }

    /// As an operator who is root and trusts nobody.
    fn strictly(&self, words: &[&str]) {
        let mut command = Command::new("sh");
        command.args(["-c", "umask 077; exec \"$0\" \"$@\""]).arg(&self.program).args(words);
        let output = command.args(["--config", &self.config]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn said(log: &Path, what: &str, within: Duration) -> String {
    let until = Instant::now() + within;
    loop {
        let text = std::fs::read_to_string(log).unwrap();
        if text.contains(what) {
            return text;
        }
        assert!(Instant::now() < until, "{what} is not in\n{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn port(log: &Path, name: &str) -> String {
    let text = said(log, "\"ready\"", Duration::from_secs(10));
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let ready = lines.into_iter().find(|line| line["fields"]["message"] == "ready").unwrap();
    ready["fields"][name].as_str().unwrap().to_owned()
}

#[test]
fn what_root_writes_under_a_strict_umask_counts() {
    let Some(place) = place() else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (daemon, log) = place.daemon();
    let url = format!("https://{}", port(&log, "management"));
    place.strictly(&["token", "create", "--name", "unused"]);
    let (_, token) = json(&["token", "create", "--config", &place.config]);
    let token = token["token"].as_str().unwrap().parse().unwrap();
    let identity = runtime.block_on(enroll(&url, &token, "db1")).unwrap().identity;
    let connect =
        |log: &Path| runtime.block_on(Agent::connect(&port(log, "ingest"), &identity, identity.machine));
    let mut agent = connect(&log).unwrap();
    place.strictly(&["machine", "revoke", "db1"]);
    let begun = Instant::now();
    assert_eq!(runtime.block_on(agent.refusal()).code, 1119);
    assert!(begun.elapsed() < Duration::from_secs(6));
    drop(daemon);
    let (_daemon, log) = place.daemon();
    assert_eq!(connect(&log).err().unwrap().code(), 1119);
}

#[test]
fn a_collector_that_cannot_read_revocations_serves_nobody() {
    let Some(place) = place() else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let revoked = place.dir.path().join("vault/control/revoked");
    let (daemon, log) = place.daemon();
    let url = format!("https://{}", port(&log, "management"));
    let (_, token) = json(&["token", "create", "--config", &place.config]);
    let token = token["token"].as_str().unwrap().parse().unwrap();
    let identity = runtime.block_on(enroll(&url, &token, "db1")).unwrap().identity;
    let connect = || runtime.block_on(Agent::connect(&port(&log, "ingest"), &identity, identity.machine));
    connect().unwrap();
    // As an earlier release or another tool may leave it.
    std::fs::create_dir(&revoked).unwrap();
    std::fs::set_permissions(&revoked, PermissionsExt::from_mode(0o700)).unwrap();
    let text = said(&log, "cannot read revocations", Duration::from_secs(10));
    assert!(text.contains("control/revoked"), "{text}");
    // What was known holds for a while; a session of then does not outlive it.
    std::thread::sleep(Duration::from_secs(22));
    let refused = runtime.block_on(connect().unwrap().refusal());
    assert!(refused.code == 1330 && refused.retry, "{refused:?}");
    assert_eq!(connect().err().unwrap().code(), 1330);

    // A start tells which path, once, and whom to let in.
    drop(daemon);
    let mut command = place.command(&["run"]);
    let output = command.uid(NOBODY).gid(NOBODY).stdout(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let path = revoked.display().to_string();
    assert!(
        !output.status.success() && text.contains(&format!("HW-1218: {path}: Permission denied")),
        "{text}"
    );
    assert_eq!(text.matches("Permission denied").count(), 1, "{text}");
    assert!(
        text.contains("runs as user nobody") && text.contains(&format!("chown -R highwater: {path}")),
        "{text}"
    );
    chown(&revoked, Some(NOBODY), Some(NOBODY)).unwrap();
    let (_daemon, log) = place.daemon();
    runtime.block_on(Agent::connect(&port(&log, "ingest"), &identity, identity.machine)).unwrap();
}
