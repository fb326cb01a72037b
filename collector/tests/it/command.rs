//! The command itself, as a process.

use crate::support::{Agent, block, point};
use highwater_delta::{BLOCK_BYTES, BlockRange, CommitId, DeltaId, DiskId};
use highwater_vault::{Vault, VaultKey, local_store};
use highwater_wire::enroll::enroll;
use highwater_wire::message::{AgentMessage, CollectorMessage};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_highwater-collector"));
    command.env_remove("RUST_LOG");
    command
}

fn json(arguments: &[&str]) -> (bool, Value) {
    let output = command().arg("--json").args(arguments).output().unwrap();
    let value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)));
    (output.status.success(), value)
}

fn init(dir: &Path) -> String {
    let vault = dir.join("vault");
    let (dir, vault) = (dir.to_str().unwrap(), vault.to_str().unwrap());
    let (ok, made) = json(&["init", "--dir", dir, "--vault", vault, "--name", "127.0.0.1"]);
    assert!(ok, "{made}");
    made["config"].as_str().unwrap().to_owned()
}

/// Starts the daemon on free ports; answers it and where its ports are, as its log says.
fn run(config: &str) -> (Child, Value) {
    let mut child = command().args(["run", "--config", config]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines
        .by_ref()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .find(|line| line["fields"]["message"] == "ready")
        .unwrap();
    // Whoever writes a log must not be stopped by nobody reading it.
    std::thread::spawn(move || lines.for_each(drop));
    (child, ready["fields"].clone())
}

fn any_ports(config: &str) {
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
    assert_eq!(token["command"], format!("highwater-agent enroll https://127.0.0.1 {text}"));
    assert_eq!(token["ttl-seconds"], 300);

    assert!(json(&["config", "check", "--config", &config]).0);
    let (_, shown) = json(&["config", "show", "--effective", "--config", &config]);
    assert_eq!((&shown["listen"], &shown["window"]), (&"0.0.0.0:9443".into(), &"4MiB".into()));
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
            let key = VaultKey::load(&dir.path().join("vault.key")).unwrap();
            let vault = Vault::open(local_store(&dir.path().join("vault")).unwrap(), &key).await.unwrap();
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
