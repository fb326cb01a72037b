//! Daemons killed at any moment, replaced under load, and a vault without space: writers are not held up, what was stored
//! stays recoverable, and the next point is exact.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, Random, Site, SiteOptions, daemon, write_all_within,
};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const MIB: u64 = 1 << 20;
const AGENT_KILLS: u64 = 50;
const COLLECTOR_KILLS: u64 = 15;
/// Writers may wait so long for a filesystem whose agent was killed (invariant I1).
const THAW_MAX: Duration = Duration::from_secs(1);

/// A point is due every second; a slow machine may take longer to come to one after a start.
const FREEZE_WITHIN: Duration = Duration::from_secs(20);

/// `HIGHWATER_TEST_SEED` repeats a run, as far as the machine does.
fn seeded() -> Result<Random> {
    let seed = match std::env::var("HIGHWATER_TEST_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    println!("HIGHWATER_TEST_SEED={seed}");
    Ok(Random::new(seed))
}

/// A point every second, and a first copy that takes its time.
fn every_second() -> SiteOptions {
    let replication = ["bandwidth = \"16MiB\"", "partial-commit = \"1MiB\"", "freeze-deadline = \"10s\""];
    SiteOptions {
        point_interval: "1s".into(),
        replication: replication.map(String::from).to_vec(),
        ..SiteOptions::default()
    }
}

/// Fills a file with what does not compress.
fn fill(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let mut piece = vec![0; MIB as usize];
    let mut file = File::create(path)?;
    for _ in 0..bytes / MIB {
        random.fill(&mut piece);
        file.write_all(&piece)?;
    }
    Ok(file.sync_all()?)
}

/// How often a text stands in a log.
fn count(log: &str, text: &str) -> usize {
    log.matches(text).count()
}

#[test]
fn the_agent_is_killed_at_any_moment() -> Result<()> {
    let arena = Arena::enter("agent-killed")?;
    let mut random = seeded()?;
    let (a, b) = (LoopDisk::new(Backing::Tmpfs, 128 * MIB)?, LoopDisk::new(Backing::Tmpfs, 320 * MIB)?);
    let (data, log) = (Mounted::make(FileSystem::Ext4, a.path())?, Mounted::make(FileSystem::Xfs, b.path())?);
    fill(&data.path().join("content"), 64 * MIB, 1)?;
    let mut site = Site::new(&arena, &every_second())?;
    site.allow("no recovery point this time");
    // Guardian and successor both see to it; which one is first is a matter of chance.
    site.allow("HW-1475");
    site.allow("session ended");
    site.start_agent()?;
    site.protect(a.path(), "data")?;
    site.protect(b.path(), "log")?;
    let loads = [Load::start(data.path(), 1)?, Load::start(log.path(), 2)?];
    let (mut slowest, mut copying) = (Duration::ZERO, 0);
    for kill in 0..AGENT_KILLS {
        // Every other one within a freeze, once there are any; the others wherever they fall, the start included.
        if kill % 2 == 1 {
            let frozen_before = site.agent_log().contains("recovery point stored");
            let patience = if frozen_before { FREEZE_WITHIN } else { Duration::from_millis(900) };
            let until = Instant::now() + patience;
            while Instant::now() < until {
                if site.is_copying() {
                    thread::sleep(Duration::from_millis(random.below(80)));
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
        } else {
            thread::sleep(Duration::from_millis(random.below(900)));
        }
        copying += usize::from(!site.agent_log().contains("copy complete"));
        site.kill_agent()?;
        let took = write_all_within(&[data.path(), log.path()], THAW_MAX)
            .with_context(|| format!("after kill {kill}"))?;
        slowest = slowest.max(took);
        site.spawn_agent()?;
    }
    let frozen = site.guardian_log().lines().filter(|l| !l.contains(", 0 thawed")).count();
    println!(
        "slowest write after a kill {slowest:?}; {copying} kills within the first copy, {frozen} within a freeze"
    );
    ensure!(copying >= 3, "only {copying} kills fell into the first copy");
    ensure!(frozen >= 5, "only {frozen} kills fell into a freeze:\n{}", site.guardian_log());
    site.wait_until("the agent answers", Duration::from_secs(120), |s| Ok(s.status().is_ok()))?;
    site.wait_replicated()?;
    site.point()?;
    for load in loads {
        load.stop()?;
    }
    site.point()?;
    println!("{} points", site.assert_all_exact()?);
    site.verify()?;
    let told = site.agent_log();
    ensure!(count(&told, "taken_over=false") == 1, "tracking was not taken over:\n{told}");
    ensure!(
        !told.contains("HW-1460") && site.metric("highwater_agent_resynchronizations_total")? == 0.0,
        "{told}"
    );
    site.stop_agent()
}

#[test]
fn the_collector_is_killed_at_any_moment() -> Result<()> {
    let arena = Arena::enter("collector-killed")?;
    let mut random = seeded()?;
    let disk = LoopDisk::new(Backing::Tmpfs, 128 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    fill(&data.path().join("content"), 48 * MIB, 1)?;
    let mut site = Site::new(&arena, &every_second())?;
    site.allow("no recovery point this time");
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    let load = Load::start(data.path(), 3)?;
    for kill in 0..COLLECTOR_KILLS {
        thread::sleep(Duration::from_millis(random.below(1500)));
        site.kill_collector()?;
        if kill % 3 == 0 {
            thread::sleep(Duration::from_millis(random.below(500)));
            // No collector is needed to recover what it stored.
            if let Some((point, _)) = site.points().unwrap_or_default().last() {
                site.recover(*point).with_context(|| format!("after kill {kill}"))?;
            }
        }
        site.start_collector()?;
    }
    site.wait_replicated()?;
    site.point()?;
    load.stop()?;
    site.point()?;
    println!("{} points", site.assert_all_exact()?);
    site.verify()?;
    ensure!(!site.agent_log().contains("HW-1460"), "{}", site.agent_log());
    ensure!(site.metric("highwater_agent_resynchronizations_total")? == 0.0);
    site.stop_agent()
}

#[test]
fn a_new_agent_takes_over_under_load() -> Result<()> {
    let arena = Arena::enter("upgrade")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 128 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = Site::new(&arena, &SiteOptions { point_interval: "1h".into(), ..every_second() })?;
    site.allow("no recovery point this time");
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let load = Load::start(data.path(), 5)?;
    let before = site.point()?;
    let next = arena.dir().join("next");
    fs::create_dir(&next)?;
    for name in ["highwater-agent", "highwater-guardian"] {
        fs::copy(daemon::program(name)?, next.join(name))?;
    }
    site.stop_agent()?;
    // Written while there is no agent: in the bits of the pinned programs alone.
    fill(&data.path().join("meanwhile"), 4 * MIB, 9)?;
    site.use_agent_program(&next.join("highwater-agent"));
    site.start_agent()?;
    let guardian = site.status()?["guardian-pid"].as_u64().context("no guardian")?;
    let program = fs::read_link(format!("/proc/{guardian}/exe"))?;
    ensure!(program == next.join("highwater-guardian"), "the guardian is {}", program.display());
    let point = site.point()?;
    // Of this process: a point of its own may come before the one asked for.
    let sent = site.metric("highwater_agent_sent_bytes_total")?;
    ensure!(sent > 4e6 && sent < 60e6, "{sent} bytes were sent");
    load.stop()?;
    let last = site.point()?;
    for point in [before, point, last] {
        site.assert_exact(point)?;
    }
    let told = site.agent_log();
    ensure!(count(&told, "taken_over=true") == 1 && count(&told, "tracking taken over") == 1, "{told}");
    ensure!(site.metric("highwater_agent_resynchronizations_total")? == 0.0);
    site.stop_agent()
}

#[test]
fn the_vaults_disk_is_full() -> Result<()> {
    let arena = Arena::enter("full")?;
    let (disk, store) = (LoopDisk::new(Backing::Tmpfs, 96 * MIB)?, LoopDisk::new(Backing::Tmpfs, 128 * MIB)?);
    let (data, vault) =
        (Mounted::make(FileSystem::Ext4, disk.path())?, Mounted::make(FileSystem::Ext4, store.path())?);
    let filler = vault.path().join("filler");
    fill(&filler, 64 * MIB, 1)?;
    let options = SiteOptions { vault: Some(vault.path().join("vault")), ..SiteOptions::default() };
    let mut site = Site::new(&arena, &options)?;
    for expected in ["HW-1201", "HW-1474", "No space left", "no recovery point this time"] {
        site.allow(expected);
    }
    fill(&data.path().join("first"), 16 * MIB, 2)?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let before = site.point()?;
    fill(&data.path().join("second"), 48 * MIB, 3)?;
    let refused = site.point_within(Duration::ZERO);
    ensure!(refused.is_err(), "a point was stored where there is no space");
    site.wait_until("the refusal is told", Duration::from_secs(20), |site| {
        let status = site.status()?;
        let told = status["collector"]["last-error"].as_str().unwrap_or_default();
        Ok(told.contains("HW-1201") && told.contains("not full"))
    })?;
    site.assert_exact(before)?;
    site.verify()?;
    fs::remove_file(&filler)?;
    let after = site.point()?;
    site.assert_exact(after)?;
    site.assert_exact(before)?;
    site.verify()?;
    ensure!(site.metric("highwater_agent_resynchronizations_total")? == 0.0);
    site.stop_agent()
}

/// The alarm about the last point's age must go on while the collector is away, whatever happens to the agent.
#[test]
fn the_last_point_is_remembered_while_the_collector_is_away() -> Result<()> {
    let arena = Arena::enter("remembered")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let _data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = Site::new(&arena, &SiteOptions { point_interval: "1h".into(), ..SiteOptions::default() })?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let point = site.point()?;
    site.kill_collector()?;
    site.kill_agent()?;
    site.start_agent()?;
    ensure!(site.status()?["last-point"]["id"] == point, "{:#}", site.status()?);
    site.wait_until("the age is told", Duration::from_secs(10), |s| {
        Ok(s.metric("highwater_agent_rpo_age_seconds")? > 0.0)
    })?;
    let refused = site.agent_command(&["point"]).err().context("a point without a collector")?.to_string();
    ensure!(refused.contains("HW-1101"), "{refused}");
    site.wait_until("the error is counted", Duration::from_secs(10), |s| {
        Ok(s.metric("highwater_agent_errors_total{code=\"HW-1101\"}")? > 0.0)
    })?;
    site.start_collector()?;
    ensure!(site.point()? > point, "no new point");
    site.agent_command(&["unprotect", "data"])?;
    let refused = site.agent_command(&["point"]).err().context("a point of nothing")?.to_string();
    ensure!(refused.contains("HW-1474") && refused.contains("no disk is protected"), "{refused}");
    site.stop_agent()
}
