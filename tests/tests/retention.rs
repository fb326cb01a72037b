//! Points expire and are merged under a machine that goes on writing, and a collector that is killed in the middle of it.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, Random, Site, SiteOptions, metric, scrape,
};
use serde_json::Value;
use std::{fs, thread, time::Duration};

const MIB: u64 = 1 << 20;
const POINTS: u64 = 24;
/// Only keeps a test that fails from hanging.
const GUARD: Duration = Duration::from_secs(120);

fn merged(site: &Site) -> Result<u64> {
    let shown = scrape(site.collector_metrics())?;
    Ok(metric(&shown, "highwater_collector_runs_merged_total").context("no metric")? as u64)
}

/// What maintenance would do for the machine now.
fn planned(site: &Site) -> Result<Value> {
    let plan: Value = serde_json::from_str(&site.operator(&["vault", "plan", "--json"])?)?;
    Ok(plan["machines"][0]["plan"].clone())
}

#[test]
fn points_expire_while_their_machine_writes_on() -> Result<()> {
    let arena = Arena::enter("retention")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 96 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let options = SiteOptions {
        // As short as can be: so that all of it happens within the test, again and again.
        collector: vec!["maintenance-every = \"1s\"".into(), "trash-grace = \"1s\"".into()],
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    for expected in ["session broken off", "the collector cannot be used", "no recovery point this time"] {
        site.allow(expected);
    }
    site.operator(&["vault", "policy", "set", "--keep-all", "2s", "--tier", "4s:1h"])?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    let load = Load::start(data.path(), 4)?;
    let mut made = Vec::new();
    let mut random = Random::new(11);
    let mut content = vec![0; 2 * MIB as usize];
    let mut merged_before_kill = 0;
    for n in 0..POINTS {
        random.fill(&mut content);
        fs::write(data.path().join(format!("file-{}", n % 5)), &content)?;
        made.push(site.point()?);
        if n == 3 {
            let machine = site.machine()?;
            site.operator(&["vault", "pin", &machine, &made[1].to_string(), "--reason", "a test"]).ok();
        }
        if n % 6 == 5 {
            merged_before_kill += merged(&site)?;
            site.kill_collector()?;
            site.start_collector()?;
        }
        thread::sleep(Duration::from_millis(400));
    }
    load.stop()?;
    made.push(site.point()?);
    // A collector that was killed in the middle goes on where it was: all that can expire does, soon.
    site.wait_until("all that can expire does", GUARD, |site| {
        Ok(planned(site)?["expire"] == serde_json::json!([]))
    })?;
    let merged = merged_before_kill + merged(&site)?;
    // From the next round on nothing expires: what is listed now can be looked at in peace.
    site.operator(&["vault", "policy", "set", "--keep-all", "1h", "--yes"])?;
    thread::sleep(Duration::from_secs(3));
    let kept: Vec<u64> = site.points()?.into_iter().map(|(id, _)| id).collect();
    println!("{} of {} points are kept; {merged} runs were merged", kept.len(), made.len());
    ensure!(merged > 0, "nothing was merged");
    ensure!(kept.len() < made.len(), "nothing expired");
    ensure!(kept.last() == made.last(), "the newest is gone");
    for point in &kept {
        site.assert_exact(*point)?;
    }
    site.verify()?;

    // By hand, beside the collector; and what is planned is done.
    site.operator(&["vault", "policy", "set", "--keep-all", "0s", "--yes"])?;
    site.operator(&["vault", "maintain", "--yes", "--grace", "0s"])?;
    let plan = planned(&site)?;
    ensure!(plan["expire"] == serde_json::json!([]), "{plan}");
    let last = site.point()?;
    site.assert_exact(last)?;
    site.verify()?;
    site.stop_agent()
}
