//! Application-consistent points: hooks make the applications stand still while replication goes on; then the filesystems are frozen as for
//! any point, and the applications go on.
//!
//! A point is application-consistent only if every hook was called with success, and the applications stood still until after the thaw of
//! the filesystems. Otherwise it is what it would be without hooks, or there is none ([`OnHookFailure`]).

use super::{Engine, protect::operator};
use crate::{
    control::Response,
    hooks::{Call, HookLimits, Hooks, Quiet, Quieting, Ran, thaw_left_meanwhile},
};
use std::{
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    time::{Duration, Instant},
};

/// So long hooks may take to say what became of their applications, before the point is made without their word.
const THAW_SOON: Duration = Duration::from_secs(3);

/// And so long when the agent is to stop; less than it may take for that (`STOP_MAX` of the daemon).
const FINISH_MAX: Duration = Duration::from_secs(15);

/// What becomes of a point when a hook fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnHookFailure {
    /// It is made all the same, and is filesystem-consistent only.
    #[default]
    Degrade,
    /// There is none.
    Abort,
}

/// What is chosen about applications.
#[derive(Clone, Debug)]
pub struct ApplicationOptions {
    /// Where hooks lie.
    pub hooks_dir: PathBuf,
    /// Between points.
    pub interval: Duration,
    /// How long hooks may take.
    pub limits: HookLimits,
    /// What a failure means.
    pub on_failure: OnHookFailure,
}

/// What there is to do about applications now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Applications {
    /// Nothing: points are made as usual.
    Alone,
    /// Hooks are being called: no point with a freeze meanwhile.
    Wait,
    /// They stand still, or hooks have failed: the point is made now.
    Freeze,
}

/// What the engine keeps of it.
pub(super) struct ApplicationPoints {
    options: ApplicationOptions,
    due: Instant,
    /// An operator asks for one.
    asked: bool,
    quieting: Option<Quieting>,
    /// Hooks that are being called with `thaw`.
    ending: Option<Receiver<Vec<Ran>>>,
    /// Why the last one was none; told with the status.
    pub(super) trouble: Option<String>,
}

impl ApplicationPoints {
    pub(super) fn new(options: ApplicationOptions) -> Self {
        let due = Instant::now() + options.interval;
        Self { options, due, asked: false, quieting: None, ending: None, trouble: None }
    }

    /// One is wanted now, or not any more.
    pub(super) fn ask(&mut self, asked: bool) {
        self.asked = asked;
    }

    /// Whether they stand still, and did so until now.
    pub(super) fn stand_still(&self) -> bool {
        self.quieting.as_ref().is_some_and(Quieting::is_still)
    }

    /// Whether hooks are being called.
    pub(super) fn are_busy(&self) -> bool {
        self.quieting.is_some() || self.ending.is_some()
    }

    /// Whether the next point with a freeze is to be one for which they stand still.
    pub(super) fn hold_back(&self) -> bool {
        self.asked || self.quieting.is_some()
    }

    /// The filesystems are thawed, and the applications go on. Answers whether they stood still until now. That is for the hooks to say: a
    /// database may have let go of its own accord, and only its hook knows.
    pub(super) fn thawed(&mut self) -> bool {
        let still = self.stand_still();
        self.release();
        if !still {
            return false;
        }
        let Some(ending) = &self.ending else { return false };
        let said = ending.recv_timeout(THAW_SOON);
        if said == Err(RecvTimeoutError::Timeout) {
            // They are told of when they have ended.
            self.trouble =
                Some("the hooks did not say in time that their applications had stood still".to_owned());
            return false;
        }
        self.ending = None;
        let ran = said.unwrap_or_default();
        ran.iter().for_each(tell);
        let failed = ran.iter().find(|ran| ran.call == Call::Thaw && !ran.is_done());
        if let Some(failed) = failed {
            self.trouble = Some(format!(
                "the hook {} {} when its application was to go on",
                failed.hook, failed.outcome
            ));
        }
        failed.is_none()
    }

    /// They may go on, whatever came of the point.
    pub(super) fn release(&mut self) {
        if let Some(quieting) = self.quieting.take() {
            self.ending = Some(quieting.release());
        }
    }

    /// Tells what hooks did that have ended. False while they have not.
    fn end(&mut self) -> bool {
        let Some(ending) = &self.ending else { return true };
        match ending.try_recv() {
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => {}
            Ok(ran) => ran.iter().for_each(tell),
        }
        self.ending = None;
        true
    }

    /// Begins to call hooks, if there are any.
    fn begin(&mut self, run_dir: &std::path::Path) -> Applications {
        (self.due, self.asked) = (Instant::now() + self.options.interval, false);
        let found = match Hooks::find(&self.options.hooks_dir) {
            Ok((hooks, refused)) => {
                for file in refused {
                    tracing::warn!(code = "HW-1498", hook = %file.path.display(), why = file.why, "this hook is not called");
                }
                hooks
            }
            Err(error) => return self.fail(format!("the hooks could not be found: {error}")),
        };
        if found.is_empty() {
            return Applications::Alone;
        }
        match Quieting::start(found, self.options.limits, run_dir) {
            Ok(quieting) => {
                self.quieting = Some(quieting);
                Applications::Wait
            }
            Err(error) => self.fail(format!("the hooks could not be called: {error}")),
        }
    }

    /// Begins to call hooks for a group's point. Answers whether there is nothing to wait for, since there are none.
    pub(super) fn begin_for_group(&mut self, run_dir: &std::path::Path) -> Result<bool, ()> {
        match self.begin(run_dir) {
            Applications::Alone => Ok(true),
            Applications::Wait => Ok(false),
            Applications::Freeze => Err(()),
        }
    }

    fn fail(&mut self, why: String) -> Applications {
        tracing::warn!(code = "HW-1498", why, "no application-consistent point this time");
        self.trouble = Some(why);
        Applications::Freeze
    }
}

impl Engine {
    /// At start: what an earlier life of this program had made to stand still goes on. Whatever time that takes, nobody waits for it; until it is done, no
    /// hooks are called.
    pub(super) fn thaw_applications_left(&mut self) {
        let (dir, limits) = (self.applications.options.hooks_dir.clone(), self.applications.options.limits);
        self.applications.ending = thaw_left_meanwhile(dir, self.options.run_dir.clone(), limits);
    }

    /// At the end: what stands still goes on, and is waited for, as this process is what calls it. What takes longer is left for `highwater-agent
    /// thaw`.
    pub(super) fn finish_applications(&mut self) {
        self.applications.release();
        let until = Instant::now() + FINISH_MAX;
        while !self.applications.end() && Instant::now() < until {
            self.pulse.step();
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Moves hooks on, and says what is to be done.
    pub(super) fn see_to_applications(&mut self) -> Applications {
        if !self.applications.end() {
            return if self.applications.asked { Applications::Wait } else { Applications::Alone };
        }
        let possible = self.in_order() || self.points_possible();
        let Some(quieting) = &mut self.applications.quieting else {
            let due = self.applications.asked || Instant::now() >= self.applications.due;
            if !due || !possible {
                return Applications::Alone;
            }
            if self.group.is_under_way() {
                // A freeze of the group's would end what they stand still for.
                return if self.applications.asked { Applications::Wait } else { Applications::Alone };
            }
            let began = self.applications.begin(&self.options.run_dir);
            return self.unless_aborted(began);
        };
        if !possible {
            self.applications.release();
            return Applications::Alone;
        }
        match quieting.look().clone() {
            Quiet::Soon => Applications::Wait,
            Quiet::Still => {
                self.applications.trouble = None;
                Applications::Freeze
            }
            Quiet::Failed(why) => {
                self.applications.release();
                let failed = self.applications.fail(why);
                // Of a point of the group, nobody here waits.
                if self.group.has_applications() { failed } else { self.unless_aborted(failed) }
            }
        }
    }

    /// After a failure there may be no point; whoever waits for one is told.
    fn unless_aborted(&mut self, what: Applications) -> Applications {
        if what != Applications::Freeze || self.applications.options.on_failure == OnHookFailure::Degrade {
            return what;
        }
        let why = self.applications.trouble.clone().unwrap_or_default();
        if !self.point_wanted.is_empty() {
            // It was due because somebody asked.
            self.point_due = Instant::now() + self.options.point_interval;
        }
        for waiting in self.point_wanted.drain(..) {
            let action = "Call the hook by hand with `freeze`, then with `thaw`; with application.on-failure = \"degrade\" there \
                          are filesystem-consistent points meanwhile";
            let _ = waiting.send(Response::Error(operator(1498, why.clone(), action)));
        }
        Applications::Alone
    }
}

fn tell(ran: &Ran) {
    let (hook, call, took_ms) = (&ran.hook, ran.call.as_str(), ran.took.as_millis());
    match (ran.is_done(), ran.call) {
        (true, _) => tracing::info!(hook, call, took_ms, output = ran.output, "a hook was called"),
        // That it failed was told already.
        (false, Call::Freeze) => {
            tracing::info!(hook, call, took_ms, output = ran.output, outcome = %ran.outcome, "a hook was called");
        }
        (false, Call::Thaw) => tracing::warn!(
            code = "HW-1498",
            hook,
            call,
            took_ms,
            output = ran.output,
            outcome = %ran.outcome,
            "a hook failed to let its application go on: look whether it does"
        ),
    }
}
