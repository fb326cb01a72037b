//! The command run as by a person, who types lines and secrets.

// Each test uses some of it.
#![allow(dead_code)]

use highwater_cli::{Console, Exit, run};
use serde_json::Value;
use std::io;

/// What came of it.
pub struct Outcome {
    pub exit: Exit,
    pub out: String,
    pub err: String,
}

impl Outcome {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {} {}", self.out, self.err))
    }
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
    pub fn good(self) -> Self {
        assert_eq!(self.exit, Exit::Success, "{} {}", self.out, self.err);
        self
    }
}

/// What is typed. Without a line and a secret, nobody is there to be asked.
#[derive(Clone, Copy, Default)]
pub struct Typed<'a> {
    pub lines: &'a str,
    pub secrets: &'a [&'a str],
    /// Somebody is there all the same.
    pub can_ask: bool,
}

/// Runs it. Whoever is asked for more secrets than there are presses Ctrl-C.
pub fn call(args: &[&str], typed: Typed<'_>) -> Outcome {
    let (mut out, mut err, mut input) = (Vec::new(), Vec::new(), typed.lines.as_bytes());
    let mut secrets = typed.secrets.iter();
    let mut ask = |_: &str| -> io::Result<zeroize::Zeroizing<Vec<u8>>> {
        let text = secrets.next().ok_or(io::ErrorKind::Interrupted)?;
        Ok(text.as_bytes().to_vec().into())
    };
    let mut console = Console {
        out: &mut out,
        err: &mut err,
        input: &mut input,
        secrets: &mut ask,
        terminal: false,
        can_ask: typed.can_ask || !typed.lines.is_empty() || !typed.secrets.is_empty(),
    };
    let exit = run(args.iter().map(Into::into), &mut console);
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Outcome { exit, out: text(out), err: text(err) }
}
