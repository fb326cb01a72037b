//! A whole installation whose vault lies in a bucket of a real S3 server, over a network that fails.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, Proxy, Random, S3Server, Site, SiteOptions, command,
    daemon,
};
use std::{
    fs, thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

#[test]
fn the_vault_lies_in_a_bucket() -> Result<()> {
    let arena = Arena::enter("bucket")?;
    let buckets = arena.dir().join("buckets");
    fs::create_dir_all(buckets.join("vaults"))?;
    S3Server::keys_by_environment();
    let server = S3Server::start(&buckets)?;
    let proxy = Proxy::to(server.address())?;
    let bucket = format!("s3://vaults/site-a?region=us-east-1&endpoint=http://{}", proxy.address());
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    // More than one part of an upload.
    let mut content = vec![0; 24 * MIB as usize];
    Random::new(3).fill(&mut content);
    fs::write(data.path().join("content"), &content)?;
    let options = SiteOptions { bucket: Some(bucket.clone()), ..SiteOptions::default() };
    let mut site = Site::new(&arena, &options)?;
    for expected in [
        "HW-1201",
        "code=HW-1201",
        "session ended",
        "session broken off",
        "no recovery point this time",
        "HW-1474",
    ] {
        site.allow(expected);
    }
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let load = Load::start(data.path(), 4)?;
    let mut points = vec![site.point()?];
    // Requests cut at their beginning and in the middle of a part.
    for bytes in [200, 3000, 2 * MIB] {
        fs::write(data.path().join("more"), &content[..(bytes as usize + 4 * MIB as usize)])?;
        proxy.cut_after(highwater_tests::proxy::Way::Up, bytes);
        points.push(site.point()?);
    }
    // Out of reach for a while: the point comes afterwards, and nothing is told as stored that is not.
    proxy.sever();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| site.point());
        thread::sleep(Duration::from_secs(4));
        let early = waiting.is_finished();
        proxy.heal();
        let healed = Instant::now();
        points.push(waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??);
        println!("a point {:?} after the store was back", healed.elapsed());
        ensure!(!early, "a point was told as stored while the store was away");
        anyhow::Ok(())
    })?;
    site.kill_collector()?;
    site.start_collector()?;
    points.push(site.point()?);
    load.stop()?;
    points.push(site.point()?);
    for point in points {
        site.assert_exact(point)?;
    }
    site.verify()?;
    site.stop_agent()?;

    // A store that is not what it was: its bucket is gone, its keys are wrong.
    let highwater = daemon::program("highwater")?;
    let fails = |bucket: &str| -> Result<String> {
        let key = site.key().to_string_lossy().into_owned();
        let said =
            command::run(&highwater.to_string_lossy(), &["--vault", bucket, "--key", &key, "machines"]);
        Ok(format!("{:?}", said.err().context("it worked")?))
    };
    for (bucket, code) in [
        (bucket.replace("site-a", "site-b"), "HW-1203"),
        (bucket.replace("vaults", "nowhere"), "HW-120"),
        (format!("{bucket}&profile=nobody"), "HW-1224"),
        (bucket.replace("region", "reign"), "HW-1224"),
    ] {
        let said = fails(&bucket)?;
        ensure!(said.contains(code), "{bucket}: {said}");
    }
    Ok(())
}
