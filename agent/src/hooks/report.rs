//! What there is of hooks, for who looks at the configuration or wonders about a point.

use super::{Hooks, Refused};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What lies where hooks are looked for.
pub struct Report {
    dir: PathBuf,
    /// In the order in which they are called.
    called: Vec<String>,
    refused: Vec<Refused>,
    /// Why none is called.
    trouble: Option<String>,
}

impl Report {
    /// Looks now.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        let (called, refused, trouble) = match Hooks::find(dir) {
            Ok((hooks, refused)) => (hooks.iter().map(|hook| hook.name.clone()).collect(), refused, None),
            Err(error) => (vec![], vec![], Some(error.to_string())),
        };
        Self { dir: dir.into(), called, refused, trouble }
    }

    /// Why there can be no application-consistent point, if none of them is called.
    #[must_use]
    pub fn why_none(&self) -> Option<String> {
        let dir = self.dir.display();
        match &self.trouble {
            Some(why) => Some(format!("No hook is called: {why}")),
            None if self.called.is_empty() => Some(format!("There are no hooks in {dir}")),
            None => None,
        }
    }

    /// A line for each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let dir = self.dir.display();
        let mut lines = vec![match (&self.trouble, self.called.is_empty()) {
            (Some(why), _) => format!("Application hooks: none is called: {why}."),
            (None, true) => format!("Application hooks: none in {dir}."),
            (None, false) => format!("Application hooks in {dir}: {}.", self.called.join(", ")),
        }];
        lines.extend(
            self.refused.iter().map(|file| format!("Not called: {}: {}.", file.path.display(), file.why)),
        );
        lines
    }

    /// The same for scripts.
    #[must_use]
    pub fn json(&self) -> Value {
        let refused: Vec<Value> =
            self.refused.iter().map(|file| json!({ "file": file.path, "why": file.why })).collect();
        json!({ "dir": self.dir, "called": self.called, "refused": refused, "trouble": self.trouble })
    }
}
