use super::*;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Instant,
};

const LIMITS: HookLimits = HookLimits { call: Duration::from_secs(10), hold: Duration::from_secs(7) };

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
    /// A hook that notes that it was called.
    fn hook(&self, name: &str, body: &str) -> PathBuf {
        let path = self.path().join(name);
        let log = self.path().join(".log");
        fs::write(&path, format!("#!/bin/sh\necho \"{name} $1\" >> {}\n{body}\n", log.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
    fn hooks(&self) -> Hooks {
        Hooks::find(self.path()).unwrap().0
    }
    fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path().join(".log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}

/// Calls them, with somebody who waits for them.
fn begin(dir: &Dir, limits: HookLimits) -> Quieted {
    Quieted::begin(&dir.hooks(), limits, Called::left(dir.path()), &AtomicBool::new(false))
}

#[test]
fn they_are_called_in_order_and_in_reverse() {
    let dir = Dir::new();
    for name in ["20-b", "10-a", "30-c"] {
        dir.hook(name, "");
    }
    let quieted = begin(&dir, LIMITS);
    assert!(quieted.failed().is_none());
    assert_eq!(dir.log(), ["10-a freeze", "20-b freeze", "30-c freeze"]);
    let ran = quieted.end();
    assert_eq!(dir.log()[3..], ["30-c thaw", "20-b thaw", "10-a thaw"]);
    assert_eq!(ran.len(), 6);
    assert!(ran.iter().all(|ran| ran.outcome == Outcome::Done));
}

#[test]
fn after_one_that_fails_nobody_is_called_and_all_that_were_go_on() {
    let dir = Dir::new();
    dir.hook("a", "");
    dir.hook("b", "echo locked; echo 'no database' >&2; [ \"$1\" = thaw ] || exit 3");
    dir.hook("c", "");
    let quieted = begin(&dir, LIMITS);
    let failed = quieted.failed().unwrap();
    assert_eq!((failed.hook.as_str(), &failed.outcome), ("b", &Outcome::Failed(3)));
    assert_eq!(failed.output, "locked\nno database");
    drop(quieted);
    assert_eq!(dir.log(), ["a freeze", "b freeze", "b thaw", "a thaw"]);
}

#[test]
fn a_thaw_that_fails_keeps_nobody_from_going_on() {
    let dir = Dir::new();
    dir.hook("a", "");
    dir.hook("b", "[ \"$1\" = freeze ]");
    let ran = begin(&dir, LIMITS).end();
    assert_eq!(dir.log()[2..], ["b thaw", "a thaw"]);
    assert_eq!(ran[2].outcome, Outcome::Failed(1));
}

#[test]
fn one_that_hangs_is_ended_with_all_that_it_started() {
    let dir = Dir::new();
    let child = dir.path().join(".child");
    dir.hook(
        "a",
        &format!("[ $1 = thaw ] && exit; trap '' TERM; sleep 1000 & echo $! > {}; wait", child.display()),
    );
    let limits = HookLimits { call: Duration::from_millis(300), ..LIMITS };
    let began = Instant::now();
    let quieted = begin(&dir, limits);
    assert_eq!(quieted.failed().unwrap().outcome, Outcome::TimedOut);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    drop(quieted);
    assert_eq!(dir.log(), ["a freeze", "a thaw"]);
    let pid = fs::read_to_string(child).unwrap();
    let state = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    // Gone, or not yet taken leave of by its new parent.
    assert!(state.as_ref().is_err() || state.as_ref().is_ok_and(|s| s.contains(") Z ")), "{state:?}");
}

#[test]
fn what_it_leaves_behind_is_not_waited_for() {
    let dir = Dir::new();
    dir.hook("a", "echo begun; [ $1 = freeze ] && { sleep 3 & }; exit 0");
    let began = Instant::now();
    let ran = begin(&dir, LIMITS).end();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(ran[0].output, "begun");
}

#[test]
fn what_it_leaves_behind_may_print_for_ever() {
    let dir = Dir::new();
    // It ends when nobody reads any more.
    dir.hook("a", "[ $1 = freeze ] && { yes & }; exit 0");
    let began = Instant::now();
    let ran = begin(&dir, LIMITS).end();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(ran.iter().all(Ran::is_done) && dir.log().len() == 2);
}

#[test]
fn of_much_output_the_end_is_kept() {
    let dir = Dir::new();
    dir.hook("a", "[ $1 = thaw ] || { i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; }");
    let ran = begin(&dir, LIMITS).end();
    assert_eq!(ran[0].outcome, Outcome::Done);
    assert!(ran[0].output.len() <= OUTPUT_BYTES_MAX && ran[0].output.ends_with("line 19999"));
}

#[test]
fn it_is_told_little_and_how_long_it_is_held() {
    let dir = Dir::new();
    dir.hook("a", "echo $HIGHWATER_HOLD_S $HOME; pwd; cat");
    let ran = begin(&dir, LIMITS).end();
    assert_eq!(ran[0].output, "7\n/");
}

#[test]
fn a_file_that_is_no_program_is_not_run() {
    let dir = Dir::new();
    let path = dir.path().join("a");
    fs::write(&path, [0x7f, b'E', b'L', b'F', 0, 0]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let quieted = begin(&dir, LIMITS);
    let outcome = &quieted.failed().unwrap().outcome;
    assert!(matches!(outcome, Outcome::NotRun(_)), "{outcome}");
}

#[test]
fn what_others_can_change_is_refused() {
    let dir = Dir::new();
    let names = |hooks: &Hooks| hooks.iter().map(|hook| hook.name.clone()).collect::<Vec<_>>();
    for (name, mode) in
        [("a", 0o755), ("b", 0o775), ("c", 0o757), ("d", 0o644), ("e~", 0o755), ("f.dpkg-dist", 0o755)]
    {
        fs::set_permissions(dir.hook(name, ""), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir(dir.path().join("g")).unwrap();
    let (hooks, refused) = Hooks::find(dir.path()).unwrap();
    assert_eq!(names(&hooks), ["a"]);
    let refused: Vec<_> =
        refused.iter().map(|r| (r.path.file_name().unwrap().to_str().unwrap(), r.why)).collect();
    let open = "others than root can change it";
    assert_eq!(refused, [("b", open), ("c", open), ("d", "it is not executable")]);
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(Hooks::find(dir.path()), Err(HooksError::Open(_))));
    assert!(Hooks::find(&dir.path().join("nowhere")).unwrap().0.is_empty());
}

/// Waits for what it is, and no longer than for some seconds.
fn until_known(quieting: &mut Quieting) -> Quiet {
    for _ in 0..1000 {
        match quieting.look() {
            Quiet::Soon => std::thread::sleep(Duration::from_millis(10)),
            known => return known.clone(),
        }
    }
    panic!("it takes too long")
}

#[test]
fn they_stand_still_until_released() {
    let (dir, run) = (Dir::new(), tempfile::tempdir().unwrap());
    dir.hook("a", "");
    let mut quieting = Quieting::start(dir.hooks(), LIMITS, run.path()).unwrap();
    assert_eq!(until_known(&mut quieting), Quiet::Still);
    assert!(quieting.is_still());
    assert_eq!(dir.log(), ["a freeze"]);
    let ran = quieting.release().recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(ran.len(), 2);
    assert_eq!(dir.log(), ["a freeze", "a thaw"]);
    assert!(thaw_left(dir.path(), run.path(), LIMITS).is_empty(), "nothing is left");
}

#[test]
fn they_go_on_in_time_whoever_forgets_them() {
    let (dir, run) = (Dir::new(), tempfile::tempdir().unwrap());
    dir.hook("a", "");
    let limits = HookLimits { hold: Duration::from_millis(200), ..LIMITS };
    let mut quieting = Quieting::start(dir.hooks(), limits, run.path()).unwrap();
    assert_eq!(until_known(&mut quieting), Quiet::Still);
    let ended = std::iter::repeat_with(|| std::thread::sleep(Duration::from_millis(10)))
        .take(500)
        .find(|()| dir.log().len() == 2);
    assert!(ended.is_some(), "{:?}", dir.log());
    assert!(!quieting.is_still());
}

#[test]
fn one_that_fails_is_told_by_its_name_and_its_words() {
    let (dir, run) = (Dir::new(), tempfile::tempdir().unwrap());
    dir.hook("a", "[ $1 = thaw ] || { echo no such database; exit 4; }");
    let mut quieting = Quieting::start(dir.hooks(), LIMITS, run.path()).unwrap();
    let said = "the hook a failed with exit code 4: no such database";
    assert_eq!(until_known(&mut quieting), Quiet::Failed(said.into()));
    assert!(!quieting.is_still());
}

/// Who waited for them gives up while one of them is called.
#[test]
fn those_that_nobody_waits_for_are_not_called() {
    let (dir, run) = (Dir::new(), tempfile::tempdir().unwrap());
    dir.hook("a", "");
    dir.hook("b", "[ $1 = thaw ] || sleep 60");
    dir.hook("c", "");
    let quieting = Quieting::start(dir.hooks(), LIMITS, run.path()).unwrap();
    while dir.log().len() < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let left = || fs::read_to_string(run.path().join("hooks-called")).unwrap_or_default();
    assert_eq!(left(), "a\nb");
    let ran = quieting.release().recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(ran[1].outcome, Outcome::Unwanted);
    assert_eq!(dir.log(), ["a freeze", "b freeze", "b thaw", "a thaw"]);
    assert_eq!(left(), "");
}

/// Ended in between, it goes on where it was.
#[test]
fn whoever_was_thawed_is_forgotten_at_once() {
    let (dir, run) = (Dir::new(), tempfile::tempdir().unwrap());
    dir.hook("a", "");
    let gate = run.path().join("gate");
    dir.hook("b", &format!("while [ ! -e {} ]; do sleep 0.01; done", gate.display()));
    dir.hook("c", "");
    let left = || fs::read_to_string(run.path().join("hooks-called")).unwrap_or_default();
    fs::write(run.path().join("hooks-called"), "a\nb\nc").unwrap();
    let ended = thaw_left_meanwhile(dir.path().into(), run.path().into(), LIMITS).unwrap();
    while dir.log().len() < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(left(), "a\nb");
    fs::write(gate, "").unwrap();
    assert_eq!(ended.recv_timeout(Duration::from_secs(5)).unwrap().len(), 3);
    assert_eq!(
        (dir.log(), left()),
        (["c thaw", "b thaw", "a thaw"].map(String::from).to_vec(), String::new())
    );
    assert!(thaw_left_meanwhile(dir.path().into(), run.path().into(), LIMITS).is_none());
}

#[test]
fn what_a_dead_agent_left_goes_on_at_the_next_start() {
    let (dir, run) = (Dir::new(), tempfile::tempdir().unwrap());
    for name in ["a", "b", "c"] {
        dir.hook(name, "");
    }
    fs::write(run.path().join("hooks-called"), "a\nc\ngone").unwrap();
    let ran = thaw_left(dir.path(), run.path(), LIMITS);
    assert!(ran.iter().all(Ran::is_done));
    assert_eq!(dir.log(), ["c thaw", "a thaw"]);
    assert!(thaw_left(dir.path(), run.path(), LIMITS).is_empty());
}
