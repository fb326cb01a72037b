//! What peers can make the collector write into its log.

use crate::command::{any_ports, init, json, logged, run_logging, run_piped};
use crate::support::{Agent, point};
use highwater_delta::{CommitKind, DeltaId, DiskId, PointDisk};
use highwater_wire::enroll::enroll;
use highwater_wire::message::AgentMessage;
use serde_json::Value;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Reconnects of one machine, and visits of one stranger.
const TIMES: usize = 60;

#[test]
fn reconnecting_in_a_loop_fills_no_log_and_hides_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let log = dir.path().join("log");
    let (_child, ready) = run_logging(&config, &log);
    let address = |port: &str| ready[port].as_str().unwrap().to_owned();
    let (url, ingest) = (format!("https://{}", address("management")), address("ingest"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let identity = |host: &'static str| {
        let (_, token) = json(&["token", "create", "--config", &config]);
        let token = token["token"].as_str().unwrap().parse().unwrap();
        runtime.block_on(enroll(&url, &token, host)).unwrap().identity
    };
    let (restless, honest) = (identity("restless"), identity("honest"));
    runtime.block_on(async {
        for _ in 0..TIMES {
            let agent = Agent::connect(&ingest, &restless, restless.machine).await.unwrap();
            agent.sender.close().await.unwrap();
            nonsense(TcpStream::connect(&ingest).await.unwrap()).await;
        }
        // The other machine, and a stranger from elsewhere, after all that.
        Agent::connect(&ingest, &honest, honest.machine).await.unwrap().sender.close().await.unwrap();
        let elsewhere = TcpSocket::new_v4().unwrap();
        elsewhere.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        nonsense(elsewhere.connect(ingest.parse().unwrap()).await.unwrap()).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        Agent::connect(&ingest, &restless, restless.machine).await.unwrap();
    });
    let lines = logged(&log);
    let of = |machine: highwater_delta::MachineId| {
        lines.iter().filter(move |line| {
            line["machine"] == machine.to_string()
                && line["message"].as_str().is_some_and(|said| said.starts_with("session"))
        })
    };
    let said = of(restless.machine).count();
    assert!((20..=26).contains(&said), "{said} lines of one machine");
    let left_out: u64 = of(restless.machine).filter_map(|line| line["left_out"].as_u64()).sum();
    assert!(left_out as usize + said >= 2 * TIMES, "{said} lines, and {left_out} left out");
    assert!(of(honest.machine).any(|line| line["message"] == "session begun"));
    assert!(of(honest.machine).any(|line| line["message"] != "session begun"), "its end");
    let strangers: Vec<&Value> =
        lines.iter().filter(|line| line["message"] == "a client was turned away").collect();
    assert!((21..=24).contains(&strangers.len()), "{}", strangers.len());
    assert!(
        strangers.iter().any(|line| line["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.2:")))
    );
}

#[test]
fn a_history_near_its_limit_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let more = "memory = \"32MiB\"\nwindow = \"1MiB\"\ncommits-per-minute = 1000000\n";
    std::fs::write(&config, std::fs::read_to_string(&config).unwrap() + more).unwrap();
    let log = dir.path().join("log");
    let (mut child, ready) = run_logging(&config, &log);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_, token) = json(&["token", "create", "--config", &config]);
    let token = token["token"].as_str().unwrap().parse().unwrap();
    let url = format!("https://{}", ready["management"].as_str().unwrap());
    let identity = runtime.block_on(enroll(&url, &token, "h")).unwrap().identity;
    let warned = || logged(&log).iter().filter(|line| line["code"] == "HW-1337").count();
    let disks: Vec<_> = (0..256).map(|_| DiskId::new()).collect();
    let history = async |points: usize| {
        let ingest = ready["ingest"].as_str().unwrap();
        let mut agent = Agent::connect(ingest, &identity, identity.machine).await.unwrap();
        agent.disks(&disks).await;
        for _ in 0..points {
            let CommitKind::Point(mut info) = point(disks[0]) else { panic!() };
            info.disks = disks.iter().map(|disk| PointDisk { disk: *disk, size_bytes: 4096 }).collect();
            let delta = DeltaId::new();
            agent.send(AgentMessage::DeltaBegin(delta)).await;
            agent.commit(delta, 0, CommitKind::Point(info)).await;
            agent.stored().await;
        }
    };
    // Each point takes some 9 KiB of 4 MiB.
    runtime.block_on(history(200));
    assert_eq!(warned(), 0);
    runtime.block_on(async {
        history(150).await;
        history(10).await;
        history(10).await;
    });
    assert_eq!(warned(), 1, "once, however many sessions and commits there are");
    // Whoever starts a collector is told as well.
    child.kill().unwrap();
    child.wait().unwrap();
    let (_child, _) = run_logging(&config, &log);
    assert_eq!(warned(), 1);
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = init(dir.path());
    any_ports(&config);
    let (mut child, lines, ready) = run_piped(&config);
    // From now on each line fails, as on a disk that is full.
    drop(lines);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for port in ["ingest", "management"] {
            nonsense(TcpStream::connect(ready[port].as_str().unwrap()).await.unwrap()).await;
        }
    });
    let (_, token) = json(&["token", "create", "--config", &config]);
    let token = token["token"].as_str().unwrap().parse().unwrap();
    let url = format!("https://{}", ready["management"].as_str().unwrap());
    let identity = runtime.block_on(enroll(&url, &token, "h")).unwrap().identity;
    let ingest = ready["ingest"].as_str().unwrap();
    runtime.block_on(Agent::connect(ingest, &identity, identity.machine)).unwrap();
    assert!(child.try_wait().unwrap().is_none());
}

/// Says something that is no handshake, and waits until it is turned away.
async fn nonsense(mut stream: TcpStream) {
    let _ = stream.write_all(&[0x16, 3, 1, 0, 1, 0xff]).await;
    let _ = stream.write_all(&[0xff; 64]).await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
}
