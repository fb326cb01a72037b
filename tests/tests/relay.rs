//! A whole installation whose vault lies at the collector of another site, which is killed and comes back, over a network that fails.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, OtherSite, Proxy, Random, Site, SiteOptions,
    command, daemon, proxy::Way,
};
use std::{
    fs, thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const MIB: u64 = 1 << 20;
const KILLS: u64 = 10;

/// What either side may say while the other is away.
const EXPECTED: [&str; 7] = [
    "HW-1201",
    "code=HW-1201",
    "code=HW-1214",
    "session ended",
    "session broken off",
    "no recovery point this time",
    "HW-1474",
];

#[test]
fn the_vault_lies_at_another_collector_that_is_killed() -> Result<()> {
    let arena = Arena::enter("relay")?;
    let seed = match std::env::var("HIGHWATER_TEST_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    println!("HIGHWATER_TEST_SEED={seed}");
    let mut random = Random::new(seed);
    let mut other = OtherSite::start(&arena.dir().join("other"))?;
    let proxy = Proxy::to(other.ingest())?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut content = vec![0; 24 * MIB as usize];
    random.fill(&mut content);
    fs::write(data.path().join("content"), &content)?;
    let options =
        SiteOptions { bucket: Some(other.location(proxy.address(), "/site-a")), ..SiteOptions::default() };
    let mut site = Site::new(&arena, &options)?;
    EXPECTED.into_iter().for_each(|expected| site.allow(expected));
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let load = Load::start(data.path(), 4)?;
    let mut points = vec![site.point()?];
    // Requests cut at their beginning, in the middle of a part, and in the middle of an answer.
    for (way, bytes) in [(Way::Up, 200), (Way::Up, 2 * MIB), (Way::Down, 300), (Way::Down, 5000)] {
        fs::write(data.path().join("more"), &content[..(bytes as usize + 4 * MIB as usize)])?;
        proxy.cut_after(way, bytes);
        points.push(site.point()?);
    }
    // Killed at any moment of a point's way, several parts of an upload among them.
    for kill in 0..KILLS {
        let bytes = (1 + random.below(12)) * MIB;
        random.fill(&mut content[..bytes as usize]);
        fs::write(data.path().join("more"), &content[..bytes as usize])?;
        thread::scope(|scope| {
            let point = scope.spawn(|| site.point());
            thread::sleep(Duration::from_millis(random.below(700)));
            other.kill()?;
            thread::sleep(Duration::from_millis(random.below(500)));
            other.restart()?;
            points.push(point.join().map_err(|_| anyhow::anyhow!("panicked"))??);
            anyhow::Ok(())
        })
        .with_context(|| format!("kill {kill}"))?;
    }
    // Out of reach for a while: nothing is told as stored that is not.
    proxy.sever();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| site.point());
        thread::sleep(Duration::from_secs(4));
        let early = waiting.is_finished();
        proxy.heal();
        points.push(waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??);
        ensure!(!early, "a point was told as stored while its place was out of reach");
        anyhow::Ok(())
    })?;
    site.kill_collector()?;
    site.start_collector()?;
    load.stop()?;
    points.push(site.point()?);
    for point in points {
        site.assert_exact(point)?;
    }
    site.verify()?;
    site.stop_agent()?;
    site.kill_collector()?;

    // The other site sees nothing of it in its own vault; and with the key, what it keeps is a vault like any other.
    let machine = site.machine()?;
    let (through, direct) = (arena.dir().join("through"), arena.dir().join("direct"));
    let recover = |to: &str| ["recover", &machine, "--point", "latest", "--to", to].map(str::to_owned);
    site.operator(&recover(&through.to_string_lossy()).each_ref().map(String::as_str))?;
    ensure!(!other.command(&["machine", "list"])?.contains(&machine), "a machine of ours is theirs");
    other.kill()?;
    let (kept, key) = (other.kept().join("site-a"), site.key().to_string_lossy().into_owned());
    let kept = kept.to_string_lossy();
    let highwater = daemon::program("highwater")?;
    let there = |args: &[&str]| {
        let all = [&["--vault", &*kept, "--key", &key], args].concat();
        command::run(&highwater.to_string_lossy(), &all)
    };
    there(&["verify"])?;
    there(&recover(&direct.to_string_lossy()).each_ref().map(String::as_str))?;
    let mut images = 0;
    for image in fs::read_dir(&direct)? {
        let image = image?;
        // Beside the images lies a note of when they were recovered.
        if image.path().extension().is_some_and(|extension| extension == "json") {
            continue;
        }
        images += 1;
        ensure!(fs::read(image.path())? == fs::read(through.join(image.file_name()))?, "{image:?} differs");
    }
    ensure!(images > 0, "nothing was recovered");
    Ok(())
}
