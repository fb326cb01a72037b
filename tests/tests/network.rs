//! A network that cuts, stalls, slows down and alters what passes: the agent goes on by itself, and points stay exact.

use anyhow::{Result, anyhow, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Load, LoopDisk, Mounted, Proxy, Random, Site, SiteOptions, daemon::free_port,
    proxy::Way,
};
use std::{
    fs::File,
    io::Write,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

/// Waits until so many connections have been made.
fn wait_connections(proxy: &Proxy, count: u64) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(15);
    while proxy.connections() < count {
        ensure!(Instant::now() < until, "{} connections, {count} were awaited", proxy.connections());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn the_connection_fails_in_every_way() -> Result<()> {
    let arena = Arena::enter("network")?;
    let port = free_port()?;
    let proxy = Proxy::to(SocketAddr::from(([127, 0, 0, 1], port)))?;
    let disk = LoopDisk::new(Backing::Tmpfs, 128 * MIB)?;
    let data = Mounted::make(FileSystem::Ext4, disk.path())?;
    let mut content = vec![0; 48 * MIB as usize];
    Random::new(8).fill(&mut content);
    let mut file = File::create(data.path().join("content"))?;
    file.write_all(&content)?;
    file.sync_all()?;
    let replication = ["partial-commit = \"4MiB\"", "freeze-deadline = \"10s\""].map(String::from).to_vec();
    let options = SiteOptions {
        through: Some(proxy.address()),
        ingest_port: Some(port),
        replication,
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    // The collector warns of peers that leave in the middle of something, with one of these.
    for expected in ["HW-1463", "session ended", "handshake", "no recovery point this time"] {
        site.allow(expected);
    }
    site.start_agent()?;

    // The first copy: cut within the handshake, within the first delta, and later; bits flipped likewise.
    proxy.cut_after(Way::Up, 700);
    site.protect(disk.path(), "data")?;
    for bytes in [900, 5_000, MIB, 3 * MIB] {
        let before = proxy.connections();
        proxy.cut_after(Way::Up, bytes);
        wait_connections(&proxy, before + 1)?;
        let before = proxy.connections();
        proxy.flip_bit_after(Way::Up, bytes / 2);
        wait_connections(&proxy, before + 1)?;
    }
    site.wait_replicated()?;
    let first = site.point()?;

    let load = Load::start(data.path(), 2)?;
    let mut points = vec![first];
    // Every part of the handshake and of what follows, in both directions.
    for way in [Way::Up, Way::Down] {
        for bytes in [3, 60, 150, 400, 900, 1500, 2500] {
            let before = proxy.connections();
            proxy.flip_bit_after(way, bytes);
            proxy.cut();
            // The one that is spoilt, and the one after it; a flip in padding that nobody reads may spoil none.
            wait_connections(&proxy, before + 1)?;
            thread::sleep(Duration::from_millis(60));
        }
        points.push(site.point()?);
    }
    for round in 0..3 {
        proxy.sever();
        thread::sleep(Duration::from_millis(400 * round));
        proxy.heal();
        points.push(site.point()?);
    }
    proxy.set_rate(MIB);
    proxy.set_delay(Duration::from_millis(20));
    points.push(site.point()?);
    proxy.heal();

    // Nothing passes: the agent goes on answering, whatever waits.
    proxy.stall();
    thread::scope(|scope| {
        let stalled = scope.spawn(|| site.point());
        for _ in 0..3 {
            thread::sleep(Duration::from_secs(1));
            let asked = Instant::now();
            site.status()?;
            ensure!(asked.elapsed() < Duration::from_secs(1), "status took {:?}", asked.elapsed());
        }
        proxy.heal();
        points.push(stalled.join().map_err(|_| anyhow::anyhow!("panicked"))??);
        anyhow::Ok(())
    })?;
    load.stop()?;
    points.push(site.point()?);
    for point in points {
        site.assert_exact(point)?;
    }
    site.verify()?;
    println!("{} connections", proxy.connections());
    ensure!(!site.agent_log().contains("HW-1460"), "{}", site.agent_log());
    ensure!(site.metric("highwater_agent_resynchronizations_total")? == 0.0);
    site.stop_agent()
}

/// A round that would take minutes under its limit: operators are answered meanwhile, and a higher limit holds for it at once.
#[test]
fn a_limit_is_changed_within_a_round() -> Result<()> {
    let arena = Arena::enter("bandwidth")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    let other = LoopDisk::new(Backing::Tmpfs, 8 * MIB)?;
    let options = SiteOptions { point_interval: "1h".into(), ..SiteOptions::default() };
    let mut site = Site::new(&arena, &options)?;
    site.start_agent()?;
    site.protect(disk.path(), "data")?;
    site.wait_replicated()?;
    site.point()?;
    site.agent_command(&["bandwidth", "64KiB"])?;
    let mut content = vec![0; 12 * MIB as usize];
    Random::new(9).fill(&mut content);
    let mut device = File::options().write(true).open(disk.path())?;
    device.write_all(&content)?;
    device.sync_all()?;
    drop(device);
    thread::scope(|scope| {
        let point = scope.spawn(|| site.agent_command(&["point"]));
        thread::sleep(Duration::from_secs(2));
        // Disks come and go between deltas.
        let path = other.path().to_string_lossy();
        let site = &site;
        let protected = scope.spawn(move || site.agent_command(&["protect", &path, "--name", "other"]));
        let (asked, said, early) = (Instant::now(), site.agent_command(&["status"]), point.is_finished());
        let answered = asked.elapsed();
        let (raised, done) = (Instant::now(), site.agent_command(&["bandwidth", "unlimited"]));
        point.join().map_err(|_| anyhow!("the thread panicked"))??;
        let (took, said) = (raised.elapsed(), said?);
        done?;
        protected.join().map_err(|_| anyhow!("the thread panicked"))??;
        println!("answered after {answered:?}; the point was there {took:?} after the limit went");
        ensure!(answered < Duration::from_secs(8) && !early, "answered after {answered:?}, early: {early}");
        ensure!(said.contains("the agent is busy sending") && said.contains("connected"), "{said}");
        ensure!(said.contains("bandwidth  64KiB/s"), "{said}");
        ensure!(took < Duration::from_secs(30), "the point took {took:?} more");
        Ok(())
    })?;
    site.wait_state("other", "bitmap", Duration::from_secs(30))?;
    site.agent_command(&["unprotect", "other"])?;
    let told = site.agent_log();
    ensure!(!told.contains("disconnected from the collector"), "the session broke off:\n{told}");
    site.assert_all_exact()?;
    site.stop_agent()
}
