//! Write-ordered replication through misfortune: whatever is lost of the stream, nothing is lost of the disk, no point is false,
//! and the mode is entered again by itself.

use anyhow::{Result, ensure};
use highwater_tests::{
    Arena, Backing, BpfMap, Chains, LoopDisk, MemoryLimit, Plan, Random, Site, SiteOptions, compare_devices,
    daemon::program, memory_limit::Beyond, metric, scrape,
};
use std::{
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

/// A site with a disk that chains are written to, in write-ordered mode.
fn begin(arena: &Arena, disk: &Path, capture: &[&str], pause: Duration) -> Result<(Site, Chains)> {
    let site = site(arena, capture)?;
    begin_at(site, disk, pause)
}

/// Its agent does not run yet.
fn site(arena: &Arena, capture: &[&str]) -> Result<Site> {
    let capture = capture.iter().map(|line| (*line).to_owned()).collect();
    let options = SiteOptions { copy_frozen: false, capture, ..SiteOptions::default() };
    let mut site = Site::new(arena, &options)?;
    site.allow("write-ordered mode is left");
    site.allow("no recovery point this time");
    Ok(site)
}

fn begin_at(mut site: Site, disk: &Path, pause: Duration) -> Result<(Site, Chains)> {
    site.start_agent()?;
    site.protect(disk, "disk")?;
    site.wait_ordered()?;
    let plan = Plan { disks: vec![disk.to_path_buf()], pause, ..Plan::default() };
    Ok((site, Chains::start(plan)?))
}

/// How often write-ordered mode was left for this reason.
fn left(site: &Site, kind: &str) -> Result<u64> {
    Ok(site.status()?["capture"]["left"][kind].as_u64().unwrap_or(0))
}

/// Waits until points come again, in write-ordered mode; then ends the writers, and checks all points. The last one has all that was
/// written.
fn end(mut site: Site, chains: Chains, points_min: usize) -> Result<()> {
    site.wait_ordered()?;
    let before = site.points()?.len();
    let until = Instant::now() + Duration::from_secs(180);
    while site.points()?.len() < before + 2 {
        ensure!(Instant::now() < until, "no points any more: {:#}", site.status()?);
        thread::sleep(Duration::from_millis(200));
    }
    let history = chains.stop()?;
    site.point()?;
    let (checked, last) = history.check_points(&site, &["disk"])?;
    ensure!(last == history.writes() as u64, "the last point has {last} of {} writes", history.writes());
    ensure!(checked >= points_min, "only {checked} points");
    println!("{} writes, {checked} points; {:#}", history.writes(), site.status()?["capture"]["left"]);
    site.verify()?;
    site.stop_agent()
}

/// A ring that is far too small for the churn.
#[test]
fn an_overflow_loses_nothing() -> Result<()> {
    let arena = Arena::enter("overflow")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let tiny = ["memory = \"4MiB\"", "ring = \"1MiB\"", "point-interval = \"1s\""];
    let (site, chains) = begin(&arena, disk.path(), &tiny, Duration::ZERO)?;
    let until = Instant::now() + Duration::from_secs(30);
    while left(&site, "overflow")? < 2 {
        ensure!(Instant::now() < until, "no overflow: {:#}", site.status()?);
        thread::sleep(Duration::from_millis(100));
    }
    let fast = chains.stop()?;
    let (_, _) = fast.check_points(&site, &["disk"])?;
    // The disk is as they left it; others go on in regions of their own, as fast as can be taken.
    let plan = Plan {
        disks: vec![disk.path().to_path_buf()],
        pause: Duration::from_millis(20),
        first_writer: 4,
        ..Plan::default()
    };
    end(site, Chains::start(plan)?, 2)
}

/// Killed at random moments, the agent goes on in bitmap mode and enters write-ordered mode again.
#[test]
fn an_agent_that_is_killed_loses_nothing() -> Result<()> {
    let arena = Arena::enter("killed")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let usual = ["memory = \"128MiB\"", "point-interval = \"1s\""];
    let (mut site, chains) = begin(&arena, disk.path(), &usual, Duration::from_millis(1))?;
    let mut random = Random::new(7);
    let times = if std::env::var_os("HIGHWATER_TEST_LONG").is_some() { 50 } else { 6 };
    for _ in 0..times {
        thread::sleep(Duration::from_millis(200 + random.below(2500)));
        site.kill_agent()?;
        thread::sleep(Duration::from_millis(random.below(300)));
        site.start_agent()?;
    }
    end(site, chains, 3)
}

/// A collector that is away for some time at full churn costs bits in a bitmap, and no more.
#[test]
fn a_collector_that_is_away_loses_nothing() -> Result<()> {
    let arena = Arena::enter("away")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let usual = ["memory = \"64MiB\"", "point-interval = \"1s\""];
    let (mut site, chains) = begin(&arena, disk.path(), &usual, Duration::from_micros(300))?;
    for _ in 0..2 {
        thread::sleep(Duration::from_secs(3));
        site.kill_collector()?;
        let seconds = if std::env::var_os("HIGHWATER_TEST_LONG").is_some() { 180 } else { 5 };
        thread::sleep(Duration::from_secs(seconds));
        let state = site.disk_status("disk")?;
        ensure!(state["state"] == "bitmap", "without a collector: {state:#}");
        site.start_collector()?;
        site.wait_ordered()?;
    }
    ensure!(left(&site, "disconnected")? == 2, "{:#}", site.status()?);
    end(site, chains, 4)
}

/// Waits for write-ordered mode as its unit would: if the agent ends, it is started again.
fn wait_ordered_or_start(site: &mut Site) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        // One that was killed, or has no engine any more, leaves a moment later.
        let runs = site.agent.as_mut().is_some_and(|agent| agent.is_running().unwrap_or(false));
        if !runs {
            println!("the agent has ended, and is started again");
            site.kill_agent()?;
            site.start_agent()?;
        }
        let state = site.disk_status("disk").map(|disk| disk["state"].clone());
        if state.as_ref().is_ok_and(|state| state == "write-ordered") {
            return Ok(());
        }
        ensure!(Instant::now() < until, "it does not come back: {state:?}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// An agent that may have no more memory than it had in a moment of little, some times, for some seconds each.
fn short_of_memory(arena: &Arena, beyond: Beyond) -> Result<()> {
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let limit = MemoryLimit::new()?;
    let mut site = site(arena, &["memory = \"64MiB\"", "point-interval = \"1s\""])?;
    // It may end for want of memory, which its unit puts right. It may not live on without a part of it.
    site.allow("panicked at");
    site.allow("looking for the device failed");
    let wrapper = arena.dir().join("agent");
    limit.wrap(&program("highwater-agent")?, "run", &wrapper)?;
    site.use_agent_program(&wrapper);
    let (mut site, chains) = begin_at(site, disk.path(), Duration::from_millis(1))?;
    for _ in 0..2 {
        thread::sleep(Duration::from_secs(2));
        let kills = limit.kills()?;
        let mut least = u64::MAX;
        let until = Instant::now() + Duration::from_secs(4);
        while Instant::now() < until && limit.kills()? == kills {
            let used = limit.used_bytes()?;
            if used < least && limit.set(used, beyond)? {
                least = used;
            }
            thread::sleep(Duration::from_millis(20));
        }
        limit.lift()?;
        println!("{beyond:?}: {least} bytes were allowed, {} times too few", limit.reached()?);
        ensure!(beyond == Beyond::Kill || limit.kills()? == 0, "killed where it was to wait");
        wait_ordered_or_start(&mut site)?;
    }
    ensure!(limit.reached()? > 0, "it was never short of memory");
    end(site, chains, 3)
}

/// Killed for want of memory in the middle of its work, it goes on when it is started again.
#[test]
fn an_agent_killed_for_want_of_memory_loses_nothing() -> Result<()> {
    let arena = Arena::enter("memory-kill")?;
    short_of_memory(&arena, Beyond::Kill)
}

/// Made to wait for memory, and refused what it asks the kernel for, it goes on when there is some, by itself or started again.
#[test]
fn an_agent_that_waits_for_memory_loses_nothing() -> Result<()> {
    let arena = Arena::enter("memory-wait")?;
    short_of_memory(&arena, Beyond::Stall)
}

/// What changes on a disk past the block layer is seen by nobody; the comparison in the background finds and heals it.
#[test]
fn what_nobody_saw_is_healed() -> Result<()> {
    let arena = Arena::enter("compare")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 32 * MIB)?;
    for (content, capture) in [(0x5a, vec![]), (0xa5, vec!["mode = \"off\"".to_owned()])] {
        let options = SiteOptions {
            copy_frozen: false,
            replication: vec!["compare-rate = \"256MiB\"".into()],
            dir: Some(arena.dir().join(format!("site{}", capture.len()))),
            capture,
            ..SiteOptions::default()
        };
        std::fs::create_dir_all(options.dir.as_deref().unwrap_or(arena.dir()))?;
        let mut site = Site::new(&arena, &options)?;
        site.start_agent()?;
        site.protect(disk.path(), "disk")?;
        if options.capture.is_empty() {
            site.wait_ordered()?
        } else {
            site.wait_replicated()?
        }
        let plan =
            Plan { disks: vec![disk.path().to_path_buf()], writers: 1, first_writer: 2, ..Plan::default() };
        let chains = Chains::start(Plan { pause: Duration::from_millis(1), ..plan })?;
        thread::sleep(Duration::from_secs(2));
        let metrics = site.agent_metrics();
        let healed = || {
            let text = scrape(metrics).unwrap_or_default();
            metric(&text, "highwater_agent_background_blocks_healed_total").unwrap_or(0.0)
        };
        ensure!(healed() == 0.0, "blocks that are written are no differences");
        drop(chains);
        site.allow("HW-1497");
        let image = std::fs::File::options().write(true).open(disk.image())?;
        image.write_all_at(&[content; 8192], 20 * MIB + 4096)?;
        let until = Instant::now() + Duration::from_secs(60);
        while healed() < 2.0 {
            ensure!(Instant::now() < until, "not found: {:#}", site.status()?);
            thread::sleep(Duration::from_millis(200));
        }
        let copy = site.copy_now("disk")?;
        let point = site.point()?;
        let recovered = site.recover(point)?;
        let differing = compare_devices(&copy, &recovered.image("disk"), &[])?;
        ensure!(differing.is_empty(), "{differing:?}");
        site.stop_agent()?;
        site.agent_command(&["detach", "--yes"])?;
    }
    Ok(())
}

/// The way of capture reads the wrong memory: a known page tells, nothing is captured any more, and what was stored is compared.
#[test]
fn memory_read_wrong_is_noticed() -> Result<()> {
    let arena = Arena::enter("wrong")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let usual = ["memory = \"64MiB\"", "point-interval = \"1s\"", "verify-interval = \"1s\""];
    let (mut site, chains) = begin(&arena, disk.path(), &usual, Duration::from_millis(1))?;
    site.allow("writes are not captured any more");
    thread::sleep(Duration::from_secs(4));
    ensure!(left(&site, "unverified")? == 0, "without a reason: {:#}", site.status()?);
    let map = BpfMap::newest("BASES")?;
    let mut bases: highwater_abi::stream::Bases = map.get(0)?;
    bases.direct += 1 << 20;
    map.set(0, bases)?;
    let until = Instant::now() + Duration::from_secs(30);
    while left(&site, "unverified")? == 0 {
        ensure!(Instant::now() < until, "not noticed: {:#}", site.status()?);
        thread::sleep(Duration::from_millis(100));
    }
    let history = chains.stop()?;
    let point = site.point()?;
    let status = site.status()?;
    let unavailable = status["capture"]["unavailable"].as_str().unwrap_or_default();
    ensure!(unavailable.contains("HW-1491"), "{unavailable}");
    ensure!(site.disk_status("disk")?["state"] == "bitmap", "{status:#}");
    let recovered = site.recover(point)?;
    ensure!(
        compare_devices(disk.path(), &recovered.image("disk"), &[])?.is_empty(),
        "the last point differs"
    );
    ensure!(history.writes() > 500, "only {} writes", history.writes());
    site.stop_agent()
}
