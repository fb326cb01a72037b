//! Asking before something is done that cannot be undone.

use crate::{CliError, Console};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// What is asked, and what is said where nobody answers, or not so.
pub(crate) struct Question<'a> {
    /// To be typed in full: a stray Enter or `y` must not cost a disk.
    pub(crate) word: &'a str,
    /// Ends with what typing it does.
    pub(crate) prompt: String,
    /// Nobody can be asked: what would be done.
    pub(crate) unasked: String,
    /// Something else was typed.
    pub(crate) refused: String,
}

/// Asks it.
///
/// # Errors
/// [`CliError::NotConfirmed`]: nobody can be asked, or the word was not typed.
pub(crate) fn confirm(console: &mut Console<'_>, json: bool, question: Question<'_>) -> Result<(), CliError> {
    if json || !console.can_ask {
        return Err(CliError::NotConfirmed(question.unasked));
    }
    write!(console.err, "{}: ", question.prompt)?;
    console.err.flush()?;
    let mut typed = String::new();
    {
        let _stoppable = Stoppable::new();
        console.input.read_line(&mut typed)?;
    }
    match typed.trim() == question.word {
        true => Ok(()),
        false => Err(CliError::NotConfirmed(question.refused)),
    }
}

/// While it lives, Ctrl-C ends the process at once: nobody looks at signals while a line is waited for, and nothing is under way yet.
struct Stoppable(Option<SigAction>);

impl Stoppable {
    fn new() -> Self {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of this process.
        Self(unsafe { sigaction(Signal::SIGINT, &default) }.ok())
    }
}

impl Drop for Stoppable {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: the action that was there before.
            let _ = unsafe { sigaction(Signal::SIGINT, before) };
        }
    }
}
