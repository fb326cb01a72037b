//! Guests that answer, and guests that do not; and that whatever was frozen in them is thawed, whoever dies.

mod support;

use highwater_agent::{
    error::Coded,
    freeze::thaw_all,
    guardian::GuardianOptions,
    guests::{FrozenGuests, GuestOptions, Guests},
};
use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use support::{
    eventually,
    fake_guest::{FakeGuest, Manner},
};

/// Long beside what an honest guest takes.
const SECOND: Duration = Duration::from_secs(1);

fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("highwater-guests-").tempdir_in("/tmp").expect("room")
}

fn options(socket: &Path) -> GuestOptions {
    GuestOptions {
        name: socket.file_name().expect("a name").to_string_lossy().into_owned(),
        socket: Some(socket.into()),
        // What is no device is of no guest's; it can be written out all the same.
        disks: vec![env!("CARGO_BIN_EXE_highwater-guardian").into()],
        freeze_timeout: SECOND,
        application: false,
    }
}

fn guests(dir: &Path, sockets: &[&Path]) -> Guests {
    let program = Some(env!("CARGO_BIN_EXE_highwater-guardian").into());
    let guardian = GuardianOptions { program, log: Some(dir.join("guardian.log")) };
    Guests::new(sockets.iter().map(|socket| options(socket)).collect(), &guardian, dir.to_owned())
}

fn records(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).expect("is there").flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("guest-armed-")).count()
}

fn codes(frozen: &FrozenGuests) -> Vec<u16> {
    frozen.failed.iter().map(|failed| failed.error.code()).collect()
}

#[test]
fn honest_guests_stand_still_together() {
    let dir = scratch();
    let both = ["a", "b"].map(|name| FakeGuest::start(dir.path(), name, Manner::Honest));
    let mut guests = guests(dir.path(), &[&both[0].socket, &both[1].socket]);
    for round in 1..=3 {
        let frozen = guests.freeze(Duration::from_secs(5), None);
        assert_eq!((frozen.count(), codes(&frozen)), (2, vec![]), "{:?}", frozen.failed);
        assert!(both.iter().all(FakeGuest::is_frozen));
        assert_eq!(records(dir.path()), 2);
        let (stood, failed) = frozen.thaw();
        assert_eq!((stood.len(), failed.len()), (2, 0), "{failed:?}");
        assert!(both.iter().all(|guest| !guest.is_frozen() && guest.freezes() == round));
        assert_eq!(records(dir.path()), 0, "the records go with the freeze");
    }
    drop(guests.freeze(Duration::from_secs(5), None));
    assert!(eventually(SECOND, || !both.iter().any(FakeGuest::is_frozen)), "dropping thaws");
    let log = std::fs::read_to_string(dir.path().join("guardian.log")).expect("opened at its start");
    assert_eq!(log, "", "no guardian had anything to do");
}

/// Each beside an honest one, whom it must not hinder.
#[test]
fn a_guest_that_misbehaves_is_left_out_in_time() {
    let cases = [
        (Manner::Silent, 1445),
        (Manner::Garbage, 1446),
        (Manner::Endless, 1446),
        (Manner::WrongIds, 1445),
        (Manner::DiesMidway, 1445),
        (Manner::Slow(Duration::from_millis(2500)), 1445),
        (Manner::RefusesFreeze, 1446),
        (Manner::Unable, 1446),
        (Manner::Empty, 1447),
    ];
    for (manner, code) in cases {
        let dir = scratch();
        let good = FakeGuest::start(dir.path(), "good", Manner::Honest);
        let bad = FakeGuest::start(dir.path(), "bad", manner);
        let mut guests = guests(dir.path(), &[&good.socket, &bad.socket]);
        let began = Instant::now();
        let frozen = guests.freeze(Duration::from_secs(8), None);
        assert!(began.elapsed() < Duration::from_millis(3600), "{manner:?} took {:?}", began.elapsed());
        assert_eq!((frozen.count(), codes(&frozen)), (1, vec![code]), "{manner:?}: {:?}", frozen.failed);
        assert!(frozen.failed[0].error.to_string().contains("guest bad"));
        assert!(good.is_frozen());
        let (stood, failed) = frozen.thaw();
        assert_eq!((stood.len(), failed.len()), (1, 1), "{manner:?}");
        assert!(!good.is_frozen());
        if manner == Manner::DiesMidway {
            // Whose QEMU is gone; who is asked anew in this test.
            continue;
        }
        let free = eventually(Duration::from_secs(5), || !bad.is_frozen() && records(dir.path()) == 0);
        assert!(free, "{manner:?} is not thawed");
    }
}

/// A group waits for nobody's guests.
#[test]
fn guests_are_waited_for_no_longer_than_there_is_time() {
    let dir = scratch();
    let good = FakeGuest::start(dir.path(), "good", Manner::Honest);
    let slow = FakeGuest::start(dir.path(), "slow", Manner::Slow(Duration::from_millis(800)));
    let mut guests = guests(dir.path(), &[&good.socket, &slow.socket]);
    let began = Instant::now();
    let frozen = guests.freeze(Duration::from_secs(8), Some(Duration::from_millis(300)));
    assert!(began.elapsed() < Duration::from_millis(600), "{:?}", began.elapsed());
    assert_eq!((frozen.count(), codes(&frozen)), (1, vec![1445]), "{:?}", frozen.failed);
    drop(frozen);
    assert!(eventually(Duration::from_secs(5), || !slow.is_frozen() && records(dir.path()) == 0));
}

#[test]
fn nobody_there_is_told() {
    let dir = scratch();
    let mut guests = guests(dir.path(), &[&dir.path().join("absent")]);
    let frozen = guests.freeze(SECOND, None);
    assert_eq!(codes(&frozen), [1445]);
    let lost = GuestOptions { socket: None, ..options(Path::new("no-such-guest-of-this-host")) };
    let mut guests = Guests::new(vec![lost], &GuardianOptions::default(), dir.path().to_owned());
    assert_eq!(codes(&guests.freeze(SECOND, None)), [1448]);
}

#[test]
fn another_programs_freeze_is_left_alone() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Honest);
    guest.freeze_from_inside();
    let mut guests = guests(dir.path(), &[&guest.socket]);
    let frozen = guests.freeze(SECOND, None);
    assert_eq!(codes(&frozen), [1446]);
    drop(frozen);
    drop(guests);
    std::thread::sleep(Duration::from_millis(200));
    assert!(guest.is_frozen());
}

#[test]
fn a_client_before_us_is_no_reason_to_wait() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Honest);
    let first = std::os::unix::net::UnixStream::connect(&guest.socket).expect("free");
    let mut guests = guests(dir.path(), &[&guest.socket]);
    let frozen = guests.freeze(SECOND, None);
    assert_eq!(codes(&frozen), [1445]);
    assert!(frozen.failed[0].error.action().contains("channel of its own"));
    drop(first);
    let again = eventually(Duration::from_secs(5), || guests.freeze(SECOND, None).count() == 1);
    assert!(again, "when the other has left");
}

#[test]
fn one_that_does_not_stay_frozen_does_not_count() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Thaws(Duration::from_millis(50)));
    let mut guests = guests(dir.path(), &[&guest.socket]);
    let frozen = guests.freeze(SECOND, None);
    assert_eq!(frozen.count(), 1);
    std::thread::sleep(Duration::from_millis(150));
    let (stood, failed) = frozen.thaw();
    assert!(stood.is_empty());
    assert_eq!(failed[0].error.code(), 1447);
    assert!(failed[0].error.to_string().contains("3 filesystems were frozen, 0 still were"), "{failed:?}");
}

#[test]
fn a_thaw_that_is_refused_is_tried_again_by_the_guardian() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::RefusesThaws(2));
    let mut guests = guests(dir.path(), &[&guest.socket]);
    let (stood, failed) = guests.freeze(SECOND, None).thaw();
    assert_eq!((stood.len(), failed[0].error.code()), (0, 1447));
    assert!(eventually(Duration::from_secs(3), || !guest.is_frozen()));
    // It may be asked again when the guardian is sure.
    assert!(eventually(Duration::from_secs(5), || guests.freeze(SECOND, None).count() == 1));
}

#[test]
fn one_that_hangs_while_frozen_is_thawed_when_it_hears_again() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Hangs(Duration::from_secs(4)));
    let mut guests = guests(dir.path(), &[&guest.socket]);
    let frozen = guests.freeze(Duration::from_secs(20), None);
    let began = Instant::now();
    let (stood, failed) = frozen.thaw();
    assert!(began.elapsed() < Duration::from_millis(2500), "nobody waits longer for it");
    assert_eq!((stood.len(), failed.len()), (0, 1));
    assert_eq!(codes(&guests.freeze(SECOND, None)), [1447], "not again while it is not sure");
    assert!(eventually(Duration::from_secs(6), || !guest.is_frozen()));
    assert!(eventually(Duration::from_secs(12), || records(dir.path()) == 0), "and then it is");
}

#[test]
fn the_deadline_thaws() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Honest);
    let mut guests = guests(dir.path(), &[&guest.socket]);
    let frozen = guests.freeze(Duration::from_millis(500), None);
    std::thread::sleep(Duration::from_millis(1000));
    assert!(guest.is_frozen(), "freeze-timeout and deadline together");
    assert!(eventually(SECOND, || !guest.is_frozen()));
    let (stood, failed) = frozen.thaw();
    assert_eq!((stood.len(), failed[0].error.code()), (0, 1447));
}

/// Not a test: the process that the next ones kill.
#[test]
#[ignore = "started by other tests"]
fn victim() {
    let Some(dir) = std::env::var_os("HIGHWATER_TEST_DIR").map(PathBuf::from) else { return };
    let hold: u64 = std::env::var("HIGHWATER_TEST_HOLD_MS").expect("set").parse().expect("a number");
    let mut guests = guests(&dir, &[&dir.join("g")]);
    loop {
        let frozen = guests.freeze(Duration::from_secs(60), None);
        assert_eq!(frozen.count(), 1, "{:?}", frozen.failed);
        if hold > 1000 {
            println!("\nfrozen");
        }
        std::thread::sleep(Duration::from_millis(hold));
        let _ = frozen.thaw();
    }
}

/// The victim; killed with the test.
struct Victim(Child);

impl Victim {
    fn start(dir: &Path, hold_ms: u64) -> Self {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "victim", "--ignored", "--nocapture"])
            .env("HIGHWATER_TEST_DIR", dir)
            .env("HIGHWATER_TEST_HOLD_MS", hold_ms.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("can be started");
        Self(child)
    }
    fn wait_frozen(&mut self) {
        let output = BufReader::new(self.0.stdout.take().expect("piped"));
        assert!(output.lines().map_while(Result::ok).any(|line| line == "frozen"), "the victim ended");
    }
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn killed_at_random_moments_the_guest_is_thawed_within_a_second() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Honest);
    let (mut found_frozen, mut slowest) = (0, Duration::ZERO);
    for round in 0..20_u64 {
        let before = guest.freezes();
        let mut victim = Victim::start(dir.path(), 10);
        assert!(eventually(Duration::from_secs(10), || guest.freezes() > before + 1), "round {round}");
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        std::thread::sleep(Duration::from_micros(u64::from(nanos.subsec_nanos()) % 20_000));
        victim.kill();
        found_frozen += usize::from(guest.is_frozen());
        let start = Instant::now();
        // A freeze that was sent and not yet done may come after the kill; the guardian's thaw is behind it.
        let mut calm = 0;
        while calm < 20 {
            assert!(start.elapsed() < SECOND, "frozen a second after the kill");
            calm = if guest.is_frozen() { 0 } else { calm + 1 };
            std::thread::sleep(Duration::from_millis(5));
        }
        slowest = slowest.max(start.elapsed());
    }
    println!(
        "frozen at {found_frozen} of 20 kills; the slowest thaw, 100 ms of calm included, took {slowest:?}"
    );
    assert!(found_frozen > 0, "no kill hit a freeze: the test tests nothing");
}

#[test]
fn with_agent_and_guardian_killed_the_record_thaws() {
    let dir = scratch();
    let guest = FakeGuest::start(dir.path(), "g", Manner::Honest);
    let mut victim = Victim::start(dir.path(), 60_000);
    victim.wait_frozen();
    let children = format!("/proc/{0}/task", victim.0.id());
    let mut guardians = vec![];
    for task in std::fs::read_dir(children).expect("lives").flatten() {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        guardians.extend(text.split_whitespace().map(|pid| pid.parse::<i32>().expect("a pid")));
    }
    assert_eq!(guardians.len(), 1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(guardians[0]), nix::sys::signal::Signal::SIGKILL)
        .expect("is there");
    victim.kill();
    assert!(guest.is_frozen(), "nobody is left to thaw");
    let outcome = thaw_all(dir.path()).expect("there is a record");
    assert_eq!((outcome.armed, outcome.thawed, outcome.guests_stuck.len()), (1, 1, 0), "{outcome:?}");
    assert!(!guest.is_frozen() && records(dir.path()) == 0);
    assert_eq!(thaw_all(dir.path()).expect("no record is fine").armed, 0);
}
