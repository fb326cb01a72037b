//! Two collectors of one vault, and a machine that is moved between them: one is stopped in the middle of a delta, the other goes on, and
//! the first wakes up with the rest of the delta in its hands. Both maintain the vault. Then everything is recovered from a copy.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, Proxy, Random, S3Server, Site, SiteOptions, Twin,
    command, compare_devices, daemon, metric, scrape,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const MIB: u64 = 1 << 20;
const GRACE: Duration = Duration::from_secs(5);

/// What either collector, or the agent, may say of it.
const EXPECTED: [&str; 12] = [
    "HW-1201",
    "code=HW-1201",
    "HW-1207",
    "code=HW-1207",
    "HW-1208",
    "code=HW-1208",
    "session ended",
    "session broken off",
    "no recovery point this time",
    "the collector cannot be used",
    "HW-1214",
    "HW-1474",
];

fn seeded() -> Result<Random> {
    let seed = match std::env::var("HIGHWATER_TEST_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    println!("HIGHWATER_TEST_SEED={seed}");
    Ok(Random::new(seed))
}

/// How often the machine is moved; `HIGHWATER_TEST_ROUNDS` says otherwise.
fn rounds(default: u64) -> u64 {
    std::env::var("HIGHWATER_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(default)
}

#[test]
fn two_collectors_fight_over_a_machine() -> Result<()> {
    S3Server::keys_by_environment();
    let arena = Arena::enter("twins")?;
    let mut random = seeded()?;
    let buckets = arena.dir().join("buckets");
    fs::create_dir_all(buckets.join("vaults"))?;
    let server = S3Server::start(&buckets)?;
    let bucket = format!("s3://vaults/site?region=us-east-1&endpoint=http://{}", server.address());
    // In a bucket it takes minutes: `HIGHWATER_TEST_LONG` asks for it.
    let bucket = std::env::var_os("HIGHWATER_TEST_LONG").map(|_| Some(bucket));
    for bucket in std::iter::once(None).chain(bucket) {
        let place = arena.dir().join(if bucket.is_some() { "in-bucket" } else { "in-directory" });
        let kept = if bucket.is_some() { buckets.join("vaults/site") } else { place.join("vault") };
        fight(&arena, &place, bucket, &kept, &mut random)?;
        // The next machine has nothing to take over.
        fs::remove_dir_all(arena.bpf_dir())?;
    }
    Ok(())
}

fn fight(
    arena: &Arena,
    place: &Path,
    bucket: Option<String>,
    kept: &Path,
    random: &mut Random,
) -> Result<()> {
    fs::create_dir_all(place)?;
    let port = daemon::free_port()?;
    let proxy = Proxy::to(([127, 0, 0, 1], port).into())?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let options = SiteOptions {
        collector: ["maintenance-every = \"1s\"", "trash-grace = \"5s\""].map(String::from).to_vec(),
        bucket,
        vault: Some(place.join("vault")),
        dir: Some(place.to_owned()),
        ingest_port: Some(port),
        through: Some(proxy.address()),
        ..SiteOptions::default()
    };
    let mut site = Site::new(arena, &options)?;
    EXPECTED.into_iter().for_each(|expected| site.allow(expected));
    let mut twin = Twin::start(&place.join("twin"), &place.join("collector/collector.toml"), &EXPECTED)?;
    site.operator(&["vault", "policy", "set", "--keep-all", "6s", "--tier", "4s:1h"])?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let load = Load::start(data.path(), 4)?;
    let done = AtomicBool::new(false);
    let copy = place.join("bare/vault");
    let (told, in_time) = thread::scope(|scope| {
        let points = scope.spawn(|| {
            let mut told = BTreeSet::new();
            while !done.load(Ordering::SeqCst) {
                told.insert(site.point()?);
            }
            anyhow::Ok(told)
        });
        let fought = move_about(&site, &twin, &proxy, data.path(), random);
        // In the middle of everything.
        let copied = copy_vault(kept, &copy);
        done.store(true, Ordering::SeqCst);
        let told = points.join().map_err(|_| anyhow::anyhow!("panicked"))?;
        fought?;
        anyhow::Ok((told?, copied?))
    })?;
    load.stop()?;
    let last = site.point()?;
    thread::sleep(Duration::from_secs(5));
    // From the next round on nothing expires: what is listed now can be looked at in peace.
    site.operator(&["vault", "policy", "set", "--keep-all", "1h", "--yes"])?;
    thread::sleep(Duration::from_secs(2));
    let listed: BTreeSet<u64> = site.points()?.into_iter().map(|(id, _)| id).collect();
    let fenced =
        count(&fs::read_to_string(place.join("collector.log"))?, "1208") + count(&twin.log(), "1208");
    let merged = [site.collector_metrics(), twin.metrics()].map(|of| {
        let shown = scrape(of)?;
        metric(&shown, "highwater_collector_runs_merged_total").context("no metric")
    });
    let [here, there] = merged;
    println!(
        "{} points told, {} kept, {fenced} times fenced; runs merged: {} and {}",
        told.len(),
        listed.len(),
        here?,
        there?
    );
    ensure!(listed.last() == Some(&last), "the newest is gone");
    ensure!(listed.len() < told.len(), "nothing expired");
    for point in &listed {
        site.assert_exact(*point)?;
    }
    site.verify()?;
    site.stop_agent()?;
    site.stop_collector()?;
    twin.stop()?;
    if in_time {
        let there = bare(&site, &place.join("bare"), &listed)?;
        println!("{there} points are recovered from a copy that was made meanwhile");
        ensure!(there > 0, "the copy has none of the points");
    }
    fs::remove_dir_all(&copy)?;
    copy_vault(kept, &copy)?;
    ensure!(bare(&site, &place.join("bare"), &listed)? == listed.len(), "the copy lacks points");
    Ok(())
}

/// Recovers all that a copy and those points have in common in a place where there is nothing but copy, key, `highwater` and the libraries that
/// it is linked with, and compares with the original, byte for byte. Answers how many points those are.
fn bare(site: &Site, root: &Path, points: &BTreeSet<u64>) -> Result<usize> {
    let program = daemon::program("highwater")?;
    let listed = command::run("ldd", &[&*program.to_string_lossy()])?;
    let libraries = listed.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries {
        let to = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a directory")?)?;
        fs::copy(file, to)?;
    }
    fs::copy(&program, root.join("highwater"))?;
    fs::copy(site.key(), root.join("vault.key"))?;
    let highwater = |args: &[&str]| {
        let root = root.to_string_lossy();
        let chroot = command::find("chroot");
        let chroot = chroot.to_string_lossy();
        let all = ["-i", &chroot, &root, "/highwater", "--vault", "/vault", "--key", "/vault.key"];
        command::run("env", &[&all, args].concat())
    };
    highwater(&["verify"])?;
    let machines: Value = serde_json::from_str(&highwater(&["machines", "--json"])?)?;
    let mut count = 0;
    for machine in machines["machines"].as_array().context("no machines")? {
        let machine = machine["machine"].as_str().context("no id")?;
        let said: Value = serde_json::from_str(&highwater(&["points", machine, "--json"])?)?;
        for point in said["points"].as_array().context("no points")? {
            let point = point["point"].as_u64().context("no number")?;
            highwater(&["recover", machine, "--point", &point.to_string(), "--to", "/out"])?;
            if points.contains(&point) {
                let differing =
                    compare_devices(&site.recover(point)?.image("data"), &root.join("out/data.img"), &[])?;
                ensure!(differing.is_empty(), "point {point} of the copy differs");
                count += 1;
            }
            fs::remove_dir_all(root.join("out"))?;
        }
    }
    Ok(count)
}

/// As OPERATIONS.md says: records first, then what they name. Whether it took less than the grace.
fn copy_vault(from: &Path, to: &Path) -> Result<bool> {
    let began = Instant::now();
    let is_record = |path: &Path| {
        !["maps", "pruned", "rewritten", "segments"].iter().any(|dir| path.iter().any(|part| part == *dir))
    };
    for records in [true, false] {
        copy_dir(from, to, &|path| is_record(path) == records)?;
    }
    Ok(began.elapsed() < GRACE)
}

fn copy_dir(from: &Path, to: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<()> {
    fs::create_dir_all(to)?;
    let entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
    for entry in entries {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        let copied = match entry.file_type()?.is_dir() {
            true => copy_dir(&path, &to, wanted),
            false if wanted(&path) && !to.exists() => fs::copy(&path, &to).map(drop).map_err(Into::into),
            false => Ok(()),
        };
        // Merged away, or completed, meanwhile.
        let is_gone = |error: &anyhow::Error| {
            let io = error.downcast_ref::<std::io::Error>();
            io.is_some_and(|io| io.kind() == std::io::ErrorKind::NotFound)
        };
        if let Err(error) = copied
            && !is_gone(&error)
        {
            return Err(error);
        }
    }
    Ok(())
}

/// The machine goes back and forth; whoever it leaves is stopped now and then, wakes up and finishes what he has.
fn move_about(site: &Site, twin: &Twin, proxy: &Proxy, data: &Path, random: &mut Random) -> Result<()> {
    let mut content = vec![0; 3 * MIB as usize];
    for round in 0..rounds(10) {
        let is_here = round % 2 == 0;
        let signal = |signal| if is_here { site.signal_collector(signal) } else { twin.signal(signal) };
        random.fill(&mut content);
        fs::write(data.join("more"), &content)?;
        thread::sleep(Duration::from_millis(300 + random.below(900)));
        let is_stopped = random.below(4) > 0;
        if is_stopped {
            signal(Signal::SIGSTOP)?;
            // What the machine sends meanwhile waits in the stopped one's socket.
            thread::sleep(Duration::from_millis(random.below(400)));
        }
        proxy.redirect(if is_here { twin.ingest() } else { site.ingest() });
        thread::sleep(Duration::from_millis(300 + random.below(1500)));
        if is_stopped {
            signal(Signal::SIGCONT)?;
        }
    }
    Ok(())
}

fn count(text: &str, what: &str) -> usize {
    text.lines().filter(|line| line.contains(what)).count()
}
