//! Applications made to stand still by a thread of its own, so that replication goes on while hooks take their time, and so that they go
//! on in time whatever becomes of whoever asked.
//!
//! **If the agent dies**, the names of the hooks that were called lie in a record in the run directory: [`thaw_left`] calls them at the next
//! start. Until then the application stands still, unless its hook minds `HIGHWATER_HOLD_S`.

use super::{Call, HookLimits, Hooks, Outcome, Quieted, Ran, run};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
};

/// Where the record lies, in the run directory.
const RECORD: &str = "hooks-called";

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quiet {
    /// Hooks are being called.
    Soon,
    /// All were called: the applications stand still.
    Still,
    /// One failed, and they go on.
    Failed(String),
}

/// See the module. Dropped: the applications go on.
#[derive(Debug)]
pub struct Quieting {
    ready: Receiver<Option<String>>,
    known: Quiet,
    /// Dropped, it ends the wait.
    release: Sender<()>,
    ended: Receiver<Vec<Ran>>,
    /// They were told to go on.
    over: Arc<AtomicBool>,
}

impl Quieting {
    /// Begins.
    ///
    /// # Errors
    /// The record cannot be written, or the thread not be started: no hook is called then.
    pub fn start(hooks: Hooks, limits: HookLimits, run_dir: &Path) -> io::Result<Self> {
        let record = run_dir.join(RECORD);
        let names: Vec<&str> = hooks.iter().map(|hook| hook.name.as_str()).collect();
        fs::write(&record, names.join("\n"))?;
        let ((say_ready, ready), (release, released), (say_ended, ended)) = (channel(), channel(), channel());
        let over = Arc::new(AtomicBool::new(false));
        let shared = over.clone();
        let work = move || {
            let quieted = Quieted::begin(&hooks, limits);
            let failed = quieted
                .failed()
                .map(|ran| format!("the hook {} {}: {}", ran.hook, ran.outcome, one_line(&ran.output)));
            let still = failed.is_none();
            let heard = say_ready.send(failed).is_ok();
            if still && heard {
                // Whoever asked says so, is gone, or takes too long.
                let _: Result<(), RecvTimeoutError> = released.recv_timeout(limits.hold);
            }
            shared.store(true, Ordering::Release);
            let ran = quieted.end();
            let _ = fs::remove_file(&record);
            let _ = say_ended.send(ran);
        };
        std::thread::Builder::new().name("hooks".into()).spawn(work)?;
        Ok(Self { ready, known: Quiet::Soon, release, ended, over })
    }

    /// How far it is.
    pub fn look(&mut self) -> &Quiet {
        if self.known == Quiet::Soon {
            self.known = match self.ready.try_recv() {
                Ok(None) => Quiet::Still,
                Ok(Some(why)) => Quiet::Failed(why),
                Err(TryRecvError::Empty) => Quiet::Soon,
                Err(TryRecvError::Disconnected) => {
                    Quiet::Failed("the thread that calls hooks has ended".into())
                }
            };
        }
        &self.known
    }

    /// Whether they have stood still until now.
    #[must_use]
    pub fn is_still(&self) -> bool {
        self.known == Quiet::Still && !self.over.load(Ordering::Acquire)
    }

    /// They may go on. What was called, and what came of it, is told when it is over.
    #[must_use]
    pub fn release(self) -> Receiver<Vec<Ran>> {
        drop(self.release);
        self.ended
    }
}

fn one_line(text: &str) -> String {
    text.lines().last().unwrap_or("it said nothing").chars().take(200).collect()
}

/// Calls with `thaw` what an earlier life called with `freeze`, and was not able to. Answers what was called.
pub fn thaw_left(dir: &Path, run_dir: &Path, limits: HookLimits) -> Vec<Ran> {
    let record: PathBuf = run_dir.join(RECORD);
    let Ok(text) = fs::read_to_string(&record) else { return vec![] };
    let Ok((hooks, _)) = Hooks::find(dir) else { return vec![] };
    let called = hooks.iter().rev().filter(|hook| text.lines().any(|name| name == hook.name));
    let ran = called.map(|hook| run::run(hook, Call::Thaw, limits)).collect();
    let _ = fs::remove_file(&record);
    ran
}

impl Ran {
    /// Whether it did what it was called for.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.outcome == Outcome::Done
    }
}
