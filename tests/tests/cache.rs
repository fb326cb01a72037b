//! A whole installation whose store goes away for a moment, while the collector's cache takes what the agent sends.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Proxy, Random, S3Server, Site, SiteOptions, command,
    daemon, metric, scrape,
};
use std::{
    fs,
    io::Write,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
/// More than a window, and what a delta holds on its way into a bucket.
const MUCH: u64 = 12 * MIB;
/// After half a minute without its store a collector ends all sessions.
const GUARD: Duration = Duration::from_secs(25);

#[test]
fn the_cache_takes_what_comes_while_the_store_is_away() -> Result<()> {
    let arena = Arena::enter("cache")?;
    let buckets = arena.dir().join("buckets");
    fs::create_dir_all(buckets.join("vaults"))?;
    S3Server::keys_by_environment();
    let server = S3Server::start(&buckets)?;
    let proxy = Proxy::to(server.address())?;
    let cache = arena.dir().join("spools");
    let options = SiteOptions {
        bucket: Some(format!("s3://vaults/site?region=us-east-1&endpoint=http://{}", proxy.address())),
        collector: vec![
            format!("cache = \"{}\"", cache.display()),
            "cache-bytes = \"64MiB\"".to_owned(),
            "window = \"512KiB\"".to_owned(),
        ],
        ..SiteOptions::default()
    };
    let disk = LoopDisk::new(Backing::Tmpfs, 128 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut site = Site::new(&arena, &options)?;
    for expected in [
        "HW-1201",
        "HW-1330",
        "code=HW-1201",
        "session ended",
        "session broken off",
        "no recovery point this time",
    ] {
        site.allow(expected);
    }
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let mut points = vec![site.point()?];

    // It comes back.
    proxy.sever();
    write(data.path(), 1)?;
    let told = thread::scope(|scope| {
        let waiting = scope.spawn(|| site.point());
        let taken = taken_in(site.collector_metrics());
        let early = waiting.is_finished();
        proxy.heal();
        let point = waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        taken?;
        ensure!(!early, "a point was told as stored while the store was away");
        anyhow::Ok(point)
    })?;
    points.push(told);
    let text = scrape(site.collector_metrics())?;
    ensure!(metric(&text, "highwater_collector_refusals_total{code=\"HW-1330\"}").is_none(), "{text}");
    ensure!(metric(&text, "highwater_collector_cache_errors_total") == Some(0.0), "{text}");

    // The collector is killed with all that it has received.
    proxy.sever();
    write(data.path(), 2)?;
    let (agent, config) = (daemon::program("highwater-agent")?, site.agent_config().to_owned());
    // It waits as long as it takes; or tells that it was not done.
    let waiting = thread::spawn(move || {
        command::run(&agent.to_string_lossy(), &["--config", &config.to_string_lossy(), "point"])
    });
    let taken = taken_in(site.collector_metrics());
    let early = waiting.is_finished();
    site.kill_collector()?;
    proxy.heal();
    site.start_collector()?;
    let told = waiting.join().map_err(|_| anyhow::anyhow!("panicked"))?;
    if let Ok(said) = told {
        let number = said.split_ascii_whitespace().find_map(|word| word.parse().ok());
        points.push(number.with_context(|| format!("no number in: {said}"))?);
    }
    taken?;
    ensure!(!early, "a point was told as stored while the store was away");
    ensure!(fs::read_dir(&cache)?.next().is_none(), "something has a name in the cache");
    points.push(site.point()?);
    for point in points {
        site.assert_exact(point)?;
    }
    site.verify()?;
    site.stop_agent()
}

/// Waits until the cache holds much.
fn taken_in(collector: SocketAddr) -> Result<()> {
    let until = Instant::now() + GUARD;
    loop {
        let text = scrape(collector)?;
        if metric(&text, "highwater_collector_cache_used_bytes").context("no such metric")? >= MUCH as f64 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "the cache does not take it:\n{text}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn write(dir: &Path, seed: u64) -> Result<()> {
    let mut content = vec![0; 3 * MUCH as usize];
    Random::new(seed).fill(&mut content);
    let mut file = fs::File::create(dir.join(format!("content-{seed}")))?;
    file.write_all(&content)?;
    Ok(file.sync_all()?)
}
