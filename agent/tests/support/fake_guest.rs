//! A guest agent that is none: it answers on a socket as QEMU's does, or misbehaves in a chosen way. Like the real one it does one
//! command after the other, and goes on with those that it has got when the client has gone.

use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// How it behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// It takes everything, and says nothing.
    Silent,
    /// Bytes at random, as many as are taken.
    Garbage,
    /// A line that never ends.
    Endless,
    /// Its greeting has another number.
    WrongIds,
    /// It closes the connection instead of answering the freeze, which it does.
    DiesMidway,
    /// Its freeze takes its time.
    Slow(Duration),
    /// It says no to a freeze.
    RefusesFreeze,
    /// It says no to so many thaws.
    RefusesThaws(usize),
    /// It is thawed by something else soon after the freeze.
    Thaws(Duration),
    /// It does not answer anything after it has frozen, for so long.
    Hangs(Duration),
    /// It cannot thaw by command.
    Unable,
    /// Nothing can be frozen in it.
    Empty,
}

/// What happens in it.
#[derive(Debug, Default)]
pub struct Inside {
    pub frozen: AtomicBool,
    pub freezes: AtomicUsize,
    pub thaws: AtomicUsize,
    ended: AtomicBool,
}

/// See the module. Ended when dropped.
pub struct FakeGuest {
    pub socket: PathBuf,
    pub inside: Arc<Inside>,
}

const FILESYSTEMS: u64 = 3;

impl FakeGuest {
    pub fn start(dir: &Path, name: &str, manner: Manner) -> Self {
        let socket = dir.join(name);
        let listener = UnixListener::bind(&socket).expect("a free name");
        let inside = Arc::new(Inside::default());
        let shared = inside.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                if shared.ended.load(Ordering::Acquire) {
                    return;
                }
                let Ok(client) = client else { return };
                let _ = client.set_read_timeout(Some(Duration::from_millis(20)));
                Talk { client, inside: &shared, manner, refused: 0 }.run();
            }
        });
        Self { socket, inside }
    }

    pub fn is_frozen(&self) -> bool {
        self.inside.frozen.load(Ordering::Acquire)
    }
    pub fn freezes(&self) -> usize {
        self.inside.freezes.load(Ordering::Acquire)
    }
    pub fn freeze_from_inside(&self) {
        self.inside.freeze();
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.inside.ended.store(true, Ordering::Release);
        let _ = UnixStream::connect(&self.socket);
    }
}

impl Inside {
    fn freeze(&self) {
        self.freezes.fetch_add(1, Ordering::AcqRel);
        self.frozen.store(true, Ordering::Release);
    }
    fn thaw(&self) -> bool {
        let was = self.frozen.swap(false, Ordering::AcqRel);
        if was {
            self.thaws.fetch_add(1, Ordering::AcqRel);
        }
        was
    }
}

struct Talk<'a> {
    client: UnixStream,
    inside: &'a Arc<Inside>,
    manner: Manner,
    refused: usize,
}

impl Talk<'_> {
    fn run(mut self) {
        let mut line = vec![];
        let mut buffer = [0; 1024];
        loop {
            match self.client.read(&mut buffer) {
                Ok(0) => return,
                Ok(got) => {
                    for byte in &buffer[..got] {
                        match byte {
                            0xFF => line.clear(),
                            b'\n' if self.obey(&std::mem::take(&mut line)).is_none() => return,
                            b'\n' => {}
                            byte => line.push(*byte),
                        }
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if self.inside.ended.load(Ordering::Acquire) {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// `None`: it hangs up.
    fn obey(&mut self, line: &[u8]) -> Option<()> {
        let Ok(asked) = serde_json::from_slice::<Value>(line) else { return Some(()) };
        let command = asked["execute"].as_str().unwrap_or_default().to_owned();
        match self.manner {
            Manner::Silent => return Some(()),
            Manner::Garbage => {
                let mut state = 1_u32;
                let noise = std::iter::repeat_with(|| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                });
                return self.client.write_all(&noise.take(4 << 20).collect::<Vec<u8>>()).ok();
            }
            Manner::Endless => loop {
                self.client.write_all(&[b'['; 4096]).ok()?;
            },
            _ => {}
        }
        match command.as_str() {
            "guest-sync-delimited" => {
                let id = asked["arguments"]["id"].as_u64()?;
                let id = if self.manner == Manner::WrongIds { id ^ 1 } else { id };
                self.client.write_all(&[0xFF]).ok();
                self.say(&json!({ "return": id }))
            }
            "guest-info" => {
                let of = |name: &str, enabled: bool| json!({ "name": name, "enabled": enabled, "success-response": true });
                self.say(&json!({ "return": { "version": "7.2.0", "supported_commands": [
                    of("guest-fsfreeze-freeze", true),
                    of("guest-fsfreeze-thaw", self.manner != Manner::Unable),
                    of("guest-fsfreeze-status", true),
                ] } }))
            }
            "guest-fsfreeze-status" => {
                let frozen = self.inside.frozen.load(Ordering::Acquire);
                self.say(&json!({ "return": if frozen { "frozen" } else { "thawed" } }))
            }
            "guest-fsfreeze-freeze" => self.freeze(),
            "guest-fsfreeze-thaw" => {
                if let Manner::RefusesThaws(times) = self.manner
                    && self.refused < times
                {
                    self.refused += 1;
                    return self.say(&json!({ "error": { "class": "GenericError", "desc": "not now" } }));
                }
                let count = if self.inside.thaw() { FILESYSTEMS } else { 0 };
                self.say(&json!({ "return": count }))
            }
            _ => self.say(&json!({ "error": { "class": "CommandNotFound", "desc": "what?" } })),
        }
    }

    fn freeze(&mut self) -> Option<()> {
        match self.manner {
            Manner::RefusesFreeze => {
                return self.say(
                    &json!({ "error": { "class": "GenericError", "desc": "failed to freeze /: busy" } }),
                );
            }
            Manner::Empty => return self.say(&json!({ "return": 0 })),
            Manner::Slow(time) => thread::sleep(time),
            _ => {}
        }
        self.inside.freeze();
        match self.manner {
            Manner::DiesMidway => return None,
            Manner::Thaws(soon) => {
                let inside = self.inside.clone();
                thread::spawn(move || {
                    thread::sleep(soon);
                    inside.thaw();
                });
            }
            _ => {}
        }
        self.say(&json!({ "return": FILESYSTEMS }))?;
        if let Manner::Hangs(time) = self.manner {
            thread::sleep(time);
        }
        Some(())
    }

    /// Whoever has gone is no reason not to go on.
    fn say(&mut self, value: &Value) -> Option<()> {
        let _ = self.client.write_all(format!("{value}\n").as_bytes());
        Some(())
    }
}
