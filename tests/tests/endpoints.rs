//! The metrics ports of agent and collector under clients that only hold connections.

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Daemon, Site, SiteOptions, scrape};
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

const IDLE: usize = 1000;
/// A port's places, and what the daemon has open besides.
const DESCRIPTORS_MORE_MAX: usize = 24;

fn descriptors(daemon: Option<&Daemon>) -> Result<usize> {
    let pid = daemon.and_then(Daemon::pid).context("the daemon does not run")?;
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

#[test]
fn idle_and_slow_clients_keep_nobody_from_the_metrics() -> Result<()> {
    let arena = Arena::enter("scrapes")?;
    let mut site = Site::new(&arena, &SiteOptions::default())?;
    site.start_agent()?;
    let ports =
        [(site.agent_metrics(), "highwater_agent_"), (site.collector_metrics(), "highwater_collector_")];
    for (address, prefix) in ports {
        ensure!(address.ip().is_loopback());
        ensure!(scrape(address)?.contains(prefix));
        let of_agent = prefix.contains("agent");
        let count =
            |site: &Site| descriptors(if of_agent { site.agent.as_ref() } else { site.collector.as_ref() });
        let before = count(&site)?;
        let mut idle = vec![];
        for number in 0..IDLE {
            idle.push(TcpStream::connect_timeout(&address, Duration::from_secs(5))?);
            if number % 250 == 249 {
                ensure!(scrape(address)?.contains(prefix), "kept out by {number} idle connections");
            }
        }
        thread::sleep(Duration::from_millis(300));
        let now = count(&site)?;
        ensure!(now <= before + DESCRIPTORS_MORE_MAX, "{before} descriptors, then {now}");
        drop(idle);

        // One that sends its header a byte at a time, for ever.
        let mut loris = TcpStream::connect(address)?;
        loris.set_read_timeout(Some(Duration::from_millis(50)))?;
        loris.write_all(b"GET /metrics HTTP/1.1\r\n")?;
        let began = Instant::now();
        let cut = loop {
            ensure!(began.elapsed() < Duration::from_secs(40), "it is never cut off");
            let written = loris.write_all(b"x: y\r\n");
            let read = loris.read(&mut [0; 512]);
            if written.is_err() || read.is_ok() {
                break began.elapsed();
            }
            thread::sleep(Duration::from_millis(200));
        };
        println!("{prefix}: {now} descriptors with {IDLE} idle connections; a slow one is cut after {cut:?}");
        ensure!(scrape(address)?.contains(prefix));
    }
    site.stop_agent()
}
