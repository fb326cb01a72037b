//! The life of a machine's certificate, with real daemons: renewed by the agent in time, revoked by an operator, and bought
//! again by the machine, which is then what it was.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Random, Site, SiteOptions, command, daemon,
};
use highwater_wire::Identity;
use serde_json::Value;
use std::{
    fs, thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
const VALID: Duration = Duration::from_secs(20);

fn write(mounted: &Mounted, name: &str, seed: u64) -> Result<()> {
    let mut content = vec![0; MIB as usize];
    Random::new(seed).fill(&mut content);
    Ok(fs::write(mounted.path().join(name), content)?)
}

/// `highwater-collector`, as an operator calls it.
fn collector(arena: &Arena, words: &[&str]) -> Result<Value> {
    let config = arena.dir().join("collector/collector.toml");
    let config = config.to_string_lossy().into_owned();
    let mut all = vec!["--json"];
    all.extend(words);
    all.extend(["--config", &config]);
    let said = command::run(&daemon::program("highwater-collector")?.to_string_lossy(), &all)?;
    Ok(serde_json::from_str(&said)?)
}

fn within<T>(limit: Duration, what: &str, mut find: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let until = Instant::now() + limit;
    loop {
        if let Some(found) = find()? {
            return Ok(found);
        }
        ensure!(Instant::now() < until, "{what}: not within {limit:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_certificate_is_renewed_revoked_and_bought_again() -> Result<()> {
    let arena = Arena::enter("certificates")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    let options = SiteOptions {
        collector: vec![format!("certificate-validity = \"{}s\"", VALID.as_secs())],
        ..Default::default()
    };
    let begun = Instant::now();
    let mut site = Site::new(&arena, &options)?;
    let state_dir = arena.dir().join("state");
    let first = Identity::load(&state_dir)?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    write(&mounted, "first", 1)?;
    site.wait_replicated()?;
    site.point()?;

    // Renewed twice within one session, each time with another key, and nothing of the old ones stays.
    let mut last = first;
    for _ in 0..2 {
        let next = within(VALID, "a renewal", || {
            let now = Identity::load(&state_dir)?;
            Ok((now.cert_chain != last.cert_chain).then_some(now))
        })?;
        ensure!(next.machine == last.machine && next.key != last.key);
        last = next;
    }
    ensure!(!state_dir.join("identity.pem.new").exists());
    // Longer than the first certificate was valid: the session was opened anew with a later one.
    thread::sleep((VALID + Duration::from_secs(3)).saturating_sub(begun.elapsed()));
    write(&mounted, "second", 2)?;
    let point = within(Duration::from_secs(10), "a point", || Ok(site.point().ok()))?;
    site.assert_exact(point)?;
    let listed = collector(&arena, &["machine", "list"])?["machines"][0].clone();
    ensure!(listed["state"] == "enrolled" && listed["origin"] == "renewal", "{listed}");

    // Revoked: the running session ends with the reason, on both sides, and is not tried again.
    let machine = last.machine.to_string();
    site.allow("the collector cannot be used");
    site.allow("session ended");
    collector(&arena, &["machine", "revoke", &machine, "--reason", "test"])?;
    within(Duration::from_secs(8), "the agent is told", || {
        Ok(site.agent_log().lines().find(|l| l.contains("HW-1119")).map(str::to_owned))
    })?;
    let status = site.agent_command(&["status"])?;
    ensure!(status.contains("HW-1119") && status.contains("token create --machine"), "{status}");
    let refused =
        site.point_within(Duration::ZERO).err().context("a point of a revoked machine")?.to_string();
    ensure!(refused.contains("HW-1119") && refused.contains("token create --machine"), "{refused}");
    ensure!(site.collector.as_ref().context("it runs")?.log().contains("1119"));

    // It returns as itself: its disk is not copied anew.
    let token = collector(&arena, &["token", "create", "--machine", &machine])?;
    let command = token["command"].as_str().context("no command")?.to_owned();
    let mut words: Vec<&str> = command.split_whitespace().skip(1).collect();
    // An operator would paste it.
    ensure!(words.pop() == Some("-"), "{command}");
    words.push(token["token"].as_str().context("no token")?);
    site.stop_agent()?;
    write(&mounted, "third", 3)?;
    site.agent_command(&words)?;
    ensure!(Identity::load(&state_dir)?.machine == last.machine);
    site.start_agent()?;
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    ensure!(site.machine()? == machine, "one machine in the vault");
    site.verify()?;
    site.stop_agent()
}
