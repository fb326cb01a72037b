//! Application hooks: the executables of one directory, called with `freeze` before the filesystems are frozen, in the order of their
//! names, and with `thaw` afterwards, in the reverse order. Scripts that are written for QEMU's guest agent can be used as they are.
//!
//! **Contract.**
//! * Whoever was called with `freeze` is called with `thaw`, whatever came of it and of the others: also if it failed or took too long, and
//!   when [`Quieted`] is dropped. Nobody is called after one that failed, or when nobody waits for them any more: then a call with `freeze` that is under
//!   way is ended, too.
//! * No call lasts longer than its limit: then the hook's process group is ended.
//! * What a hook says is kept (the last [`OUTPUT_BYTES_MAX`] bytes of it), for whoever asks what was done.
//! * Only files that nobody but root can change are called.
//!
//! A hook may leave a process behind that holds the application still until `thaw` ends it. Since the agent may die in between, such a
//! process must end by itself after `HIGHWATER_HOLD_S` seconds.

mod list;
mod quiet;
mod record;
mod report;
mod run;

pub use list::{Hook, Hooks, HooksError, Refused};
pub use quiet::{Quiet, Quieting, thaw_left, thaw_left_meanwhile};
pub use report::Report;
pub use run::{Call, OUTPUT_BYTES_MAX, Outcome, Ran};

use record::Called;
use std::{sync::atomic::AtomicBool, time::Duration};

/// How long hooks may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookLimits {
    /// Of one call.
    pub call: Duration,
    /// From the end of the last `freeze` to the first `thaw`; hooks are told.
    pub hold: Duration,
}

/// Applications that were asked to stand still. Dropped: they go on.
#[derive(Debug)]
pub struct Quieted {
    /// Called with `freeze`, and not with `thaw` yet.
    called: Vec<Hook>,
    record: Called,
    limits: HookLimits,
    ran: Vec<Ran>,
}

impl Quieted {
    /// Calls all hooks with `freeze`, until one fails, or nobody waits for them: `unwanted`.
    fn begin(hooks: &Hooks, limits: HookLimits, record: Called, unwanted: &AtomicBool) -> Self {
        let mut quieted = Self { called: vec![], record, limits, ran: vec![] };
        for hook in hooks.iter() {
            let ran = match quieted.record.add(&hook.name) {
                Ok(()) => {
                    quieted.called.push(hook.clone());
                    run::run(hook, Call::Freeze, limits, Some(unwanted))
                }
                Err(error) => Ran::not_run(hook, format!("that it is called cannot be recorded: {error}")),
            };
            let failed = ran.outcome != Outcome::Done;
            quieted.ran.push(ran);
            if failed {
                break;
            }
        }
        quieted
    }

    /// The call with `freeze` that failed, if one did: the applications do not stand still.
    #[must_use]
    pub fn failed(&self) -> Option<&Ran> {
        self.ran.iter().find(|ran| ran.call == Call::Freeze && ran.outcome != Outcome::Done)
    }

    /// Calls with `thaw` whoever was called with `freeze`. Answers all calls.
    #[must_use]
    pub fn end(mut self) -> Vec<Ran> {
        self.thaw();
        std::mem::take(&mut self.ran)
    }

    fn thaw(&mut self) {
        while let Some(hook) = self.called.pop() {
            self.ran.push(run::run(&hook, Call::Thaw, self.limits, None));
            self.record.remove(&hook.name);
        }
    }
}

impl Drop for Quieted {
    fn drop(&mut self) {
        self.thaw();
    }
}

#[cfg(test)]
mod tests;
