//! Ctrl-C at any moment: noticed between two steps, so that destructors clean up as they do at the end.
//!
//! A terminal sends the signal to every process of the demo. So it is blocked before anything is started, and all
//! programs inherit that: none of them dies half-way through making a device. One thread waits for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static BEGUN: AtomicBool = AtomicBool::new(false);
/// What shells expect of a program ended by Ctrl-C.
pub const EXIT_CODE: u8 = 130;

extern "C" fn terminated(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Release);
}

/// Begins to listen. To be called first, while there is one thread.
pub fn listen() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals.thread_block()?;
    let action = SigAction::new(SigHandler::Handler(terminated), SaFlags::SA_RESTART, SigSet::empty());
    // Not blocked: daemons that inherited that could not be asked to stop.
    // SAFETY: the handler only stores to an atomic.
    unsafe { sigaction(Signal::SIGTERM, &action) }?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if !BEGUN.load(Ordering::Acquire) {
                // Nothing is made yet, and the main thread may wait for a lock.
                std::process::exit(i32::from(EXIT_CODE));
            }
            if INTERRUPTED.swap(true, Ordering::AcqRel) {
                eprintln!("\nstill cleaning up");
            } else {
                eprintln!("\ninterrupted: ending this step, then cleaning up");
            }
        }
    });
    Ok(())
}

/// From now on there is something to clean up.
pub fn begin() {
    BEGUN.store(true, Ordering::Release);
}

/// Whether the user wants it to end.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

/// An error if the user wants it to end.
pub fn check() -> Result<()> {
    if interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

/// Sleeps, unless interrupted.
pub fn sleep(time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        check()?;
        thread::sleep(Duration::from_millis(20).min(until.saturating_duration_since(Instant::now())));
    }
    check()
}

/// Tries until it works, for a while: something may hold a device for a moment longer.
pub fn retry(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match attempt() {
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
}

/// A destructor cannot fail; what it left is found at the end too.
pub fn report(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("demo: {error:#}");
    }
}
