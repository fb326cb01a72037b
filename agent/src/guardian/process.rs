//! The guardian's own process. See the module above for the contract.
//!
//! After start it allocates nothing, and all its memory is locked, so that neither a frozen filesystem nor memory pressure
//! can hold it up. Each thaw is tried in a forked child: `FITHAW` waits for locks that a freeze or a sync under way on *one*
//! filesystem may hold for seconds, and the others must not wait for that one. A guest, too, may take seconds to answer.

use super::guest;
use super::protocol::{
    ARM, ARM_GUEST, ARMED_MAX, BUSY, DISARM, DONE, EXPIRED, MALFORMED, PING, Packet, RELEASE, Received, TAKE,
    receive, send,
};
use std::{
    ffi::CString,
    io::{Cursor, Write},
    os::fd::RawFd,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const SOCKET: RawFd = 3;
/// Between two tries on one filesystem.
const RETRY: Duration = Duration::from_millis(10);
/// After so long past deadline or end the tries become rare, but do not cease while the agent lives.
const EAGER: Duration = Duration::from_secs(60);
const RETRY_RARELY: Duration = Duration::from_secs(1);
/// Between two tries on a guest, which may be slow to answer.
const RETRY_GUEST: Duration = Duration::from_millis(500);
/// Successive answers "not frozen" that end the duty for a filesystem once the agent is gone.
const CONFIRMATIONS: u8 = 2;

/// Runs the guardian on the socket at standard input; returns when the agent is gone and nothing is frozen any more.
/// `log` should lie on a tmpfs; it is opened once, and written only after thawing.
///
/// # Errors
/// Standard input is not the agent's socket.
pub fn run(log: Option<CString>) -> Result<(), &'static str> {
    settle()?;
    let log_fd = log.map_or(-1, |path| {
        let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_CLOEXEC | libc::O_NOFOLLOW;
        // SAFETY: the path is NUL-terminated; a failure gives -1, which is "no log".
        unsafe { libc::open(path.as_ptr(), flags, 0o600) }
    });
    // Answered packets prove to the agent that all of this is done.
    Guardian::new(log_fd).watch();
    Ok(())
}

/// Cuts every tie through which something else's end could become the guardian's.
fn settle() -> Result<(), &'static str> {
    let mut kind: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: plain system calls on integers and on memory owned here.
    unsafe {
        let rc =
            libc::getsockopt(0, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut length);
        if rc != 0 || kind != libc::SOCK_SEQPACKET {
            return Err("standard input is not a socket of highwater-agent, which alone starts this program");
        }
        if libc::dup2(0, SOCKET) != SOCKET {
            return Err("cannot take over the socket");
        }
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        if null >= 0 {
            for fd in 0..3 {
                libc::dup2(null, fd);
            }
        } else {
            libc::close(0);
        }
        libc::syscall(libc::SYS_close_range, SOCKET + 1, libc::c_uint::MAX, 0);
        libc::setsid();
        libc::chdir(c"/".as_ptr());
        for signal in [
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGPIPE,
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGALRM,
            libc::SIGTSTP,
            libc::SIGTTIN,
            libc::SIGTTOU,
        ] {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        // Best effort: a guardian without these still guards.
        let adjust = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if adjust >= 0 {
            libc::write(adjust, c"-1000".as_ptr().cast(), 5);
            libc::close(adjust);
        }
        libc::prctl(libc::PR_SET_NAME, c"hw-guardian".as_ptr());
        libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE);
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Ward {
    fd: RawFd,
    /// The socket of a guest's agent, and no filesystem.
    guest: bool,
    /// The agent said that it freezes it, and not yet that it is thawed.
    taken: bool,
    /// The try under way; 0 if none.
    child: libc::pid_t,
    /// Answers "not frozen" in a row.
    idle: u8,
    next_try: Option<Instant>,
}

const NO_WARD: Ward = Ward { fd: -1, guest: false, taken: false, child: 0, idle: 0, next_try: None };

#[derive(Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// Nothing armed.
    None,
    /// Armed, the agent is answerable.
    Watch,
    /// The deadline passed; the agent may still be freezing, so no answer "not frozen" is final.
    Expired,
    /// The agent asks for certainty. It freezes nothing any more.
    Disarm,
    /// The agent is gone.
    Orphaned,
}

struct Guardian {
    wards: [Ward; ARMED_MAX],
    count: usize,
    duty: Duty,
    deadline: Instant,
    /// When thawing began.
    since: Instant,
    was_expired: bool,
    thawed: u32,
    disarm_seq: u32,
    /// Numbers the questions to guests.
    tries: u32,
    log: RawFd,
}

impl Guardian {
    fn new(log: RawFd) -> Self {
        let now = Instant::now();
        Self {
            wards: [NO_WARD; ARMED_MAX],
            count: 0,
            duty: Duty::None,
            deadline: now,
            since: now,
            was_expired: false,
            thawed: 0,
            disarm_seq: 0,
            // Another guardian's answers, which may still come, have other numbers.
            tries: std::process::id() << 8,
            log,
        }
    }

    fn watch(&mut self) {
        loop {
            if self.duty == Duty::Watch && Instant::now() >= self.deadline {
                self.was_expired = true;
                self.enter(Duty::Expired);
            }
            self.work();
            if self.duty == Duty::Orphaned && (self.all_free() || self.since.elapsed() > EAGER) {
                self.record("the agent was gone");
                return;
            }
            if self.wait() {
                self.hear();
            }
        }
    }

    fn enter(&mut self, duty: Duty) {
        self.duty = duty;
        self.since = Instant::now();
        for ward in &mut self.wards[..self.count] {
            ward.idle = 0;
            ward.next_try = None;
        }
    }

    /// Waits for a packet or for the next thing to do; says whether there is a packet.
    fn wait(&self) -> bool {
        let timeout_ms = match self.duty {
            Duty::None => -1,
            Duty::Watch => {
                let left = self.deadline.saturating_duration_since(Instant::now());
                i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1)
            }
            Duty::Expired | Duty::Disarm | Duty::Orphaned => 2,
        };
        if self.duty == Duty::Orphaned {
            std::thread::sleep(Duration::from_millis(2));
            return false;
        }
        let mut poll = libc::pollfd { fd: SOCKET, events: libc::POLLIN, revents: 0 };
        // SAFETY: one live pollfd.
        unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
    }

    fn hear(&mut self) {
        let mut fds = [-1; ARMED_MAX];
        match receive(SOCKET, &mut fds) {
            Ok(Received::Packet(Some(packet), count)) => self.obey(packet, &fds[..count]),
            Ok(Received::Packet(None, count)) => {
                close_all(&fds[..count]);
                answer(MALFORMED, 0, 0);
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            // A broken socket and an ended one are the same: nobody else can say that all is well.
            Ok(Received::End) | Err(_) => self.enter(Duty::Orphaned),
        }
    }

    fn obey(&mut self, packet: Packet, fds: &[RawFd]) {
        if !matches!(packet.word, ARM | ARM_GUEST) {
            close_all(fds);
        }
        match packet.word {
            ARM | ARM_GUEST if self.duty != Duty::None => {
                close_all(fds);
                answer(BUSY, packet.seq, 0);
            }
            ARM | ARM_GUEST if packet.b as usize != fds.len() => {
                close_all(fds);
                answer(MALFORMED, packet.seq, 0);
            }
            ARM | ARM_GUEST => {
                for (ward, fd) in self.wards.iter_mut().zip(fds) {
                    *ward = Ward { fd: *fd, guest: packet.word == ARM_GUEST, ..NO_WARD };
                }
                self.count = fds.len();
                self.thawed = 0;
                self.was_expired = false;
                self.deadline = Instant::now() + Duration::from_millis(u64::from(packet.a));
                self.enter(Duty::Watch);
                answer(DONE, packet.seq, 0);
            }
            TAKE | RELEASE => {
                let count = self.count;
                if let Some(ward) = self.wards[..count].get_mut(packet.a as usize) {
                    ward.taken = packet.word == TAKE;
                }
            }
            DISARM if self.duty == Duty::None => answer(DONE, packet.seq, 0),
            DISARM => {
                self.disarm_seq = packet.seq;
                self.enter(Duty::Disarm);
            }
            PING => answer(DONE, packet.seq, 0),
            _ => answer(MALFORMED, packet.seq, 0),
        }
    }

    fn work(&mut self) {
        if matches!(self.duty, Duty::None | Duty::Watch) {
            return;
        }
        // From the bottom of the stack upward: thawing writes a superblock, which needs what is below.
        for index in (0..self.count).rev() {
            self.tend(index);
        }
        if self.duty == Duty::Disarm && self.all_free() {
            if self.was_expired || self.thawed > 0 {
                self.record(if self.was_expired {
                    "the deadline had passed"
                } else {
                    "disarmed while frozen"
                });
            }
            for ward in &mut self.wards[..self.count] {
                // SAFETY: the descriptor is ours alone.
                unsafe { libc::close(ward.fd) };
                *ward = NO_WARD;
            }
            self.count = 0;
            self.duty = Duty::None;
            answer(if self.was_expired { EXPIRED } else { DONE }, self.disarm_seq, self.thawed);
        }
    }

    fn tend(&mut self, index: usize) {
        let eager = self.since.elapsed() < EAGER;
        let final_answers = self.duty != Duty::Expired;
        let ward = &mut self.wards[index];
        if ward.child != 0 {
            let mut status = 0;
            // SAFETY: waits for our own child without blocking.
            let rc = unsafe { libc::waitpid(ward.child, &raw mut status, libc::WNOHANG) };
            if rc == 0 {
                return;
            }
            ward.child = 0;
            let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { FAILED };
            ward.note(code, &mut self.thawed, eager);
        }
        let settled = final_answers && ward.idle >= CONFIRMATIONS;
        if ward.taken && !settled && ward.next_try.is_none_or(|at| Instant::now() >= at) {
            self.tries = self.tries.wrapping_add(1);
            let tries = self.tries;
            // SAFETY: this process has one thread, and the child only makes system calls, the last of which is _exit.
            match unsafe { libc::fork() } {
                0 => {
                    // SAFETY: so that this child, should it hang, does not hide the guardian's end from the agent.
                    unsafe { libc::close(SOCKET) };
                    let code = ward.thaw(tries);
                    // SAFETY: ends the child without running anything of the parent's.
                    unsafe { libc::_exit(code) }
                }
                child if child > 0 => ward.child = child,
                // No process to be had: do it here, whatever may hold it up.
                _ => {
                    let code = ward.thaw(tries);
                    ward.note(code, &mut self.thawed, eager);
                }
            }
        }
    }

    fn all_free(&self) -> bool {
        self.wards[..self.count].iter().all(|w| w.child == 0 && (!w.taken || w.idle >= CONFIRMATIONS))
    }

    /// One line; formatted without allocating.
    fn record(&self, why: &str) {
        if self.log < 0 || self.count == 0 {
            return;
        }
        let mut line = [0_u8; 160];
        let mut cursor = Cursor::new(&mut line[..]);
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let _ = writeln!(
            cursor,
            "{at} guardian: {why}; {} {} armed, {} thawed by the guardian after {} ms",
            self.count,
            if self.wards[0].guest { "guests" } else { "filesystems" },
            self.thawed,
            self.since.elapsed().as_millis()
        );
        let length = usize::try_from(cursor.position()).unwrap_or(0);
        // SAFETY: the buffer is live and `length` is within it.
        unsafe { libc::write(self.log, line.as_ptr().cast(), length) };
    }
}

impl Ward {
    fn thaw(&self, tries: u32) -> i32 {
        if self.guest { guest::thaw(self.fd, tries) } else { thaw(self.fd) }
    }

    fn note(&mut self, code: i32, thawed: &mut u32, eager: bool) {
        let mut pause = if eager { RETRY } else { RETRY_RARELY };
        match code {
            THAWED => {
                *thawed += 1;
                self.idle = 0;
                pause = Duration::ZERO;
            }
            NOT_FROZEN => self.idle = self.idle.saturating_add(1),
            _ => self.idle = 0,
        }
        if self.guest {
            // It answers about all that was sent before, so once is certain.
            self.idle = if code == FAILED { 0 } else { CONFIRMATIONS };
            pause = pause.max(RETRY_GUEST);
        }
        self.next_try = Some(Instant::now() + pause);
    }
}

pub(super) const THAWED: i32 = 0;
pub(super) const NOT_FROZEN: i32 = 1;
pub(super) const FAILED: i32 = 2;

fn thaw(fd: RawFd) -> i32 {
    match crate::freeze::ioctl::thaw_fd(fd) {
        Ok(()) => THAWED,
        Err(libc::EINVAL) => NOT_FROZEN,
        Err(_) => FAILED,
    }
}

fn close_all(fds: &[RawFd]) {
    for fd in fds {
        // SAFETY: the descriptors were just received and are ours alone.
        unsafe { libc::close(*fd) };
    }
}

fn answer(word: u32, seq: u32, a: u32) {
    // If the agent is gone, the next receive says so.
    let _ = send(SOCKET, Packet { word, seq, a, b: 0 });
}
