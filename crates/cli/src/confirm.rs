//! Asking before something is done that cannot be undone.

use crate::{CliError, Console};

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
    console.input.read_line(&mut typed)?;
    match typed.trim() == question.word {
        true => Ok(()),
        false => Err(CliError::NotConfirmed(question.refused)),
    }
}
