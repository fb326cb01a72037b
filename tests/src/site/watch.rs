//! Looking at a running installation: its figures, its logs, and how long its filesystems hold writers up.

use super::Site;
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

impl Site {
    /// A figure of the agent's, summed over its labels; 0 while there is none.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let address = SocketAddr::from(([127, 0, 0, 1], self.agent_metrics));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        ensure!(text.starts_with("HTTP/1.1 200"), "no metrics: {text}");
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let value = |line: &str| line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok());
        Ok(text.lines().filter(of_name).filter_map(value).sum())
    }

    /// All that the agent has logged, in all its lives.
    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    /// All that guardians had to do.
    pub fn guardian_log(&self) -> String {
        fs::read_to_string(self.run_dir().join("guardian.log")).unwrap_or_default()
    }

    /// Whether the hook is copying now: everything is frozen then.
    pub fn is_copying(&self) -> bool {
        let entries = fs::read_dir(&self.copies.0).into_iter().flatten().flatten();
        entries.into_iter().any(|e| e.path().extension().is_some_and(|x| x == "new"))
    }

    /// Stops the collector in an orderly way, and judges its log.
    pub fn stop_collector(&mut self) -> Result<()> {
        self.collector.take().map_or(Ok(()), crate::Daemon::stop)
    }

    /// Waits until something holds.
    pub fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        mut holds: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let until = Instant::now() + timeout;
        while !holds(self)? {
            ensure!(Instant::now() < until, "not within {timeout:?}: {what}\n{:#}", self.status()?);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Every point in the vault is exact, and the last one has all disks (earlier ones lack what was still being copied for
    /// the first time). Answers how many points there are.
    pub fn assert_all_exact(&self) -> Result<usize> {
        let points = self.points()?;
        let (last, earlier) = points.split_last().context("no points")?;
        for (point, _) in earlier {
            let disks = self.exact_disks(*point)?;
            ensure!(disks > 0, "point {point} is empty");
        }
        self.assert_exact(last.0)?;
        Ok(points.len())
    }
}

/// Writes a little into each directory and syncs it; answers how long the slowest took, and fails beyond the limit.
pub fn write_all_within(dirs: &[&Path], limit: Duration) -> Result<Duration> {
    let (done, wait) = mpsc::channel();
    let started = Instant::now();
    for dir in dirs {
        let (path, done) = (dir.join("probe"), done.clone());
        thread::spawn(move || {
            let written = File::create(&path)
                .and_then(|mut file| file.write_all(&[7; 512]).and_then(|()| file.sync_all()));
            done.send((path, written, started.elapsed())).ok();
        });
    }
    let mut slowest = Duration::ZERO;
    for _ in dirs {
        // Longer than the limit: one that is late is better told than one that never came.
        let Ok((path, written, took)) = wait.recv_timeout(Duration::from_secs(20)) else {
            // Or the load that waits for it would keep the failing test from its end.
            dirs.iter().for_each(|dir| crate::freeze::thaw_if_frozen(dir));
            bail!("a filesystem accepted no write for 20 s");
        };
        written.with_context(|| format!("cannot write {}", path.display()))?;
        ensure!(took <= limit, "{} accepted a write only after {took:?}", path.display());
        slowest = slowest.max(took);
    }
    Ok(slowest)
}
