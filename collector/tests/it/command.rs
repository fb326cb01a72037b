//! The command itself, as a process.

use crate::support::{Agent, block, point};
use highwater_collector::clock::now_ms;
use highwater_delta::{BLOCK_BYTES, BlockRange, CommitId, DeltaId, DiskId};
use highwater_vault::{KeySource, Vault, local_store};
use highwater_wire::enroll::enroll;
use highwater_wire::message::{AgentMessage, CollectorMessage};
use serde_json::Value;
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_highwater-collector"));
    command.env_remove("RUST_LOG");
    command
}

pub fn json(arguments: &[&str]) -> (bool, Value) {
    let output = command().arg("--json").args(arguments).output().unwrap();
    let value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)));
    (output.status.success(), value)
}

pub fn init(dir: &Path) -> String {
    let vault = dir.join("vault");
    let (dir, vault) = (dir.to_str().unwrap(), vault.to_str().unwrap());
    let (ok, made) = json(&["init", "--dir", dir, "--vault", vault, "--name", "127.0.0.1"]);
    assert!(ok, "{made}");
    made["config"].as_str().unwrap().to_owned()
}

/// A daemon, which does not outlive its test.
pub struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl std::ops::Deref for Daemon {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Daemon {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

/// Starts the daemon on free ports; answers it and where its ports are, as its log says.
pub fn run(config: &str) -> (Daemon, Value) {
    let (child, lines, ready) = run_piped(config);
    // Whoever writes a log must not be stopped by nobody reading it.
    std::thread::spawn(move || lines.for_each(drop));
    (child, ready)
}

/// The same, and what else it logs.
pub fn run_piped(config: &str) -> (Daemon, Lines<BufReader<ChildStderr>>, Value) {
    let mut child =
        Daemon(command().args(["run", "--config", config]).stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines
        .by_ref()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .find(|line| line["fields"]["message"] == "ready")
        .unwrap();
    (child, lines, ready["fields"].clone())
}

/// The same, with a file for its log.
pub fn run_logging(config: &str, log: &Path) -> (Daemon, Value) {
    let file = std::fs::File::create(log).unwrap();
    let child = Daemon(command().args(["run", "--config", config]).stderr(file).spawn().unwrap());
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(ready) = logged(log).into_iter().find(|line| line["message"] == "ready") {
            return (child, ready);
        }
        assert!(Instant::now() < until, "not ready");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whole lines of a log in JSON, their fields.
pub fn logged(log: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(log).unwrap();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.map(|line| line["fields"].clone()).collect()
}

pub fn any_ports(config: &str) {
    let text = std::fs::read_to_string(config).unwrap()
        + "\nlisten = \"127.0.0.1:0\"\nmanagement-listen = \"127.0.0.1:0\"\nmetrics-listen = \"127.0.0.1:0\"\nlog-format = \"json\"\n";
    std::fs::write(config, text).unwrap();
}

#[test]
fn from_nothing_to_a_token() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    let mode = std::fs::metadata(dir.path().join("vault.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = ["init", "--dir", dir.path().to_str().unwrap(), "--vault", "/nowhere/vault", "--name", "a"];
    let (ok, refused) = json(&again);
    assert!(!ok && refused["error"]["code"] == "HW-1315", "{refused}");

    let (ok, token) = json(&["token", "create", "--config", &config, "--ttl", "5m"]);
    assert!(ok);
    let text = token["token"].as_str().unwrap();
    text.parse::<highwater_wire::enroll::Token>().unwrap();
    assert_eq!(token["command"], "highwater-agent enroll https://127.0.0.1 -");
    let said = command().args(["token", "create", "--config", &config]).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.lines().any(|line| line.trim() == "highwater-agent enroll https://127.0.0.1 -"), "{said}");
    assert!(said.lines().last().unwrap().parse::<highwater_wire::enroll::Token>().is_ok(), "{said}");
    for ttl in ["59s", "31days", "0s", "x"] {
        let output = command().args(["token", "create", "--config", &config, "--ttl", ttl]).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && (text.contains("1min to 30days") || ttl == "x"), "{text}");
    }
    assert_eq!(token["ttl-seconds"], 300);

    assert!(json(&["config", "check", "--config", &config]).0);
    let (_, shown) = json(&["config", "show", "--effective", "--config", &config]);
    assert_eq!((&shown["listen"], &shown["window"]), (&"0.0.0.0:9443".into(), &"4MiB".into()));
    assert_eq!(shown["certificate-validity"], "365days");
    std::fs::write(&config, std::fs::read_to_string(&config).unwrap() + "\nwindw = \"1MiB\"\n").unwrap();
    let (ok, refused) = json(&["config", "check", "--config", &config]);
    assert!(
        !ok && refused["error"]["code"] == "HW-1313" && refused.to_string().contains("windw"),
        "{refused}"
    );
}

#[test]
fn the_daemon_is_stopped_killed_and_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let runtime = tokio::runtime::Runtime::new().unwrap();

    let (mut child, ports) = run(&config);
    // The token is made while the daemon runs.
    let (_, token) = json(&["token", "create", "--config", &config]);
    let token = token["token"].as_str().unwrap().parse().unwrap();
    let url = format!("https://{}", ports["management"].as_str().unwrap());
    let enrolled = runtime.block_on(enroll(&url, &token, "h")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();

    let (mut child, ports) = run(&config);
    let hello = highwater_wire::message::Hello {
        machine: enrolled.identity.machine,
        version_min: 1,
        version_max: 1,
        agent_version: String::new(),
        host_name: String::new(),
        kernel: String::new(),
    };
    let endpoint = ports["ingest"].as_str().unwrap();
    let session =
        runtime.block_on(highwater_wire::connect(endpoint, "127.0.0.1", &enrolled.identity, hello)).unwrap();
    let begun = Instant::now();
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(8));
    drop(session);
}

/// Delivers points without an end until the collector is gone. Answers the last commit acknowledged as stored.
async fn deliver_until_gone(agent: &mut Agent, disk: DiskId) -> CommitId {
    let mut stored = agent.welcome.last_commit;
    loop {
        let delta = DeltaId::new();
        let seed = stored.next().0 as u8;
        let chunk = agent.chunk(disk, 0, &[seed; 8]);
        let commit = highwater_wire::message::DeltaCommit { delta, chunks: 1, kind: point(disk) };
        let sent = async {
            agent.sender.send(&AgentMessage::DeltaBegin(delta)).await?;
            agent.sender.send_chunk(delta, &chunk).await?;
            agent.sender.send(&AgentMessage::DeltaCommit(commit)).await?;
            agent.sender.flush().await
        };
        if sent.await.is_err() {
            return stored;
        }
        loop {
            match agent.receiver.recv().await {
                Ok(CollectorMessage::Received { .. }) => {}
                Ok(CollectorMessage::Stored { commit, .. }) => {
                    stored = commit;
                    break;
                }
                _ => return stored,
            }
        }
    }
}

#[test]
fn whenever_it_is_killed_what_was_stored_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let disk = DiskId::new();
    let mut identity = None;
    let mut stored = CommitId::NONE;
    for delay_ms in [37, 5, 120, 61, 13, 90] {
        let (mut child, ports) = run(&config);
        if identity.is_none() {
            let (_, token) = json(&["token", "create", "--config", &config]);
            let token = token["token"].as_str().unwrap().parse().unwrap();
            let url = format!("https://{}", ports["management"].as_str().unwrap());
            identity = Some(runtime.block_on(enroll(&url, &token, "h")).unwrap().identity);
        }
        let identity = identity.as_ref().unwrap();
        let endpoint = ports["ingest"].as_str().unwrap();
        stored = runtime.block_on(async {
            let mut agent = Agent::connect(endpoint, identity, identity.machine).await.unwrap();
            let known = agent.welcome.last_commit;
            assert!(known >= stored, "{stored} was acknowledged, {known} is known");
            agent.disks(&[disk]).await;
            let killer = tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(delay_ms)).await;
                child.kill().unwrap();
                child.wait().unwrap();
            });
            let stored = deliver_until_gone(&mut agent, disk).await;
            killer.await.unwrap();
            stored
        });
        runtime.block_on(async {
            let key = KeySource::File(dir.path().join("vault.key"));
            let vault = Vault::unlock(local_store(&dir.path().join("vault")).unwrap(), &key).await.unwrap();
            let state = vault.machine(identity.machine).await.unwrap();
            assert!(state.last_commit >= stored);
            for point in &state.points {
                let map = vault.block_map(identity.machine, disk, point.id).await.unwrap();
                let mut out = vec![0; 8 * BLOCK_BYTES];
                map.read(BlockRange::new(0, 8), &mut out).await.unwrap();
                assert!(
                    out.chunks(BLOCK_BYTES).all(|found| found == &out[..BLOCK_BYTES]),
                    "a point is one delta's"
                );
            }
            if let Some(newest) = state.points.iter().find(|point| point.id == stored) {
                let map = vault.block_map(identity.machine, disk, newest.id).await.unwrap();
                let mut out = vec![0; BLOCK_BYTES];
                map.read(BlockRange::new(0, 1), &mut out).await.unwrap();
                assert!((0..=255).any(|seed| block(seed) == out), "content that was sent");
            }
        });
    }
    assert!(stored > CommitId::NONE, "something was stored at all");
}

#[test]
fn machines_are_listed_and_revoked_while_the_daemon_runs_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let list = || json(&["machine", "list", "--config", &config]).1["machines"].clone();
    let (mut child, ports) = run(&config);
    let url = format!("https://{}", ports["management"].as_str().unwrap());
    let enrol = |host: &str, more: &[&str]| {
        let mut words = vec!["token", "create", "--config", &config];
        words.extend(more);
        let (_, token) = json(&words);
        let enrolled =
            runtime.block_on(enroll(&url, &token["token"].as_str().unwrap().parse().unwrap(), host));
        (enrolled.unwrap().identity, token)
    };
    let (one, _) = enrol("db1", &[]);
    let (two, _) = enrol("db2", &[]);
    enrol("db2", &[]);
    let listed = list();
    assert_eq!(listed.as_array().unwrap().len(), 3);
    let of = |listed: &Value, id: &str| {
        listed.as_array().unwrap().iter().find(|machine| machine["machine"] == id).unwrap().clone()
    };
    let id = one.machine.to_string();
    let row = of(&listed, &id);
    assert_eq!(
        (&row["host"], &row["state"], &row["generation"]),
        (&"db1".into(), &"enrolled".into(), &0.into())
    );
    let days = row["expires-ms"].as_u64().unwrap().saturating_sub(now_ms()) / 86_400_000;
    assert_eq!(days, 364, "a year, of which moments have passed");

    let endpoint = ports["ingest"].as_str().unwrap();
    let mut agent = runtime.block_on(Agent::connect(endpoint, &one, one.machine)).unwrap();
    let (ok, revoked) = json(&["machine", "revoke", "db1", "--reason", "stolen", "--config", &config]);
    assert!(ok && revoked["revoked"] == true && revoked["was-revoked"] == false, "{revoked}");
    let begun = Instant::now();
    let refusal = runtime.block_on(agent.refusal());
    assert!(refusal.code == 1119 && begun.elapsed() < Duration::from_secs(5), "{refusal:?}");
    assert_eq!(json(&["machine", "revoke", &id, "--config", &config]).1["was-revoked"], true);
    let begin = &two.machine.to_string()[..13];
    for (text, code) in [("db2", "HW-1328"), ("db3", "HW-1328"), ("", "HW-1328"), (begin, "")] {
        let (ok, answer) = json(&["machine", "revoke", text, "--config", &config]);
        assert_eq!((ok, answer["error"]["code"].as_str().unwrap_or("")), (code.is_empty(), code), "{answer}");
        assert!(ok || answer["error"]["action"].as_str().unwrap().contains("machine list"));
    }
    child.kill().unwrap();
    child.wait().unwrap();

    let (mut child, ports) = run(&config);
    let endpoint = ports["ingest"].as_str().unwrap();
    let refused = runtime.block_on(Agent::connect(endpoint, &one, one.machine)).err().unwrap();
    assert_eq!(refused.code(), 1119);
    let row = of(&list(), &id);
    assert_eq!((&row["state"], &row["expires-ms"]), (&"revoked".into(), &Value::Null));
    let text = command().args(["machine", "list", "--config", &config]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.lines().any(|l| l.starts_with(&id) && l.contains("db1") && l.contains("revoked")), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn nothing_that_a_machine_says_becomes_a_line_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let text =
        std::fs::read_to_string(&config).unwrap().replace("log-format = \"json\"", "log-format = \"text\"");
    std::fs::write(&config, text).unwrap();
    let log = dir.path().join("log");
    let child = command()
        .args(["run", "--config", &config])
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut child = Daemon(child);
    let said = |what: &str| {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let text = std::fs::read_to_string(&log).unwrap();
            if text.contains(what) {
                return text;
            }
            assert!(Instant::now() < until, "{what} is not in\n{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let ready = said(" ready ");
    let port = |name: &str| {
        let (_, rest) = ready.split_once(&format!("{name}=")).unwrap();
        rest.split_whitespace().next().unwrap().to_owned()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_, token) = json(&["token", "create", "--config", &config]);
    let token = token["token"].as_str().unwrap().parse().unwrap();
    let url = format!("https://{}", port("management"));
    const FORGED: &str = "x\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2J\r";
    runtime.block_on(async {
        let enrolled = enroll(&url, &token, "h").await.unwrap();
        let hello = highwater_wire::message::Hello {
            machine: enrolled.identity.machine,
            version_min: 1,
            version_max: 2,
            agent_version: FORGED.to_owned(),
            host_name: FORGED.to_owned(),
            kernel: FORGED.to_owned(),
        };
        let (_, mut sender, mut receiver) =
            highwater_wire::connect(&port("ingest"), "127.0.0.1", &enrolled.identity, hello).await.unwrap();
        let mut disk = crate::support::info(DiskId::new());
        disk.name = FORGED.to_owned();
        sender.send(&AgentMessage::Disks(vec![disk])).await.unwrap();
        sender.flush().await.unwrap();
        let CollectorMessage::Refused(refusal) = receiver.recv().await.unwrap() else { panic!() };
        assert_eq!(refusal.code, 1219);
        assert!(!refusal.cause.chars().any(char::is_control), "{refusal:?}");
    });
    let text = said("session ended");
    assert!(text.contains("forged"), "what was said is there: {text}");
    for line in text.lines() {
        assert!(!line.starts_with("2026-01-01T00:00:00Z") && !line.contains(['\u{1b}', '\r']), "{line:?}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn everything_wrong_with_a_configuration_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    let good = std::fs::read_to_string(&config).unwrap();
    let bad = good
        .replace("[\"127.0.0.1\"]", "[\"a b\", \"https://c\", \"d:443\", \"\", \"::1\", \"e.example\"]")
        + "listen = \"9443\"\nwindw = 1\nidle-timeout = \"x\"\nwindow = \"1KiB\"\n";
    std::fs::write(&config, &bad).unwrap();
    let (ok, told) = json(&["config", "check", "--config", &config]);
    let problems = told["error"]["problems"].as_array().unwrap();
    assert!(!ok && problems.len() == 8, "{problems:#?}");
    for (key, part) in [
        ("names", "\"a b\" is no"),
        ("names", "it is a URL"),
        ("names", "no port is wanted"),
        ("names", "it is empty"),
        ("listen", "\"9443\" is no address; write it like \"0.0.0.0:9443\""),
        ("windw", "is no setting"),
        ("idle-timeout", "\"x\" is no time"),
        ("window", "must be"),
    ] {
        let line = bad.lines().position(|line| line.starts_with(&format!("{key} ="))).unwrap() + 1;
        let found = problems
            .iter()
            .any(|p| p["key"] == key && p["line"] == line && p["message"].as_str().unwrap().contains(part));
        assert!(found, "{key}: {part}: {problems:#?}");
    }
    assert!(problems.is_sorted_by_key(|p| p["line"].as_u64()), "{problems:#?}");

    // What it names is looked at too.
    std::fs::write(&config, good.replace("/vault\"", "/no-vault\"")).unwrap();
    std::fs::set_permissions(dir.path().join("vault.key"), PermissionsExt::from_mode(0o644)).unwrap();
    let (_, told) = json(&["config", "check", "--config", &config]);
    let problems = told["error"]["problems"].to_string();
    assert!(problems.contains("mode 644") && problems.contains("there is no vault in"), "{problems}");
    std::fs::write(&config, "names = [").unwrap();
    let text = json(&["config", "check", "--config", &config]).1["error"]["cause"].to_string();
    assert!(text.contains("line 1: ") && !text.contains(" | "), "{text}");
    std::fs::remove_file(&config).unwrap();
    let error = json(&["config", "check", "--config", &config]).1["error"].clone();
    assert_eq!(error["code"], "HW-1333");
    assert!(error["action"].as_str().unwrap().contains("init"), "{error}");
}

#[test]
fn init_makes_the_same_modes_under_every_umask_and_refuses_what_it_cannot_use() {
    let dir = tempfile::tempdir().unwrap();
    let (etc, vault) = (dir.path().join("a/etc"), dir.path().join("b/var/vault"));
    let run = |name: &str| {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "umask 077; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_highwater-collector"),
            "--json",
            "init",
        ]);
        let output =
            command.arg("--dir").arg(&etc).arg("--vault").arg(&vault).args(["--name", name]).output();
        serde_json::from_slice::<Value>(&output.unwrap().stdout).unwrap()
    };
    for name in ["", "a b", "https://a", "a:443"] {
        assert_eq!(run(name)["error"]["code"], "HW-1331", "{name}");
    }
    std::fs::create_dir_all(&vault).unwrap();
    std::fs::write(vault.join("x"), "").unwrap();
    assert_eq!(run("a")["error"]["code"], "HW-1332");
    std::fs::remove_dir_all(dir.path().join("b")).unwrap();
    assert!(!etc.exists(), "nothing was made");
    assert_eq!(run("a.example")["error"], Value::Null);
    for (path, mode) in [
        ("a", 0o755),
        ("a/etc", 0o755),
        ("a/etc/collector.toml", 0o640),
        ("a/etc/vault.key", 0o600),
        ("b", 0o755),
        ("b/var", 0o755),
        ("b/var/vault", 0o700),
        ("b/var/vault/vault.json", 0o600),
        ("b/var/vault/control", 0o700),
    ] {
        let found = std::fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(found, mode, "{path}: {found:o}");
    }
}

#[test]
fn a_passphrase_or_a_command_opens_the_vault_instead_of_a_key_file() {
    let dir = tempfile::tempdir().unwrap();
    let secret = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let phrase = secret("phrase", "correct horse battery\n");
    let kms = secret("kms", r#"case "$2" in wrap) printf 'blob:'; cat;; unwrap) cut -d: -f2;; esac"#);
    let command = format!("/bin/sh {kms} --key=1");
    let init = |name: &str, option: &str, value: &str| {
        let place = dir.path().join(name);
        let (etc, vault) = (place.join("etc"), place.join("vault"));
        let (etc, vault) = (etc.to_str().unwrap(), vault.to_str().unwrap());
        json(&["init", "--dir", etc, "--vault", vault, "--name", "127.0.0.1", option, value])
    };
    for (name, option, value) in [("a", "--passphrase-file", &phrase), ("b", "--key-command", &command)] {
        let (ok, made) = init(name, option, value);
        assert!(ok && made["key-file"].is_null(), "{made}");
        assert!(!dir.path().join(name).join("etc/vault.key").exists());
        let config = made["config"].as_str().unwrap();
        assert!(json(&["config", "check", "--config", config]).0);
        any_ports(config);
        drop(run(config));
        let (ok, token) = json(&["token", "create", "--config", config]);
        assert!(ok, "{token}");
    }
    // What cannot be used makes nothing; what was right and is no more is told.
    for (option, value, code) in [
        ("--passphrase-file", dir.path().join("none").to_str().unwrap(), "HW-1231"),
        ("--passphrase-file", &secret("short", "short"), "HW-1231"),
        ("--key-command", "/bin/false", "HW-1230"),
        ("--key-command", &format!("{kms} wrap"), "HW-1230"),
    ] {
        let (ok, refused) = init("c", option, value);
        assert!(!ok && refused["error"]["code"] == code, "{option} {value}: {refused}");
        assert!(!dir.path().join("c/etc/collector.toml").exists());
        assert!(!dir.path().join("c/vault/vault.json").exists());
    }
    std::fs::set_permissions(&phrase, PermissionsExt::from_mode(0o644)).unwrap();
    let config = dir.path().join("a/etc/collector.toml");
    let (_, told) = json(&["config", "check", "--config", config.to_str().unwrap()]);
    let problem = &told["error"]["problems"][0];
    assert!(
        problem["key"] == "passphrase-file" && problem["message"].to_string().contains("mode 644"),
        "{told}"
    );
    std::fs::remove_file(&kms).unwrap();
    let config = dir.path().join("b/etc/collector.toml");
    let (_, told) = json(&["token", "create", "--config", config.to_str().unwrap()]);
    assert_eq!(told["error"]["code"], "HW-1230", "{told}");
}

#[test]
fn a_port_in_use_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("listen = \"{}\"\nmanagement", taken.local_addr().unwrap());
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("listen = \"127.0.0.1:0\"\nmanagement", &port)).unwrap();
    let output = command().args(["run", "--config", &config]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("HW-1314"), "{text}");
    assert_eq!(text.matches("Address already in use").count(), 1, "{text}");
}

#[test]
fn the_manual_and_the_completions_know_every_command() {
    let said = |words: &[&str]| String::from_utf8(command().args(words).output().unwrap().stdout).unwrap();
    let page = said(&["man"]);
    for part in ["HIGHWATER-COLLECTOR TOKEN CREATE", "\\-\\-ttl", "\\-\\-reason", "\\-\\-effective"] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    assert!(said(&["completions", "bash"]).contains("--reason"));
    assert!(said(&["help"]).contains("completions"));
}
