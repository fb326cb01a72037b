//! A disk whose writes device-mapper logs beneath it: what capture makes of it is what the log has, byte for byte, whenever all is
//! still; and nothing else than what the log has in between.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_agent::capture::Loss;
use highwater_tests::buffer::open_direct;

use super::super::machine;
use super::super::mapper::{Mapped, Target, number};
use super::super::subject::Subject;
use super::Capture;
use super::follow::{Follower, SEAL_MAX, Window};
use super::logged_writers::Writers;
use super::oracle::{self, Found, States};
use super::round::judge;

const WRITERS: u64 = 6;
/// Between two windows, and windows from one mark to the next.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOWS_PER_MARK: usize = 6;
/// Marks; the content at each takes memory of the guest.
const MARKS_MAX: usize = 8;
const FIRST_MARK: &str = "begin";

/// What a round showed.
#[derive(Debug, Default)]
pub struct Figures {
    /// Operations of the writers.
    pub operations: u64,
    /// Positions under load.
    pub positions: usize,
    /// Compared with the log.
    pub found: Found,
}

/// The disk to log, and the one that takes the log.
pub struct Disks {
    /// Its writes are logged.
    pub disk: PathBuf,
    /// Here.
    pub log: PathBuf,
}

/// Runs it. `Some`: a window was not proved, and nothing is to be said.
pub fn run(
    capture: &mut Capture,
    disks: &Disks,
    (duration, seed): (Duration, u64),
    figures: &mut Figures,
) -> Result<Option<Loss>> {
    machine::modprobe("dm_log_writes");
    let sectors = machine::attribute(&disks.disk, "size")?;
    let parameters = format!("{} {}", number(&disks.disk)?, number(&disks.log)?);
    let logging = Mapped::new("logging", &[Target { start: 0, sectors, kind: "log-writes", parameters }])?;
    let whole = Mapped::new("logged", &[Target::linear(0, sectors, &logging.path, 0)?])?;
    let mut subject = [Subject::new("logged", &whole.path)?];
    let writers = Writers {
        path: whole.path.clone(),
        bytes: sectors * 512,
        count: WRITERS,
        seed,
        still: RwLock::new(()),
        flush: Mutex::new(()),
        stop: AtomicBool::new(false),
        done: AtomicU64::new(0),
    };
    logging.message(&format!("mark {FIRST_MARK}"))?;
    let mut follower = Follower::begin(capture, &mut subject, usize::MAX)?;
    let mut states = States { base: follower.replicas[0].content().to_vec(), ..States::default() };
    let loss = during(&writers, || follow(&mut follower, &logging, &writers, &mut states, duration))?;
    follower.tell()?;
    let applied = follower.end();
    if loss.is_none() {
        judge(&subject, &applied, None)?;
    }
    drop(subject);
    whole.remove()?;
    // Its end completes the log.
    logging.remove()?;
    if loss.is_none() {
        figures.operations = writers.done.into_inner();
        figures.positions = states.positions.len();
        figures.found = oracle::check(&disks.log, FIRST_MARK, &states).context("by the log of writes")?;
        ensure!(figures.found.discards > 0, "the log has no discard");
        println!("  {figures:?}");
    }
    Ok(loss)
}

/// Writers at work while `watch` runs.
fn during<T>(writers: &Writers, watch: impl FnOnce() -> Result<T>) -> Result<T> {
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..writers.count).map(|writer| scope.spawn(move || writers.write(writer))).collect();
        let told = watch();
        writers.stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().expect("writers do not panic")?;
        }
        told
    })
}

/// Positions under load, and marks between; a mark is the last, and nothing is written behind it.
fn follow(
    follower: &mut Follower<'_, '_>,
    logging: &Mapped,
    writers: &Writers,
    states: &mut States,
    duration: Duration,
) -> Result<Option<Loss>> {
    let mut seen = states.base.clone();
    let until = Instant::now() + duration;
    loop {
        for demanded in [false, true].into_iter().cycle().take(WINDOWS_PER_MARK) {
            thread::sleep(WINDOW);
            match follower.window(demanded, SEAL_MAX)? {
                Window::Lost(loss) => return Ok(Some(loss)),
                Window::Moved => see(follower, &mut seen, states),
                Window::Stayed => {}
            }
        }
        let _still = writers.still.write().unwrap_or_else(PoisonError::into_inner);
        let last = Instant::now() >= until || states.marked.len() + 1 == MARKS_MAX;
        if last {
            writers.stop.store(true, Ordering::Relaxed);
        }
        open_direct(&writers.path, true)?.sync_data()?;
        let name = format!("still-{}", states.marked.len());
        logging.message(&format!("mark {name}"))?;
        if let Some(loss) = follower.settle()? {
            return Ok(Some(loss));
        }
        see(follower, &mut seen, states);
        states.marked.push((name, seen.clone()));
        if last {
            return Ok(None);
        }
    }
}

/// Notes what a position has otherwise than the one before.
fn see(follower: &Follower<'_, '_>, seen: &mut [u8], states: &mut States) {
    let content = follower.replicas[0].content();
    states.positions.push(oracle::changes(seen, content));
    seen.copy_from_slice(content);
}
