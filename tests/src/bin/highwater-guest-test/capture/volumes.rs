//! A database on two volumes of LVM, its data and its log, captured as two disks: at every position the replicas of both are one
//! state, in which nothing is changed that is not logged.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_agent::capture::Loss;

use super::super::lvm::SEGMENT_MIB;
use super::super::subject::{BLOCK, Subject};
use super::Capture;
use super::follow::{Follower, SEAL_MAX, Window};
use super::journal::check::Journals;
use super::journal::{self, Plan, Times};
use super::round::judge;

/// Several for each processor of the guest; an odd number, so that one of them writes where the segments meet.
const WRITERS: u64 = 13;
/// Between two windows.
const WINDOW: Duration = Duration::from_millis(15);

/// What the rounds showed together.
#[derive(Debug, Default)]
pub struct Figures {
    /// Writes, of the log and the data.
    pub writes: usize,
    /// Positions that were looked at.
    pub positions: usize,
    /// Those of them at which something of some writer was logged and not yet changed.
    pub between: usize,
}

/// Runs it on the volumes of data and log. `Some`: a window was not proved, and nothing is to be said.
pub fn run(
    capture: &mut Capture,
    volumes: &mut [Subject],
    (duration, seed): (Duration, u64),
    figures: &mut Figures,
) -> Result<Option<Loss>> {
    let paths: Vec<PathBuf> = volumes.iter().map(|volume| volume.path.clone()).collect();
    let plan = Plan {
        data: paths[0].clone(),
        log: paths[1].clone(),
        writers: WRITERS,
        middle: (SEGMENT_MIB << 20) / BLOCK as u64,
        seed,
    };
    plan.clear()?;
    let mut follower = Follower::begin(capture, volumes, usize::MAX)?;
    let mut journals = Journals::new(plan.clone());
    let (loss, times) = during(&plan, || follow(&mut follower, &mut journals, duration))?;
    let loss = match loss {
        None => follower.settle()?,
        loss => loss,
    };
    follower.tell()?;
    if loss.is_none() {
        check(&follower, &mut journals).context("at rest")?;
    }
    let applied = follower.end();
    if loss.is_none() {
        judge(volumes, &applied, None)?;
        journals.check_order(&times)?;
        figures.writes += times.iter().map(Vec::len).sum::<usize>();
        figures.positions += journals.positions.len();
        let between = |position: &&Vec<u64>| position.iter().any(|writes| writes % 2 == 1);
        figures.between += journals.positions.iter().filter(between).count();
        ensure!(figures.between > 0, "no position lay between a record of the log and its data");
    }
    Ok(loss)
}

/// Writers at work while `watch` runs.
fn during<T>(plan: &Plan, watch: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Times>)> {
    let (stop, clock) = (AtomicBool::new(false), AtomicU64::new(1));
    thread::scope(|scope| {
        let (stop, clock) = (&stop, &clock);
        let writers: Vec<_> = (0..plan.writers)
            .map(|writer| scope.spawn(move || journal::write(plan, writer, clock, stop)))
            .collect();
        let told = watch();
        stop.store(true, Ordering::Relaxed);
        let times: Result<Vec<Times>> =
            writers.into_iter().map(|writer| writer.join().expect("writers do not panic")).collect();
        Ok((told?, times?))
    })
}

fn follow(
    follower: &mut Follower<'_, '_>,
    journals: &mut Journals,
    duration: Duration,
) -> Result<Option<Loss>> {
    let until = Instant::now() + duration;
    for demanded in [false, false, true].into_iter().cycle() {
        if Instant::now() >= until {
            break;
        }
        thread::sleep(WINDOW);
        match follower.window(demanded, SEAL_MAX)? {
            Window::Lost(loss) => return Ok(Some(loss)),
            Window::Moved => check(follower, journals)
                .with_context(|| format!("position {} under load", journals.positions.len()))?,
            Window::Stayed => {}
        }
    }
    Ok(None)
}

fn check(follower: &Follower<'_, '_>, journals: &mut Journals) -> Result<()> {
    journals.check(follower.replicas[0].content(), follower.replicas[1].content())
}
