//! Thawing a guest through the socket of its agent, as the guardian must do it: without allocating, within a time limit, whatever the
//! guest says.
//!
//! The socket is the agent's own connection, which the guardian holds too: so it outlives the agent, and nobody else is let in between. On
//! it a greeting and a thaw are sent. The guest does one command after the other: an answer to this thaw is an answer about every
//! freeze that was sent before it.

use super::process::{FAILED, NOT_FROZEN, THAWED};
use std::{
    io::{Cursor, Write},
    os::fd::RawFd,
    time::{Duration, Instant},
};

/// How long an answer is waited for. What was sent counts, however late: it need not be sent again for that.
const ANSWER: Duration = Duration::from_secs(5);
/// Of what is no answer.
const NOISE_BYTES_MAX: usize = 1 << 20;
const SENTINEL: u8 = 0xFF;
/// QEMU has closed the connection, as a rule by its end: there is nothing to thaw, and nobody to ask.
const GONE: i32 = NOT_FROZEN;

/// Asks for the thaw and waits for the answer. `id` is one that was not used before.
pub(super) fn thaw(fd: RawFd, id: u32) -> i32 {
    let until = Instant::now() + ANSWER;
    let mut text = [0_u8; 192];
    let mut cursor = Cursor::new(&mut text[..]);
    let composed = write!(
        cursor,
        "?{{\"execute\":\"guest-sync-delimited\",\"arguments\":{{\"id\":{id}}}}}\n{{\"execute\":\"guest-fsfreeze-thaw\"}}\n"
    );
    let length = usize::try_from(cursor.position()).unwrap_or(0);
    if composed.is_err() {
        return FAILED;
    }
    if let Err(code) = send_all(fd, SENTINEL, &text[1..length], until) {
        return code;
    }
    let mut scanner = Scanner::new(id);
    let mut noise = 0;
    loop {
        if noise > NOISE_BYTES_MAX || !wait(fd, libc::POLLIN, until) {
            return FAILED;
        }
        let mut buffer = [0_u8; 512];
        // SAFETY: the buffer is live and of the length given.
        let got = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
        let Ok(got) = usize::try_from(got) else {
            if again() {
                continue;
            }
            return broken();
        };
        if got == 0 {
            return GONE;
        }
        noise += got;
        for byte in &buffer[..got] {
            match scanner.push(*byte) {
                None => {}
                Some(Some(0)) => return NOT_FROZEN,
                Some(Some(_)) => return THAWED,
                Some(None) => return FAILED,
            }
        }
    }
}

fn send_all(fd: RawFd, first: u8, rest: &[u8], until: Instant) -> Result<(), i32> {
    for part in [std::slice::from_ref(&first), rest] {
        let mut sent = 0;
        while sent < part.len() {
            if !wait(fd, libc::POLLOUT, until) {
                return Err(FAILED);
            }
            let left = &part[sent..];
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the buffer is live and of the length given.
            let got = unsafe { libc::send(fd, left.as_ptr().cast(), left.len(), flags) };
            match usize::try_from(got) {
                Ok(got) => sent += got,
                Err(_) if again() => {}
                Err(_) => return Err(broken()),
            }
        }
    }
    Ok(())
}

/// What a failed call means: nobody there, or nothing certain.
fn broken() -> i32 {
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EPIPE | libc::ECONNRESET) => GONE,
        _ => FAILED,
    }
}

fn again() -> bool {
    matches!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn wait(fd: RawFd, events: i16, until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut poll = libc::pollfd { fd, events, revents: 0 };
        let timeout_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
        // SAFETY: one live pollfd.
        match unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } {
            0 => {}
            ready if ready > 0 => return true,
            _ if again() => {}
            _ => return false,
        }
    }
}

/// Looks for the answer to the greeting, and then for the one to the thaw. Of a line it keeps the beginning.
struct Scanner {
    id: u32,
    line: [u8; 64],
    length: usize,
    delimited: bool,
    greeted: bool,
}

impl Scanner {
    fn new(id: u32) -> Self {
        Self { id, line: [0; 64], length: 0, delimited: false, greeted: false }
    }

    /// `Some` at the end of the answer to the thaw: how many were thawed, if it says so.
    fn push(&mut self, byte: u8) -> Option<Option<u64>> {
        match byte {
            SENTINEL => (self.length, self.delimited) = (0, true),
            b'\n' => {
                let value = returned(&self.line[..self.length]);
                let (delimited, filled) = (self.delimited, self.length > 0);
                (self.length, self.delimited) = (0, false);
                if delimited {
                    self.greeted = value == Some(u64::from(self.id));
                } else if self.greeted && filled {
                    return Some(value);
                }
            }
            _ => {
                if let Some(place) = self.line.get_mut(self.length) {
                    *place = byte;
                    self.length += 1;
                }
            }
        }
        None
    }
}

/// The number in `{"return": 7}`.
fn returned(line: &[u8]) -> Option<u64> {
    let rest = line.trim_ascii().strip_prefix(b"{\"return\":")?.strip_suffix(b"}")?.trim_ascii();
    std::str::from_utf8(rest).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::{fd::AsRawFd, unix::net::UnixStream};

    fn scan(bytes: &[u8], id: u32) -> Option<Option<u64>> {
        let mut scanner = Scanner::new(id);
        bytes.iter().find_map(|byte| scanner.push(*byte))
    }

    #[test]
    fn only_what_follows_its_own_greeting_is_an_answer() {
        assert_eq!(scan(b"{\"return\": 5}\n", 7), None, "of a freeze before");
        assert_eq!(scan(b"\xFF{\"return\": 6}\n{\"return\": 2}\n", 7), None, "another's greeting");
        assert_eq!(scan(b"junk\xFF{\"return\": 7}\n\n{\"return\": 2}\n", 7), Some(Some(2)));
        assert_eq!(scan(b"\xFF{\"return\":7}\r\n{\"return\":0}\r\n", 7), Some(Some(0)));
        let error =
            [b"\xFF{\"return\": 7}\n{\"error\": {\"desc\": \"".as_slice(), &[b'x'; 500], b"\"}}\n"].concat();
        assert_eq!(scan(&error, 7), Some(None));
        assert_eq!(scan(b"\xFF{\"return\": 7}\n{\"return\": -1}\n", 7), Some(None));
    }

    proptest! {
        #[test]
        fn anything_may_be_said(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = scan(&bytes, 7);
        }
    }

    #[test]
    fn a_closed_connection_is_nothing_to_thaw_and_is_no_signal() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        theirs.shutdown(std::net::Shutdown::Write).expect("open");
        assert_eq!(thaw(ours.as_raw_fd(), 1), NOT_FROZEN);
        drop(theirs);
        assert_eq!(thaw(ours.as_raw_fd(), 1), NOT_FROZEN);
    }
}
