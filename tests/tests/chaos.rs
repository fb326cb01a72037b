//! Everything at once: agent, collector and the collector that keeps its vault are killed in random order, the way between them is cut, and
//! the disk at its end is full, while a machine writes and its points are told. What was told as stored is there and right; whatever else
//! is there is right too.
//!
//! `HIGHWATER_TEST_SECONDS` makes it longer.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, OtherSite, Proxy, Random, Site, SiteOptions,
    command, daemon,
};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const MIB: u64 = 1 << 20;
const SECONDS: u64 = 30;

/// What anybody may say while somebody else is away.
const EXPECTED: [&str; 11] = [
    "HW-1201",
    "HW-1330",
    "code=HW-1201",
    "code=HW-1207",
    "code=HW-1214",
    "session ended",
    "session broken off",
    "no recovery point this time",
    "HW-1474",
    "HW-1475",
    "the collector cannot be used",
];

/// A file system of its own for what the other site keeps; unmounted when dropped.
struct Small(PathBuf);
impl Small {
    fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let text = dir.to_string_lossy();
        command::run("mount", &["-t", "tmpfs", "-o", "size=1g", "tmpfs", &*text])?;
        Ok(Self(dir.to_owned()))
    }
    /// Full for so long.
    fn fill(&self, time: Duration) -> Result<()> {
        let file = self.0.join("ballast");
        command::run(
            "sh",
            &["-c", &format!("head -c 2G /dev/zero > {} 2>/dev/null || true", file.display())],
        )?;
        thread::sleep(time);
        Ok(fs::remove_file(file)?)
    }
}
impl Drop for Small {
    fn drop(&mut self) {
        command::run("umount", &["--lazy", &*self.0.to_string_lossy()]).ok();
    }
}

/// Also when the harness panics, or the other thread would go on for ever.
struct SetOnDrop<'a>(&'a AtomicBool);
impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

#[test]
fn what_was_told_as_stored_outlives_everything() -> Result<()> {
    let arena = Arena::enter("chaos")?;
    let seed = match number("HIGHWATER_TEST_SEED") {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    println!("HIGHWATER_TEST_SEED={seed}");
    let mut random = Random::new(seed);
    // Its log lies elsewhere: lines that are cut off say nothing.
    let small = Small::new(&arena.dir().join("other/vault"))?;
    let mut other = OtherSite::start(&arena.dir().join("other"))?;
    for full in ["No space left", "code=HW-1605", "code=HW-1608", "code=HW-1612"] {
        other.allow(full);
    }
    let proxy = Proxy::to(other.ingest())?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let cache = arena.dir().join("spools");
    let options = SiteOptions {
        bucket: Some(other.location(proxy.address(), "/site-a")),
        collector: vec![format!("cache = \"{}\"", cache.display()), "cache-bytes = \"64MiB\"".to_owned()],
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    EXPECTED.into_iter().for_each(|expected| site.allow(expected));
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let load = Load::start(data.path(), 4)?;
    let (agent, config) = (daemon::program("highwater-agent")?, site.agent_config().to_owned());
    let done = AtomicBool::new(false);
    let (told, acts) = thread::scope(|scope| {
        let until_here = SetOnDrop(&done);
        let telling = scope.spawn(|| {
            let mut told = BTreeSet::new();
            while !done.load(Ordering::SeqCst) {
                let args = ["--config".as_ref(), config.as_os_str(), "point".as_ref()];
                match command::run(&agent.to_string_lossy(), &args) {
                    Ok(said) => {
                        told.extend(said.split_ascii_whitespace().find_map(|w| w.parse::<u64>().ok()))
                    }
                    // Nobody was told anything.
                    Err(_) => thread::sleep(Duration::from_millis(50)),
                }
                thread::sleep(Duration::from_millis(400));
            }
            told
        });
        let acted = act(&mut site, &mut other, &proxy, &small, data.path(), &mut random);
        drop(until_here);
        let told = telling.join().map_err(|_| anyhow::anyhow!("panicked"));
        anyhow::Ok((told?, acted?))
    })?;
    load.stop()?;
    site.wait_until("the agent answers", Duration::from_secs(120), |site| Ok(site.status().is_ok()))?;
    let last = site.point()?;
    let listed: BTreeSet<u64> = site.points()?.into_iter().map(|(id, _)| id).collect();
    println!("{acts} acts; {} points told, {} stored", told.len(), listed.len());
    ensure!(told.is_subset(&listed), "told and not stored: {:?}", told.difference(&listed));
    ensure!(listed.contains(&last) && !told.is_empty(), "no point was told");
    site.assert_all_exact()?;
    site.verify()?;
    site.stop_agent()?;
    site.kill_collector()?;
    other.kill()
}

/// Answers how many things it did.
fn act(
    site: &mut Site,
    other: &mut OtherSite,
    proxy: &Proxy,
    small: &Small,
    data: &Path,
    random: &mut Random,
) -> Result<u64> {
    let until = Instant::now() + Duration::from_secs(number("HIGHWATER_TEST_SECONDS").unwrap_or(SECONDS));
    let mut content = vec![0; 4 * MIB as usize];
    let mut acts = 0;
    while Instant::now() < until {
        acts += 1;
        let piece = &mut content[..(1 + random.below(4)) as usize * MIB as usize];
        random.fill(piece);
        fs::write(data.join(format!("more-{}", acts % 4)), piece).context("the machine cannot write")?;
        thread::sleep(Duration::from_millis(random.below(1500)));
        let time = Duration::from_millis(random.below(2500));
        match random.below(4) {
            0 => {
                proxy.sever();
                thread::sleep(time);
                proxy.heal();
            }
            1 => small.fill(time)?,
            _ => {
                // One, two or all of them, in any order; started again in the order in which they need each other.
                let mut killed = [false; 3];
                for _ in 0..=random.below(3) {
                    let which = random.below(3) as usize;
                    match which {
                        0 => site.kill_agent()?,
                        1 => site.kill_collector()?,
                        _ => other.kill()?,
                    }
                    killed[which] = true;
                    thread::sleep(Duration::from_millis(random.below(300)));
                }
                if killed[2] {
                    other.restart()?;
                }
                if killed[1] {
                    site.start_collector()?;
                }
                if killed[0] {
                    site.spawn_agent()?;
                }
            }
        }
    }
    Ok(acts)
}
