//! Application-consistent points: hooks are called around the freeze, those that fail or hang end nothing but the point's rank, and whatever
//! was made to stand still goes on, also after an agent that was killed.

use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Backing, FileSystem, LoopDisk, Mounted, Site, SiteOptions};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A file system that is replicated, and hooks.
struct Stand {
    site: Site,
    mounted: Mounted,
    _disk: LoopDisk,
}

impl Stand {
    fn new(arena: &Arena, options: SiteOptions, application: &[&str]) -> Result<Self> {
        let ordered = options.capture.iter().any(|line| line.starts_with("point-interval"));
        let disk = LoopDisk::new(Backing::Tmpfs, FileSystem::Ext4.size_bytes_min())?;
        let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
        let application = application.iter().map(ToString::to_string).collect();
        let mut site = Site::new(arena, &SiteOptions { application, copy_frozen: false, ..options })?;
        fs::create_dir(site.hooks_dir())?;
        site.start_agent()?;
        site.protect(disk.path(), "data")?;
        if ordered {
            site.wait_ordered()?
        } else {
            site.wait_replicated()?
        }
        Ok(Self { site, mounted, _disk: disk })
    }

    /// A hook that notes each call, and whether the file system was frozen (which it should not be), and does this besides.
    fn hook(&self, name: &str, body: &str) -> Result<()> {
        let (path, log) = (self.site.hooks_dir().join(name), self.log_path());
        let probe = self.mounted.path().join("probe");
        let script = format!(
            "#!/bin/sh\necho {name} $1 >> {}\ntimeout 2 touch {} || echo {name} $1 frozen >> {}\n{body}\n",
            log.display(),
            probe.display(),
            log.display()
        );
        fs::write(&path, script)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
    }

    fn log_path(&self) -> PathBuf {
        self.site.hooks_dir().join(".log")
    }
    fn log(&self) -> Vec<String> {
        fs::read_to_string(self.log_path()).unwrap_or_default().lines().map(str::to_owned).collect()
    }
    fn wait_log(&self, wanted: &[&str]) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.log() != wanted {
            ensure!(Instant::now() < until, "called were {:?}, not {wanted:?}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
        fs::remove_file(self.log_path()).ok();
        Ok(())
    }

    /// Asks for an application-consistent point; answers how consistent it is.
    fn point(&self) -> Result<String> {
        self.point_said().map(|(rank, _)| rank)
    }

    /// The same, and what the command says.
    fn point_said(&self) -> Result<(String, String)> {
        let said = self.site.agent_command(&["point", "--application"])?;
        let number: u64 = said.split_ascii_whitespace().find_map(|w| w.parse().ok()).context("no number")?;
        let points = self.site.operator(&["points", &self.site.machine()?, "--json"])?;
        let points: Value = serde_json::from_str(&points)?;
        let all = points["points"].as_array().context("no points")?;
        let point = all.iter().find(|p| p["point"] == number).context("it is not listed")?;
        let rank = point["consistency"].as_str().context("no consistency")?.to_owned();
        ensure!(said.contains(&format!("It is {rank}-consistent")), "{rank}: {said}");
        ensure!((rank == "application") == said.ends_with("It is application-consistent."), "{rank}: {said}");
        Ok((rank, said))
    }
}

fn called_around_the_freeze(stand: &Stand) -> Result<()> {
    let (rank, said) = stand.point_said()?;
    ensure!(rank == "filesystem" && said.contains("There are no hooks in"), "{rank}: {said}");
    stand.hook("10-a", "")?;
    stand.hook("20-b", "sleep 1")?;
    let point = stand.point()?;
    ensure!(point == "application", "{point}: {}", stand.site.agent_log());
    stand.wait_log(&["10-a freeze", "20-b freeze", "20-b thaw", "10-a thaw"])?;
    // Only where it was asked for.
    stand.site.point()?;
    ensure!(stand.log().is_empty(), "{:?}", stand.log());
    Ok(())
}

#[test]
fn hooks_are_called_around_the_freeze() -> Result<()> {
    let arena = Arena::enter("hooks")?;
    called_around_the_freeze(&Stand::new(&arena, SiteOptions::default(), &[])?)
}

#[test]
fn hooks_are_called_around_the_freeze_in_write_ordered_mode() -> Result<()> {
    let arena = Arena::enter("hooks-ordered")?;
    let stand = Stand::new(&arena, SiteOptions::ordered("1s"), &[])?;
    called_around_the_freeze(&stand)?;
    // Replication does not wait for a hook that takes its time.
    stand.hook("30-c", "[ $1 = thaw ] || sleep 4")?;
    let before = stand.site.points()?.len();
    fs::write(stand.mounted.path().join("meanwhile"), "1")?;
    let asked = thread::scope(|scope| {
        let asked = scope.spawn(|| stand.point());
        for number in 0..30 {
            fs::write(stand.mounted.path().join("meanwhile"), number.to_string())?;
            thread::sleep(Duration::from_millis(100));
        }
        ensure!(stand.site.points()?.len() > before, "no points while a hook takes its time");
        asked.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    ensure!(asked == "application");
    Ok(())
}

#[test]
fn one_that_fails_or_hangs_costs_the_rank_and_nothing_else() -> Result<()> {
    let arena = Arena::enter("hooks-fail")?;
    let mut stand = Stand::new(&arena, SiteOptions::default(), &["hook-timeout = \"1s\""])?;
    stand.site.allow("HW-1498");
    stand.hook("10-a", "")?;
    stand.hook("20-b", "[ $1 = thaw ] || exit 7")?;
    stand.hook("30-c", "")?;
    let (rank, said) = stand.point_said()?;
    ensure!(rank == "filesystem" && said.contains("the hook 20-b failed with exit code 7"), "{rank}: {said}");
    stand.wait_log(&["10-a freeze", "20-b freeze", "20-b thaw", "10-a thaw"])?;
    ensure!(
        stand.site.agent_log().contains("the hook 20-b failed with exit code 7"),
        "{}",
        stand.site.agent_log()
    );
    // It hangs, and minds no polite word.
    stand.hook("20-b", "[ $1 = thaw ] || { trap '' TERM; while :; do sleep 1; done; }")?;
    ensure!(stand.point()? == "filesystem");
    stand.wait_log(&["10-a freeze", "20-b freeze", "20-b thaw", "10-a thaw"])?;
    ensure!(stand.site.agent_log().contains("the hook 20-b took too long"), "{}", stand.site.agent_log());
    // Its application did not stand still until the file systems were thawed, and only the hook knows.
    stand.hook("20-b", "[ $1 = freeze ] || exit 9")?;
    let (rank, said) = stand.point_said()?;
    ensure!(rank == "filesystem" && said.contains("the hook 20-b failed with exit code 9"), "{rank}: {said}");
    stand.wait_log(&["10-a freeze", "20-b freeze", "30-c freeze", "30-c thaw", "20-b thaw", "10-a thaw"])?;
    // Nor does anybody know if it does not say so in time.
    stand.hook("20-b", "[ $1 = freeze ] || sleep 30")?;
    ensure!(stand.point()? == "filesystem");
    Ok(())
}

#[test]
fn one_that_fails_can_mean_no_point() -> Result<()> {
    let arena = Arena::enter("hooks-abort")?;
    let mut stand = Stand::new(&arena, SiteOptions::default(), &["on-failure = \"abort\""])?;
    stand.site.allow("HW-1498");
    stand.hook("10-a", "[ $1 = thaw ] || { echo the database is gone; exit 7; }")?;
    let points = stand.site.points()?.len();
    let refused = stand.point().err().context("there is a point")?.to_string();
    println!("{refused}");
    ensure!(refused.contains("HW-1498") && refused.contains("the database is gone"), "{refused}");
    ensure!(refused.contains("on-failure"), "what to do is not told: {refused}");
    let notes = stand.site.status()?["notes"].to_string();
    ensure!(notes.contains("the database is gone"), "{notes}");
    stand.wait_log(&["10-a freeze", "10-a thaw"])?;
    ensure!(stand.site.points()?.len() == points);
    // Others go on.
    stand.site.point()?;
    Ok(())
}

/// Asks for a point, and waits until the second hook is being called.
fn second_hook(stand: &Stand, second: &str) -> Result<std::process::Child> {
    stand.hook("10-a", "")?;
    stand.hook("20-b", second)?;
    let asked = stand.site.agent_command_started(&["point", "--application"])?;
    let until = Instant::now() + PATIENCE;
    while stand.log() != ["10-a freeze", "20-b freeze"] {
        ensure!(Instant::now() < until, "called were {:?}", stand.log());
        thread::sleep(Duration::from_millis(10));
    }
    Ok(asked)
}

/// No agent is started after it.
#[test]
fn an_agent_that_stops_lets_applications_go_on_first() -> Result<()> {
    let arena = Arena::enter("hooks-stopped")?;
    let mut stand = Stand::new(&arena, SiteOptions::default(), &[])?;
    let mut asked = second_hook(&stand, "[ $1 = thaw ] && sleep 1 || sleep 60")?;
    let began = Instant::now();
    stand.site.stop_agent()?;
    println!("stopped in {:?}", began.elapsed());
    ensure!(!asked.wait()?.success(), "there is no point");
    ensure!(stand.log()[2..] == ["20-b thaw", "10-a thaw"], "{:?}", stand.log());
    Ok(())
}

/// By the command that the unit runs when the agent has gone.
#[test]
fn what_a_killed_agent_left_standing_goes_on_without_an_agent() -> Result<()> {
    let arena = Arena::enter("hooks-thaw")?;
    let mut stand = Stand::new(&arena, SiteOptions::default(), &[])?;
    let mut asked = second_hook(&stand, "[ $1 = freeze ] || { echo no; exit 3; }; sleep 60")?;
    // While it lives, that is its own affair.
    let said: Value = serde_json::from_str(&stand.site.agent_command(&["thaw", "--json"])?)?;
    ensure!(said["hooks"] == serde_json::json!([]), "{said:#}");
    stand.site.kill_agent()?;
    ensure!(!asked.wait()?.success(), "there is no point");
    let error = stand.site.agent_command(&["thaw"]).err().context("a hook has failed")?.to_string();
    ensure!(error.contains("HW-1498") && error.contains("20-b"), "{error}");
    ensure!(stand.log()[2..] == ["20-b thaw", "10-a thaw"], "{:?}", stand.log());
    let said: Value = serde_json::from_str(&stand.site.agent_command(&["thaw", "--json"])?)?;
    ensure!(said["hooks"] == serde_json::json!([]), "{said:#}");
    Ok(())
}

#[test]
fn what_a_killed_agent_left_standing_goes_on() -> Result<()> {
    let arena = Arena::enter("hooks-killed")?;
    let mut stand = Stand::new(&arena, SiteOptions::default(), &[])?;
    let mut asked = second_hook(&stand, "[ $1 = thaw ] || sleep 5")?;
    stand.site.kill_agent()?;
    ensure!(!asked.wait()?.success(), "there is no point");
    stand.site.start_agent()?;
    stand.wait_log(&["10-a freeze", "20-b freeze", "20-b thaw", "10-a thaw"])?;
    ensure!(stand.point()? == "application");
    Ok(())
}
