//! What an operator gets to read: a stable code, the cause, and what to do.
//!
//! Each module of the agent has its own `thiserror` enum whose `Display` is the cause; [`Coded`] adds the code and the
//! action. Codes of the agent are 1400 to 1499: `config` 1400–1404, `device` 1405–1419, `mounts` 1420–1424,
//! `guardian` 1425–1429, `freeze` 1430–1434, `source` 1435–1439, `control` 1440–1444, `guests` 1445–1449; the rest belongs to the tracker
//! and the engine. A code never changes its meaning.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An error as an operator reads it: `HW-1401: cause. action`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorError {
    /// Stable number, shown as `HW-1401`, also in JSON.
    #[serde(with = "as_text")]
    pub code: u16,
    /// What is wrong.
    pub cause: String,
    /// What to do about it.
    pub action: String,
}

impl fmt::Display for OperatorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HW-{:04}: {}. {}", self.code, self.cause.trim_end_matches('.'), self.action)
    }
}

impl OperatorError {
    /// As the command line shows it.
    #[must_use]
    pub fn report(&self) -> String {
        format!("error HW-{:04}: {}\n  → {}", self.code, self.cause.trim_end_matches('.'), self.action)
    }
}

/// An operator's error on its way through `anyhow`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Fatal(pub OperatorError);

mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(code: &u16, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("HW-{code:04}"))
    }
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("HW-").and_then(|digits| digits.parse().ok());
        digits.ok_or_else(|| D::Error::custom("a code is HW- and four digits"))
    }
}

/// An error with a code and an action beside its cause.
///
/// `OperatorError` itself is deliberately neither `Coded` nor a [`std::error::Error`], so that every coded error turns into it
/// by `?`.
pub trait Coded: std::error::Error {
    /// Stable number.
    fn code(&self) -> u16;
    /// What to do about it, as a sentence.
    fn action(&self) -> String;
    /// All of it for an operator; causes of causes included.
    fn operator(&self) -> OperatorError
    where
        Self: Sized,
    {
        OperatorError { code: self.code(), cause: chain(self), action: self.action() }
    }
}

impl<E: Coded> From<E> for OperatorError {
    fn from(error: E) -> Self {
        error.operator()
    }
}

/// An error and its causes, each told once.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// An error with all its sources: aya's errors tell the cause only there.
#[must_use]
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read /x")]
    struct Sample(#[source] std::io::Error);
    impl Coded for Sample {
        fn code(&self) -> u16 {
            1401
        }
        fn action(&self) -> String {
            "Look at it.".into()
        }
    }

    #[test]
    fn shows_code_cause_and_action() {
        let error: OperatorError = Sample(std::io::Error::other("too old")).into();
        assert_eq!(error.to_string(), "HW-1401: cannot read /x: too old. Look at it.");
        assert_eq!(error.report(), "error HW-1401: cannot read /x: too old\n  → Look at it.");
        let json = serde_json::to_string(&error).unwrap();
        assert!(json.contains(r#""code":"HW-1401""#), "{json}");
        assert_eq!(serde_json::from_str::<OperatorError>(&json).unwrap(), error);
    }
}
