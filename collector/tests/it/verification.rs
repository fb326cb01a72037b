//! The vault is verified by its collector, over restarts, and damage is told.

use crate::support::{Site, point};
use highwater_collector::{Collector, Config};
use highwater_delta::{DeltaId, DiskId};
use highwater_vault::verify::resume;
use highwater_wire::message::AgentMessage;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For what is to come; long, since it only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(60);

fn often(dir: &Path) -> impl FnOnce(&mut Config) {
    move |config| {
        config.verify_every = Duration::from_secs(1);
        config.state_dir = Some(dir.to_owned());
    }
}

/// Some points of some machines; answers the segments.
async fn filled(site: &Site, machines: usize) -> Vec<PathBuf> {
    let mut segments = Vec::new();
    for _ in 0..machines {
        let identity = site.machine().await;
        let disk = DiskId::new();
        let mut agent = site.agent(&identity, disk).await;
        for n in 0..3 {
            let delta = DeltaId::new();
            agent.send(AgentMessage::DeltaBegin(delta)).await;
            let chunk = agent.chunk(disk, n, &[n as u8 + 1, 7]);
            agent.push(delta, &chunk).await;
            agent.commit(delta, 1, point(disk)).await;
            agent.stored().await;
        }
        let dir = site.vault_dir().join(format!("machines/{}/segments", identity.machine));
        segments.extend(fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()));
    }
    segments
}

fn value(metrics: &str, name: &str) -> f64 {
    let name = format!("highwater_collector_{name} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
}

async fn until(site: &Site, what: &str, is: impl Fn(&str) -> bool) -> String {
    let asked = async {
        loop {
            let metrics = site.metrics().await;
            if is(&metrics) {
                return metrics;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(GUARD, asked).await.unwrap_or_else(|_| panic!("never: {what}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_and_told_beside_sessions() {
    let state = tempfile::tempdir().unwrap();
    let site = Site::with(often(state.path())).await;
    let segments = filled(&site, 2).await;
    let metrics = until(&site, "a whole pass", |m| {
        value(m, "verified_timestamp_seconds") > 0.0 && value(m, "verified_objects_total") >= 6.0
    })
    .await;
    assert_eq!(value(&metrics, "verification_problems"), 0.0);
    let mut bytes = fs::read(&segments[3]).unwrap();
    bytes[100] ^= 1;
    fs::write(&segments[3], &bytes).unwrap();
    until(&site, "damage", |m| value(m, "verification_problems") == 1.0).await;
    // Another start knows it before it has read anything.
    let Site { running, dir } = site;
    let mut config = running.shared.config.clone();
    running.shutdown().await;
    config.verify_every = Duration::from_secs(3600);
    assert!(state.path().join("verified").exists());
    config.verify_every = Duration::from_secs(2);
    let site = Site { running: Collector::start(config).await.unwrap(), dir };
    until(&site, "damage, still", |m| value(m, "verification_problems") == 1.0).await;
    bytes[100] ^= 1;
    fs::write(&segments[3], bytes).unwrap();
    until(&site, "repaired", |m| value(m, "verification_problems") == 0.0).await;
    site.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_goes_on_with_what_the_one_before_began() {
    let state = tempfile::tempdir().unwrap();
    let site = Site::with(|config| {
        often(state.path())(config);
        // A segment at a time, for hours.
        config.verify_rate = 1024;
    })
    .await;
    filled(&site, 4).await;
    until(&site, "something read", |m| value(m, "verified_objects_total") >= 1.0).await;
    let vault = site.vault().await;
    let Site { running, dir } = site;
    let mut config = running.shared.config.clone();
    let asked = tokio::time::Instant::now();
    running.shutdown().await;
    assert!(asked.elapsed() < GUARD, "a shutdown waits for no pass");
    let file = state.path().join("verification");
    let kept = resume::load(&file, &vault, None, Some(None)).unwrap().expect("it was kept");
    let read = kept.report().segments;
    assert!((1..12).contains(&read), "{read}");
    config.verify_rate = 0;
    let site = Site { running: Collector::start(config).await.unwrap(), dir };
    let metrics = until(&site, "the end", |m| value(m, "verified_timestamp_seconds") > 0.0).await;
    let more = value(&metrics, "verified_objects_total");
    assert_eq!(more as u64 % 12, 12 - read, "only the rest, or whole passes more");
    site.running.shutdown().await;
    // What is garbled is begun anew.
    assert!(!file.exists());
}
