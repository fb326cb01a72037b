//! Passphrases, asked for where nobody sees them: on the terminal, and never from arguments or the environment, which others can
//! read and children inherit.

use crate::{CliError, Console};
use highwater_vault::{VaultError, keys::Passphrase};
use nix::sys::termios::{self, LocalFlags, SetArg, SpecialCharacterIndices, Termios};
use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
};
use zeroize::Zeroizing;

/// Most bytes that can be typed: a passphrase and an end of line.
const TYPED_BYTES_MAX: usize = 1026;

/// Asks once.
pub(crate) fn ask(console: &mut Console<'_>, prompt: &str) -> Result<Passphrase, CliError> {
    if !console.can_ask {
        let cause = "there is no terminal to ask for a passphrase on; give --passphrase-file or --new-passphrase-file";
        return Err(CliError::Usage(cause.to_owned()));
    }
    match (console.secrets)(prompt) {
        Ok(text) => Ok(Passphrase::new(&text)?),
        Err(e) if e.kind() == ErrorKind::Interrupted => Err(CliError::Interrupted),
        Err(e) => Err(e.into()),
    }
}

/// Asks twice for one that is new: a slip would lock everybody out.
pub(crate) fn ask_new(console: &mut Console<'_>) -> Result<Passphrase, CliError> {
    let new = ask(console, "New passphrase: ")?;
    new.check_strength()?;
    if ask(console, "The same again: ")?.is_same(&new) {
        return Ok(new);
    }
    Err(VaultError::Passphrase("it was not the same twice".to_owned()).into())
}

/// Asks on the terminal of this process, without an echo. Blocks.
///
/// # Errors
/// [`ErrorKind::Interrupted`]: Ctrl-C; others: there is no terminal, or it was closed.
pub fn ask_on_terminal(prompt: &str) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
    let quiet = Quiet::new(&terminal)?;
    terminal.write_all(prompt.as_bytes())?;
    let typed = read_line(&mut terminal);
    drop(quiet);
    terminal.write_all(b"\n")?;
    typed
}

/// A terminal that shows nothing and handles no keys, until this is dropped: whoever is asked may stop with Ctrl-C, and the
/// terminal must be as before.
struct Quiet {
    terminal: File,
    before: Termios,
}

impl Quiet {
    fn new(terminal: &File) -> io::Result<Self> {
        let terminal = terminal.try_clone()?;
        let before = termios::tcgetattr(&terminal)?;
        let mut quiet = before.clone();
        quiet
            .local_flags
            .remove(LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::ISIG);
        quiet.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        quiet.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        termios::tcsetattr(&terminal, SetArg::TCSAFLUSH, &quiet)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(&self.terminal, SetArg::TCSAFLUSH, &self.before);
    }
}

/// What is typed up to the end of line, with what a line editor does at least: backspace, Ctrl-U, Ctrl-C, Ctrl-D.
fn read_line(input: &mut impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(Vec::with_capacity(TYPED_BYTES_MAX));
    let mut byte = Zeroizing::new([0]);
    loop {
        if input.read(byte.as_mut())? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        match byte[0] {
            b'\r' | b'\n' => return Ok(line),
            3 => return Err(ErrorKind::Interrupted.into()),
            4 if line.is_empty() => return Err(ErrorKind::UnexpectedEof.into()),
            4 => return Ok(line),
            8 | 127 => {
                // A character of several bytes as a whole.
                while line.pop().is_some_and(|b| b & 0xc0 == 0x80) {}
            }
            21 => line.clear(),
            0..32 => {}
            _ if line.len() == TYPED_BYTES_MAX => return Err(io::Error::other("too long")),
            other => line.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typed_line_can_be_corrected() {
        let typed = |text: &str| {
            read_line(&mut text.as_bytes()).map(|line| String::from_utf8(line.to_vec()).unwrap())
        };
        assert_eq!(typed("secret\r\nmore").unwrap(), "secret");
        assert_eq!(typed("abü\u{7f}\u{8}c\n").unwrap(), "ac");
        assert_eq!(typed("\u{7f}wrong\u{15}ri\u{1b}ght\u{4}").unwrap(), "right");
        assert_eq!(typed("x\u{3}").unwrap_err().kind(), ErrorKind::Interrupted);
        for ended in ["", "x", "\u{4}"] {
            assert_eq!(typed(ended).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
        assert!(typed(&"x".repeat(2000)).is_err());
    }
}
