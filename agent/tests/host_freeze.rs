//! Freezing and the guardian, on real filesystems.

mod support;

use highwater_agent::{
    device::inspect,
    freeze::{FreezeError, FreezeOptions, FrozenSet, thaw_all},
    guardian::{GuardianHandle, GuardianOptions},
    mounts::{Filesystem, survey},
};
use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use support::{Loop, Mounted, eventually, freeze, is_frozen, machine, scratch, thaw};

const FILE_SYSTEMS: [&str; 3] = ["ext4", "xfs", "btrfs"];

/// Three mounted filesystems. Fields drop in order: unmounted, detached, removed.
struct Three {
    mounted: Vec<Mounted>,
    loops: Vec<Loop>,
    dir: tempfile::TempDir,
}

impl Three {
    fn new() -> Self {
        let dir = scratch();
        let (mut mounted, mut loops) = (Vec::new(), Vec::new());
        for fs in FILE_SYSTEMS {
            let device = Loop::create(dir.path(), &format!("{fs}.img"), 320 << 20);
            mounted.push(Mounted::format(&device.path, fs, &dir.path().join(fs)));
            loops.push(device);
        }
        Self { mounted, loops, dir }
    }
    fn devices(&self) -> Vec<PathBuf> {
        self.loops.iter().map(|device| device.path.clone()).collect()
    }
    fn filesystems(&self) -> Vec<Filesystem> {
        found_on(&self.devices())
    }
    fn options(&self, deadline: Duration) -> FreezeOptions {
        options(self.dir.path(), deadline)
    }
    fn frozen(&self) -> Vec<bool> {
        self.mounted.iter().map(|mount| is_frozen(&mount.point)).collect()
    }
    fn assert_writable(&self, limit: Duration, when: &str) {
        for mount in &self.mounted {
            assert!(mount.writes_within(limit), "{} is not writable {when}", mount.point.display());
        }
    }
}

fn found_on(devices: &[PathBuf]) -> Vec<Filesystem> {
    let devices: Vec<_> = devices.iter().map(|path| inspect(path).expect("a device")).collect();
    survey(&devices).expect("/proc and /sys are there").filesystems
}

fn options(dir: &Path, deadline: Duration) -> FreezeOptions {
    FreezeOptions { deadline, sync_limit: Duration::from_secs(20), run_dir: dir.join("run") }
}

fn guardian(log: Option<PathBuf>) -> GuardianHandle {
    let program = Some(env!("CARGO_BIN_EXE_highwater-guardian").into());
    GuardianHandle::spawn(GuardianOptions { program, log }).expect("the guardian starts")
}

#[test]
fn all_are_frozen_together_and_thawed() {
    let Some(_machine) = machine() else { return };
    let three = Three::new();
    let guardian = guardian(None);
    let set = FrozenSet::freeze(&three.filesystems(), &guardian, &three.options(Duration::from_secs(10)))
        .expect("nothing hinders it");
    assert_eq!(set.frozen().len(), 3);
    assert_eq!(three.frozen(), [true; 3]);
    assert!(
        !three.mounted[0].writes_within(Duration::from_millis(100)),
        "a frozen filesystem takes no write"
    );
    assert!(three.dir.path().join("run/armed.json").exists());
    let thawed = set.thaw().expect("thaws");
    assert!(thawed.intact && thawed.guardian_confirmed, "{thawed:?}");
    assert!(thawed.filesystems.iter().all(|fs| fs.freeze_us >= 100_000 && fs.freeze_us >= fs.enter_us));
    three.assert_writable(Duration::from_secs(1), "after the thaw");
    assert!(!three.dir.path().join("run/armed.json").exists());
    drop(
        FrozenSet::freeze(&three.filesystems(), &guardian, &three.options(Duration::from_secs(10)))
            .expect("again"),
    );
    assert_eq!(three.frozen(), [false; 3], "dropping thaws");
}

#[test]
fn another_programs_freeze_is_left_alone() {
    let Some(_machine) = machine() else { return };
    let three = Three::new();
    let guardian = guardian(None);
    // Before anything is synced: a frozen filesystem is clean, so syncing it does not wait.
    let filesystems = three.filesystems();
    let last = filesystems.last().expect("three").mount_point.clone();
    freeze(&last).expect("not frozen yet");
    let error = FrozenSet::freeze(&filesystems, &guardian, &three.options(Duration::from_secs(10)))
        .expect_err("one is taken");
    assert!(
        matches!(&error, FreezeError::AlreadyFrozen { mount_point } if *mount_point == last),
        "{error:?}"
    );
    guardian.check().expect("alive");
    let frozen: Vec<bool> = filesystems.iter().map(|fs| is_frozen(&fs.mount_point)).collect();
    assert_eq!(frozen, [false, false, true], "ours are thawed, theirs is not");
    assert!(thaw(&last));
}

#[test]
fn the_deadline_thaws_and_the_point_is_void() {
    let Some(_machine) = machine() else { return };
    let three = Three::new();
    let log = three.dir.path().join("guardian.log");
    let guardian = guardian(Some(log.clone()));
    let start = Instant::now();
    let set = FrozenSet::freeze(&three.filesystems(), &guardian, &three.options(Duration::from_millis(1500)))
        .expect("nothing hinders it");
    three.assert_writable(
        Duration::from_millis(2600).saturating_sub(start.elapsed()),
        "soon after the deadline",
    );
    assert!(start.elapsed() >= Duration::from_millis(1400), "it kept the freeze until the deadline");
    let thawed = set.thaw().expect("nothing hangs");
    assert!(!thawed.intact, "{thawed:?}");
    let text = std::fs::read_to_string(log).expect("a record");
    assert!(text.contains("the deadline had passed; 3 filesystems armed, 3 thawed"), "{text}");
    let again = FrozenSet::freeze(&three.filesystems(), &guardian, &three.options(Duration::from_secs(5)));
    assert!(again.expect("works again").thaw().expect("thaws").intact);
}

#[test]
fn a_killed_guardian_is_noticed_and_replaced() {
    let Some(_machine) = machine() else { return };
    let three = Three::new();
    let guardian = guardian(None);
    let kill = |signal| {
        let pid = i32::try_from(guardian.pid().expect("runs")).expect("a pid");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("is there");
    };
    for signal in [nix::sys::signal::SIGTERM, nix::sys::signal::SIGINT, nix::sys::signal::SIGHUP] {
        kill(signal);
    }
    let first = guardian.pid();
    guardian.check().expect("ignores them");
    assert_eq!(guardian.pid(), first);
    let set = FrozenSet::freeze(&three.filesystems(), &guardian, &three.options(Duration::from_secs(10)))
        .expect("nothing hinders it");
    kill(nix::sys::signal::SIGKILL);
    std::thread::sleep(Duration::from_millis(50));
    let thawed = set.thaw().expect("the agent thaws by itself");
    assert!(thawed.intact && !thawed.guardian_confirmed, "{thawed:?}");
    let set = FrozenSet::freeze(&three.filesystems(), &guardian, &three.options(Duration::from_secs(10)));
    assert!(set.expect("with a new guardian").thaw().expect("thaws").guardian_confirmed);
    assert_ne!(guardian.pid(), first);
    let none = GuardianHandle::spawn(GuardianOptions { program: Some("/nonexistent".into()), log: None });
    assert!(none.is_err(), "no guardian, no freeze");
}

/// Not a test: the process that the next two kill.
#[test]
#[ignore = "started by other tests"]
fn victim() {
    let Some(dir) = std::env::var_os("HIGHWATER_TEST_DIR").map(PathBuf::from) else { return };
    let devices: Vec<PathBuf> =
        std::env::var("HIGHWATER_TEST_DEVICES").expect("set").split(',').map(PathBuf::from).collect();
    let hold: u64 = std::env::var("HIGHWATER_TEST_HOLD_MS").expect("set").parse().expect("a number");
    let guardian = guardian(None);
    let filesystems = found_on(&devices);
    println!("\nguardian {}", guardian.pid().expect("runs"));
    loop {
        let set = FrozenSet::freeze(&filesystems, &guardian, &options(&dir, Duration::from_secs(60)));
        let set = set.expect("nothing hinders it");
        if hold > 1000 {
            println!("\nfrozen");
        }
        std::thread::sleep(Duration::from_millis(hold));
        set.thaw().expect("thaws");
    }
}

/// The victim; killed with the test.
struct Victim {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Victim {
    fn start(three: &Three, hold_ms: u64) -> Self {
        let devices: Vec<String> = three.devices().iter().map(|d| d.display().to_string()).collect();
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "victim", "--ignored", "--nocapture"])
            .env("HIGHWATER_TEST_DIR", three.dir.path())
            .env("HIGHWATER_TEST_DEVICES", devices.join(","))
            .env("HIGHWATER_TEST_HOLD_MS", hold_ms.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("can be started");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, output }
    }
    fn line(&mut self, start: &str) -> String {
        let mut line = String::new();
        while !line.starts_with(start) {
            line.clear();
            assert!(
                self.output.read_line(&mut line).expect("readable") > 0,
                "the victim ended before {start:?}"
            );
        }
        line.trim_start_matches(start).trim().to_owned()
    }
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn killed_at_random_moments_all_is_thawed_within_a_second() {
    let Some(_machine) = machine() else { return };
    let three = Three::new();
    let mut slowest = Duration::ZERO;
    let mut found_frozen = 0;
    for round in 0..20_u64 {
        let _ = std::fs::remove_file(three.dir.path().join("run/armed.json"));
        let mut victim = Victim::start(&three, 15);
        victim.line("guardian");
        // Dirty data makes the freeze itself take its time, so that some kills hit its middle.
        for mount in &three.mounted {
            let path = mount.point.join("dirty");
            std::thread::spawn(move || std::fs::write(path, vec![round as u8; 8 << 20]));
        }
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        std::thread::sleep(Duration::from_millis(5 + u64::from(nanos.subsec_nanos()) % 200));
        found_frozen += usize::from(three.dir.path().join("run/armed.json").exists());
        let start = Instant::now();
        let _ = victim.child.kill();
        // What is promised is the thaw; how long eight dirty MiB take then is the filesystem's affair, mostly some 50 ms.
        let thawed = eventually(Duration::from_secs(1), || three.frozen() == [false; 3]);
        assert!(thawed, "frozen a second after the kill: {:?}", three.frozen());
        three.assert_writable(Duration::from_secs(20), "after the kill");
        slowest = slowest.max(start.elapsed());
        victim.kill();
    }
    println!("armed at {found_frozen} of 20 kills; the slowest thaw and write of three took {slowest:?}");
    assert!(found_frozen > 0, "no kill hit an armed moment: the test tests nothing");
}

#[test]
fn with_agent_and_guardian_killed_the_record_thaws() {
    let Some(_machine) = machine() else { return };
    let three = Three::new();
    let mut victim = Victim::start(&three, 60_000);
    let guardian: i32 = victim.line("guardian").parse().expect("a pid");
    victim.line("frozen");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(guardian), nix::sys::signal::SIGKILL)
        .expect("is there");
    victim.kill();
    assert_eq!(three.frozen(), [true; 3], "nobody is left to thaw");
    let run_dir = three.dir.path().join("run");
    let outcome = thaw_all(&run_dir).expect("there is a record");
    assert_eq!((outcome.armed, outcome.thawed, outcome.stuck.len()), (3, 3, 0), "{outcome:?}");
    assert!(eventually(Duration::from_millis(100), || three.frozen() == [false; 3]));
    assert_eq!(thaw_all(&run_dir).expect("no record is fine").armed, 0);
}

#[test]
fn a_stack_freezes_from_the_top() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let outer = Loop::create(dir.path(), "outer.img", 320 << 20);
    let below = Mounted::format(&outer.path, "ext4", &dir.path().join("below"));
    let inner = Loop::create(&below.point, "inner.img", 64 << 20);
    let above = Mounted::format(&inner.path, "ext4", &dir.path().join("above"));
    let filesystems = found_on(std::slice::from_ref(&outer.path));
    let order: Vec<(&Path, u32)> =
        filesystems.iter().map(|fs| (fs.mount_point.as_path(), fs.depth)).collect();
    assert_eq!(order, [(above.point.as_path(), 1), (below.point.as_path(), 0)]);
    let guardian = guardian(None);
    for _ in 0..5 {
        assert!(above.writes_within(Duration::from_secs(2)));
        let set = FrozenSet::freeze(&filesystems, &guardian, &options(dir.path(), Duration::from_secs(5)))
            .expect("from the top nothing hangs");
        assert!(is_frozen(&above.point) && is_frozen(&below.point));
        assert!(set.thaw().expect("thaws").intact);
    }
    drop(above);
    drop(inner);
}
