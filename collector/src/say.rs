//! Text for whoever ran a command. A reader that closes the pipe early has read enough; where it cannot be written, the command fails.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    process,
};

/// `println!`, without its panic.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}

pub(crate) use say;

/// See [`say`].
pub fn line(text: Arguments<'_>) {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::BrokenPipe => process::exit(0),
        Err(e) => {
            eprintln!("highwater-collector: cannot write to standard output: {e}");
            process::exit(1)
        }
    }
}
