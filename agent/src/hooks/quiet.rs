//! Applications made to stand still by a thread of its own, so that replication goes on while hooks take their time, and so that they go
//! on in time whatever becomes of whoever asked.
//!
//! **If the agent dies**, the names of the hooks that were called lie in a record in the run directory: [`thaw_left`] calls them at the next
//! start, or when `highwater-agent thaw` is run. Until then the application stands still, unless its hook minds `HIGHWATER_HOLD_S`.

use super::{Call, Hook, HookLimits, Hooks, Outcome, Quieted, Ran, record::Called, run};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    time::Duration,
};

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
    release: Option<Sender<()>>,
    ended: Option<Receiver<Vec<Ran>>>,
    /// They were told to go on.
    over: Arc<AtomicBool>,
    /// Nobody waits for them any more.
    unwanted: Arc<AtomicBool>,
}

impl Quieting {
    /// Begins.
    ///
    /// # Errors
    /// The thread cannot be started: no hook is called then.
    pub fn start(hooks: Hooks, limits: HookLimits, run_dir: &Path) -> io::Result<Self> {
        let record = Called::left(run_dir);
        let ((say_ready, ready), (release, released), (say_ended, ended)) = (channel(), channel(), channel());
        let (over, unwanted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (shared, given_up) = (over.clone(), unwanted.clone());
        let work = move || {
            let quieted = Quieted::begin(&hooks, limits, record, &given_up);
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
            let _ = say_ended.send(quieted.end());
        };
        std::thread::Builder::new().name("hooks".into()).spawn(work)?;
        Ok(Self { ready, known: Quiet::Soon, release: Some(release), ended: Some(ended), over, unwanted })
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
    pub fn release(mut self) -> Receiver<Vec<Ran>> {
        self.ended.take().unwrap_or_else(|| channel().1)
    }
}

impl Drop for Quieting {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Release);
        self.release = None;
    }
}

fn one_line(text: &str) -> String {
    text.lines().last().unwrap_or("it said nothing").chars().take(200).collect()
}

/// Calls with `thaw` what an earlier life called with `freeze`, and was not able to. Answers what was called. Ended in between, it has forgotten only whom
/// it has called.
pub fn thaw_left(dir: &Path, run_dir: &Path, limits: HookLimits) -> Vec<Ran> {
    let mut record = Called::left(run_dir);
    if record.names().is_empty() {
        return vec![];
    }
    let Ok((hooks, _)) = Hooks::find(dir) else { return vec![] };
    let mut all = vec![];
    for name in record.names().to_vec().iter().rev() {
        // One that is there no longer can't be called.
        if let Some(hook) = hooks.iter().find(|hook| hook.name == *name) {
            all.push(run::run(hook, Call::Thaw, limits, None));
        }
        record.remove(name);
    }
    all
}

/// The same by a thread of its own; none if nothing was left.
pub fn thaw_left_meanwhile(dir: PathBuf, run_dir: PathBuf, limits: HookLimits) -> Option<Receiver<Vec<Ran>>> {
    if Called::left(&run_dir).names().is_empty() {
        return None;
    }
    let (say, ended) = channel();
    let work = move || {
        let _ = say.send(thaw_left(&dir, &run_dir, limits));
    };
    // Without a thread they wait for the next start.
    std::thread::Builder::new().name("hooks".into()).spawn(work).ok().map(|_| ended)
}

impl Ran {
    /// A call with `freeze` that was not made.
    pub(super) fn not_run(hook: &Hook, why: String) -> Self {
        let (hook, outcome) = (hook.name.clone(), Outcome::NotRun(why));
        Self { hook, call: Call::Freeze, outcome, took: Duration::ZERO, output: String::new() }
    }

    /// Whether it did what it was called for.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.outcome == Outcome::Done
    }
}
