//! Replication groups: points of several machines at one instant, with machines that are killed, cut off, stopped and slowed meanwhile.

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Causal, Fleet, FleetOptions, Random, causal, fleet::DISTURBED};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const CHAINS: usize = 4;
const SLOW: &str =
    "[freeze-hook]\ncommand = [\"/bin/sh\", \"-c\", \"[ $1 != freeze ] || sleep 0.1\", \"hook\"]\n";

fn is_long() -> bool {
    std::env::var_os("HIGHWATER_TEST_LONG").is_some()
}

/// Recovers each machine's point of a group's point, and holds it against the chains.
fn check_point(fleet: &Fleet, point: &Value) -> Result<Vec<u64>> {
    let marker = point["point"].as_str().context("a marker")?;
    let dir = tempfile::Builder::new().prefix("hwtest-recovered-").tempdir_in("/dev/shm")?;
    let members = point["members"].as_array().context("members")?;
    ensure!(members.len() == fleet.nodes.len(), "{marker} has {} members", members.len());
    let mut images = vec![];
    for node in &fleet.nodes {
        let member = members.iter().find(|member| member["machine"] == node.id).context("a member lacks")?;
        let (to, number) = (dir.path().join(&node.id), member["point"].to_string());
        fleet.hq.operator(&["recover", &node.id, "--point", &number, "--to", &to.to_string_lossy()])?;
        images.push(to.join("data.img"));
    }
    causal::check(&images, CHAINS).with_context(|| format!("group point {marker}"))
}

/// Waits until the group has so many points.
fn wait_points(fleet: &Fleet, count: usize, limit: Duration) -> Result<Vec<Value>> {
    let until = Instant::now() + limit;
    loop {
        let points = fleet.hq.group_points("shop")?;
        if points.len() >= count {
            return Ok(points);
        }
        if Instant::now() > until {
            let logs: Vec<String> = (0..fleet.nodes.len()).map(|at| fleet.agent_log(at)).collect();
            anyhow::bail!(
                "{} points of the group, {count} were awaited\n{}",
                points.len(),
                logs.join("\n----\n")
            );
        }
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn no_point_holds_an_effect_without_its_cause() -> Result<()> {
    let arena = Arena::enter("groups")?;
    // One is slower to freeze than the others: whoever did not wait for it would be thawed long before.
    let options = FleetOptions {
        ordered: vec![0, 2],
        agent: |at| if at == 3 { SLOW.to_owned() } else { String::new() },
        ..FleetOptions::default()
    };
    let mut fleet = Fleet::new(&arena, &options)?;
    // Agents that are killed and stopped, several on one kernel: told, and compared with the vault.
    for warning in DISTURBED.iter().chain(&["HW-1460"]) {
        fleet.allow(warning);
    }
    fleet.group("shop", &[0, 1, 2, 3, 4], &["--crash-every", "1s"])?;
    let places: Vec<_> = fleet.nodes.iter().map(|node| node.mounted.path().to_path_buf()).collect();
    let places: Vec<&Path> = places.iter().map(std::path::PathBuf::as_path).collect();
    let causal = Causal::start(&places, CHAINS, 150)?;
    // Undisturbed first.
    wait_points(&fleet, 5, Duration::from_secs(60))?;
    let seed = std::env::var("HIGHWATER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("HIGHWATER_SEED={seed}");
    let mut random = Random::new(seed);
    let begun = Instant::now();
    let limit = Duration::from_secs(if is_long() { 600 } else { 45 });
    let mut disturbances = [0; 5];
    while begun.elapsed() < limit {
        let at = random.below(5) as usize;
        let how = random.below(5) as usize;
        disturbances[how] += 1;
        match how {
            0 => {
                fleet.kill_agent(at)?;
                thread::sleep(Duration::from_millis(random.below(1500)));
                fleet.start_agent(at)?;
            }
            1 => {
                fleet.lan.set_connected(at, false)?;
                thread::sleep(Duration::from_millis(200 + random.below(2500)));
                fleet.lan.set_connected(at, true)?;
            }
            2 => {
                fleet.lan.set_rate(at, Some(64))?;
                thread::sleep(Duration::from_millis(500 + random.below(2500)));
                fleet.lan.set_rate(at, None)?;
            }
            3 => {
                let agent = fleet.nodes[at].agent.as_ref().context("no agent")?;
                agent.signal(Signal::SIGSTOP)?;
                thread::sleep(Duration::from_millis(random.below(2000)));
                agent.signal(Signal::SIGCONT)?;
            }
            _ => {
                fleet.hq.kill()?;
                thread::sleep(Duration::from_millis(random.below(500)));
                fleet.hq.start()?;
            }
        }
        // Time for some points in between.
        thread::sleep(Duration::from_millis(1500 + random.below(4000)));
    }
    let before = fleet.hq.group_points("shop")?.len();
    let points = wait_points(&fleet, before + 3, Duration::from_secs(90))?;
    let (writes, slowest) = causal.stop()?;
    println!(
        "{} points of the group, {writes} writes, the slowest {slowest:?}; disturbances {disturbances:?}",
        points.len()
    );
    let mut held = BTreeSet::new();
    for point in &points {
        held.insert(check_point(&fleet, point)?);
    }
    // They are of different instants, or nothing would have been shown.
    ensure!(held.len() > points.len() / 2, "{held:?}");
    // A freeze ends by its deadline, which is 10 s, and its guardian's second.
    ensure!(slowest < Duration::from_secs(12), "a write took {slowest:?}");
    fleet.hq.operator(&["verify"]).map(drop)
}

/// Asks for a point of the group, and answers it.
fn asked_for(fleet: &Fleet, kind: &str) -> Result<Value> {
    fleet.hq.asked(&["point", "create", kind, "--group", "shop", "--timeout", "60s"])
}

fn members(point: &Value) -> usize {
    point["members"].as_array().map_or(0, Vec::len)
}

/// As long as it is there, a machine's freeze takes longer than the group waits.
struct Late(std::path::PathBuf);

impl Late {
    fn path(at: usize) -> std::path::PathBuf {
        format!("/dev/shm/hwtest-late-{}-{at}", std::process::id()).into()
    }
    fn new(at: usize) -> Result<Self> {
        std::fs::write(Self::path(at), "")?;
        Ok(Self(Self::path(at)))
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

fn late_freeze(at: usize) -> String {
    let wait = format!("[ $1 != freeze ] || [ ! -e {} ] || sleep 4", Late::path(at).display());
    format!("[freeze-hook]\ncommand = [\"/bin/sh\", \"-c\", \"{wait}\", \"hook\"]\n")
}

/// On demand, in either mode; members come and go, one is away, one takes another's place; with applications.
#[test]
fn a_group_lives() -> Result<()> {
    let arena = Arena::enter("groups-life")?;
    let agent = |at| if at < 2 { late_freeze(at) } else { String::new() };
    let options = FleetOptions { machines: 3, ordered: vec![1], agent, ..FleetOptions::default() };
    let mut fleet = Fleet::new(&arena, &options)?;
    for warning in DISTURBED.iter().chain(&["HW-1498"]) {
        fleet.allow(warning);
    }
    let never = ["--crash-every", "never", "--application-every", "never", "--prepare", "5s"];
    fleet.group("shop", &[0, 1], &never)?;
    for at in [0, 1] {
        fleet.wait(at, "its group", |status| status["group"]["listening"].is_string())?;
    }
    let first = asked_for(&fleet, "--crash")?;
    ensure!(members(&first) == 2 && first["consistency"] == "filesystem", "{first:#}");

    // One more, online.
    fleet.hq.operator(&["group", "add", "shop", &fleet.nodes[2].id])?;
    for at in 0..3 {
        fleet.wait(at, "three members", |status| status["group"]["members"] == 3)?;
    }
    let second = asked_for(&fleet, "--crash")?;
    ensure!(members(&second) == 3, "{second:#}");

    // One takes so long that the others have gone on: it freezes nothing then, whatever mode it is in.
    for at in 0..2 {
        let late = Late::new(at)?;
        let refused = asked_for(&fleet, "--crash").err().context("there is a point")?.to_string();
        ensure!(refused.contains("not frozen within half of the group's --hold"), "{refused}");
        drop(late);
        let until = Instant::now() + Duration::from_secs(10);
        while !fleet.agent_log(at).contains("had given up its point before all was frozen here") {
            ensure!(Instant::now() < until, "{}", fleet.agent_log(at));
            thread::sleep(Duration::from_millis(50));
        }
        // Its own points go on.
        fleet.agent(at, &["point"])?;
    }
    let third = asked_for(&fleet, "--crash")?;
    ensure!(members(&third) == 3, "{third:#}");

    // A machine's own hook fails: it is named, and there is none. It is the second, of three of one name.
    let hook = fleet.hooks_dir(1).join("10-database");
    std::fs::create_dir(fleet.hooks_dir(1))?;
    let write = |text: &str| -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        // The one before may be running still. What begins with a dot is no hook.
        let new = hook.with_file_name(".new");
        std::fs::write(&new, format!("#!/bin/sh\n{text}\n"))?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))?;
        Ok(std::fs::rename(&new, &hook)?)
    };
    write("[ $1 = thaw ] || exit 3")?;
    let refused = asked_for(&fleet, "--application").err().context("there is a point")?.to_string();
    ensure!(refused.contains("could not prepare"), "{refused}");
    // It does what it should.
    write("exit 0")?;
    let fourth = asked_for(&fleet, "--application")?;
    ensure!(members(&fourth) == 3 && fourth["consistency"] == "application", "{fourth:#}");
    // Its application did not stand still until the end.
    thread::sleep(Duration::from_secs(3));
    write("[ $1 = freeze ] || exit 4")?;
    let refused = asked_for(&fleet, "--application").err().context("there is a point")?.to_string();
    println!("{refused}");
    ensure!(fleet.hq.group_points("shop")?.len() == 4);

    // All of them recover, or some, and it is said what that means.
    let dir = tempfile::Builder::new().prefix("hwtest-recovered-").tempdir_in("/dev/shm")?;
    let to = dir.path().to_string_lossy().into_owned();
    fleet.hq.operator(&["recover", "--group", "shop", "--point", "latest-application", "--to", &to])?;
    let recovered = std::fs::read_dir(dir.path())?.count();
    ensure!(recovered == 3, "{recovered} machines");

    // The first in line is away: nobody else's are frozen for long, and it is told who is missed.
    fleet.kill_agent(0)?;
    let refused = asked_for(&fleet, "--crash").err().context("there is a point")?.to_string();
    println!("{refused}");
    ensure!(refused.contains("no answer in time"), "{refused}");
    // Without it, another takes its place.
    fleet.hq.operator(&["group", "remove", "shop", &fleet.nodes[0].id])?;
    for at in 1..3 {
        fleet.wait(at, "two members", |status| status["group"]["members"] == 2)?;
    }
    let until = Instant::now() + Duration::from_secs(60);
    let fifth = loop {
        match asked_for(&fleet, "--crash") {
            Ok(point) => break point,
            Err(error) => ensure!(Instant::now() < until, "{error:#}"),
        }
    };
    ensure!(members(&fifth) == 2, "{fifth:#}");
    // It comes back, and belongs to none: it learns so from its collector.
    fleet.start_agent(0)?;
    fleet.wait(0, "no group", |status| status["group"].is_null())?;
    // A point of one machine alone, asked for in the same way.
    let own = fleet.hq.asked(&[
        "point",
        "create",
        "--crash",
        "--machine",
        &fleet.nodes[0].id,
        "--timeout",
        "60s",
    ])?;
    ensure!(own["machine"] == fleet.nodes[0].id, "{own:#}");
    // Where the kernel does not count, nobody can tell that nothing was written.
    fleet.count_io(1, false)?;
    let refused = asked_for(&fleet, "--crash").err().context("there is a point")?.to_string();
    fleet.count_io(1, true)?;
    ensure!(refused.contains("could not freeze"), "{refused}");
    fleet.hq.operator(&["verify"]).map(drop)
}
