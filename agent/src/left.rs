//! What a dead agent left behind: frozen filesystems and guests, and applications that its hooks hold. `highwater-agent thaw` ends it, by hand or when
//! the unit has stopped.

use crate::{
    config::Config,
    control,
    error::OperatorError,
    freeze::{self, FreezeError, ThawedAll},
    hooks::{self, HookLimits, Ran},
};
use serde_json::{Value, json};
use std::fmt::Write;

/// What was done about it.
pub struct Left {
    thawed: ThawedAll,
    hooks: Vec<Ran>,
}

impl Left {
    /// Ends all of it. Hooks are left alone while an agent lives: it calls them itself.
    ///
    /// # Errors
    /// The records of what was frozen cannot be read.
    pub fn thaw(config: &Config) -> Result<Self, FreezeError> {
        let thawed = freeze::thaw_all(&config.run_dir)?;
        if control::is_served(&config.run_dir) {
            return Ok(Self { thawed, hooks: vec![] });
        }
        let application = &config.application;
        let limits = HookLimits { call: application.hook_timeout.0, hold: application.hold.0 };
        let hooks = hooks::thaw_left(&application.hooks_dir, &config.run_dir, limits);
        Ok(Self { thawed, hooks })
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let ThawedAll { thawed, armed, .. } = &self.thawed;
        let mut text =
            format!("{thawed} of {armed} recorded filesystems and guests were frozen and are thawed.");
        for ran in &self.hooks {
            // Writing to a string cannot fail.
            let _ = write!(text, "\nThe hook {} was called with `thaw`: {}.", ran.hook, ran.outcome);
        }
        text
    }

    /// For programs.
    #[must_use]
    pub fn document(&self) -> Value {
        let called =
            |ran: &Ran| json!({ "hook": ran.hook, "outcome": ran.outcome.to_string(), "output": ran.output });
        let hooks: Vec<Value> = self.hooks.iter().map(called).collect();
        json!({ "thawed": self.thawed.thawed, "stuck": self.stuck(), "hooks": hooks })
    }

    /// What it could not end.
    #[must_use]
    pub fn trouble(&self) -> Option<OperatorError> {
        let stuck = self.stuck();
        if !stuck.is_empty() {
            return Some(OperatorError {
                code: 1478,
                cause: format!("still frozen: {}", stuck.join(", ")),
                action: "Thaw them with `fsfreeze --unfreeze MOUNTPOINT`, in a guest with the same or with `virsh domfsthaw`".into(),
            });
        }
        let failed = self.hooks.iter().find(|ran| !ran.is_done())?;
        Some(OperatorError {
            code: 1498,
            cause: format!("the hook {} {}", failed.hook, failed.outcome),
            action: "Look whether its application goes on, and call the hook by hand with `thaw`".into(),
        })
    }

    fn stuck(&self) -> Vec<String> {
        let mut stuck: Vec<String> = self.thawed.stuck.iter().map(|p| p.display().to_string()).collect();
        stuck.extend(self.thawed.guests_stuck.iter().map(|name| format!("guest {name}")));
        stuck
    }
}
