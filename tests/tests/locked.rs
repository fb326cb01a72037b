//! A vault in a bucket that locks what immutable points need: whoever deletes everything that the collector's own credentials can leaves
//! enough to recover them.

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use highwater_tests::{
    Arena, Backing, FileSystem, LoopDisk, Mounted, Random, S3Server, Site, SiteOptions, command, daemon,
    metric, scrape,
};
use highwater_vault::Store;
use std::{fs, thread, time::Duration};

const MIB: u64 = 1 << 20;
/// Only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(120);

fn locked(site: &Site) -> Result<u64> {
    let shown = scrape(site.collector_metrics())?;
    Ok(metric(&shown, "highwater_collector_objects_locked_total").context("no metric")? as u64)
}

#[test]
fn what_is_immutable_outlives_whoever_has_the_credentials() -> Result<()> {
    let arena = Arena::enter("locked")?;
    let buckets = arena.dir().join("buckets");
    fs::create_dir_all(buckets.join("vaults"))?;
    fs::create_dir_all(arena.dir().join("plain/vaults"))?;
    S3Server::keys_by_environment();
    let (server, locks) = S3Server::start_locking(&buckets)?;
    let bucket = format!("s3://vaults/site-a?region=us-east-1&endpoint=http://{}", server.address());
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let options = SiteOptions {
        bucket: Some(format!("{bucket}&lock=governance")),
        collector: vec!["maintenance-every = \"1s\"".into(), "trash-grace = \"1s\"".into()],
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    let promise = ["vault", "policy", "set", "--keep-all", "2s", "--tier", "2s:1h", "--immutable-for", "6h"];
    // What cannot be taken back is asked about.
    ensure!(site.operator(&promise).is_err_and(|refused| refused.to_string().contains("HW-1508")));
    site.operator(&[&promise[..], &["--yes"]].concat())?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let (mut points, mut content) = (Vec::new(), vec![0; 2 * MIB as usize]);
    for n in 0..6 {
        Random::new(n).fill(&mut content);
        fs::write(data.path().join(format!("file-{}", n % 3)), &content)?;
        points.push(site.point()?);
        thread::sleep(Duration::from_millis(700));
    }
    site.stop_agent()?;
    // Another round, and nothing is new any more.
    site.wait_until("all is locked", GUARD, |site| {
        let before = locked(site)?;
        thread::sleep(Duration::from_secs(3));
        Ok(before > 0 && locked(site)? == before)
    })?;
    println!("{} locks asked for, {} objects are locked", locked(&site)?, locks.count());
    // A bucket may lock for longer by itself: that is no failure.
    locks.prolong(Duration::from_secs(30 * 86_400));
    let again = site.operator(&["vault", "maintain", "--yes"])?;
    ensure!(again.contains("locked"), "{again}");
    site.kill_collector()?;

    // With the collector's credentials, everything.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let store = Store::open(&bucket.parse()?)?;
    let deleted = runtime.block_on(async {
        let all: Vec<_> = store.objects().list(None).map_ok(|meta| meta.location).try_collect().await?;
        let count = all.len();
        let deleted = store.objects().delete_stream(futures::stream::iter(all).map(Ok).boxed());
        deleted.try_collect::<Vec<_>>().await?;
        anyhow::Ok(count)
    })?;
    let highwater = daemon::program("highwater")?;
    let key = site.key().to_string_lossy().into_owned();
    let machines = |bucket: &str| -> Result<String> {
        command::run(&highwater.to_string_lossy(), &["--vault", bucket, "--key", &key, "machines"])
    };
    ensure!(machines(&bucket).is_err_and(|e| e.to_string().contains("HW-1203")), "there is something left");
    server.undelete()?;
    println!("{deleted} objects were deleted, {} of them are back", locks.count());
    for point in points {
        site.assert_exact(point)?;
    }

    // A bucket that cannot lock is not taken for one that does.
    let plain = S3Server::start(&arena.dir().join("plain"))?;
    let bucket = format!("s3://vaults?region=us-east-1&endpoint=http://{}&lock=compliance", plain.address());
    let dir = arena.dir().join("refused");
    let collector = daemon::program("highwater-collector")?;
    let args = ["init", "--dir", &dir.to_string_lossy(), "--vault", &bucket, "--name", "localhost"];
    let refused = command::run(&collector.to_string_lossy(), &args);
    ensure!(refused.is_err_and(|e| e.to_string().contains("HW-1244")), "a bucket without locks was taken");
    Ok(())
}
