//! systemd's watchdog, and what stands behind it: a hanging engine is no longer vouched for, a slow or silent collector is no
//! hang.

use anyhow::{Result, ensure};
use highwater_tests::{
    Arena, Backing, FileSystem, Freeze, LoopDisk, Mounted, Proxy, Random, Site, SiteOptions,
};
use nix::sys::signal::Signal;
use std::{
    fs::File,
    io::Write,
    net::SocketAddr,
    os::unix::net::UnixDatagram,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
/// The agent is heard of twice a second.
const PAUSE_MAX: Duration = Duration::from_secs(3);

/// What stands in for systemd.
struct Notified {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Notified {
    fn new(arena: &Arena) -> Result<Self> {
        let path = arena.dir().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        Ok(Self { socket, path })
    }

    /// Listens for so long; answers the longest time without a sign of life, and what was told.
    fn listen(&self, time: Duration) -> (Duration, String) {
        let (began, mut heard, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
        let (mut message, mut told) = ([0; 256], String::new());
        while began.elapsed() < time {
            if let Ok(bytes) = self.socket.recv(&mut message) {
                let text = String::from_utf8_lossy(&message[..bytes]);
                if text.contains("WATCHDOG=1") {
                    heard = Instant::now();
                }
                told.push_str(&text);
            }
            longest = longest.max(heard.elapsed());
        }
        (longest, told)
    }
}

#[test]
fn an_engine_that_hangs_is_not_vouched_for() -> Result<()> {
    let arena = Arena::enter("hang")?;
    let notified = Notified::new(&arena)?;
    let (held, disk) = (LoopDisk::new(Backing::Tmpfs, 64 * MIB)?, LoopDisk::new(Backing::Tmpfs, 16 * MIB)?);
    let state = Mounted::make(FileSystem::Ext4, held.path())?;
    let options = SiteOptions {
        state_dir: Some(state.path().join("state")),
        limits: vec!["hang = \"2s\"".into()],
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    site.allow("HW-1485");
    site.agent_variable("NOTIFY_SOCKET", &notified.path);
    site.start_agent()?;
    let (longest, told) = notified.listen(Duration::from_secs(4));
    ensure!(told.contains("READY=1") && longest < PAUSE_MAX, "{longest:?} of silence: {told}");

    // Writing down that a disk is protected hangs in the kernel.
    let frozen = Freeze::new(state.path())?;
    let mut protect = Command::new(highwater_tests::daemon::program("highwater-agent")?)
        .arg("--config")
        .arg(site.agent_config())
        .arg("protect")
        .arg(disk.path())
        .stdout(Stdio::null())
        .spawn()?;
    notified.listen(Duration::from_secs(4));
    let (_, told) = notified.listen(Duration::from_secs(4));
    ensure!(!told.contains("WATCHDOG"), "an engine that hangs is vouched for");
    ensure!(site.agent_log().contains("HW-1485"), "{}", site.agent_log());
    drop(frozen);
    ensure!(protect.wait()?.success());
    notified.listen(Duration::from_secs(2));
    let (longest, _) = notified.listen(Duration::from_secs(3));
    ensure!(longest < PAUSE_MAX, "not heard of for {longest:?} after the hang was over");
    site.stop_agent()
}

#[test]
fn a_slow_or_silent_collector_is_no_hang() -> Result<()> {
    let arena = Arena::enter("slow")?;
    let notified = Notified::new(&arena)?;
    let port = highwater_tests::daemon::free_port()?;
    let proxy = Proxy::to(SocketAddr::from(([127, 0, 0, 1], port)))?;
    let disk = LoopDisk::new(Backing::Tmpfs, 32 * MIB)?;
    let mut content = vec![0; 24 * MIB as usize];
    Random::new(11).fill(&mut content);
    let mut file = File::options().write(true).open(disk.path())?;
    file.write_all(&content)?;
    file.sync_all()?;
    let options = SiteOptions {
        through: Some(proxy.address()),
        ingest_port: Some(port),
        limits: ["hang = \"2s\"", "silence = \"4s\""].map(String::from).to_vec(),
        ..SiteOptions::default()
    };
    let mut site = Site::new(&arena, &options)?;
    site.allow("session ended");
    site.agent_variable("NOTIFY_SOCKET", &notified.path);
    site.start_agent()?;
    proxy.set_rate(128 << 10);
    site.protect(disk.path(), "data")?;
    let (longest, _) = notified.listen(Duration::from_secs(12));
    ensure!(longest < PAUSE_MAX, "a slow collector silenced the agent for {longest:?}");
    ensure!(!site.agent_log().contains("HW-11"), "{}", site.agent_log());

    // The connection stands, and nobody is behind it any more.
    if let Some(collector) = &site.collector {
        collector.signal(Signal::SIGSTOP)?;
    }
    let stopped = Instant::now();
    let (longest, _) = notified.listen(Duration::from_secs(3));
    ensure!(longest < PAUSE_MAX, "a silent collector silenced the agent for {longest:?}");
    while !site.agent_log().contains("HW-1102") {
        ensure!(stopped.elapsed() < Duration::from_secs(9), "the silence was not noticed");
        thread::sleep(Duration::from_millis(20));
    }
    println!("a stopped collector was noticed after {:?}", stopped.elapsed());
    if let Some(collector) = &site.collector {
        collector.signal(Signal::SIGCONT)?;
    }
    proxy.heal();
    site.wait_replicated()?;
    let point = site.point()?;
    site.assert_exact(point)?;
    site.stop_agent()
}
