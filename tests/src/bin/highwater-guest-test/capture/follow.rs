//! Replicas that follow the stream, from one proved position to the next.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_agent::capture::assemble::CapturedDisk;
use highwater_agent::capture::{Loss, StreamPosition};
use highwater_agent::device::Hook;

use super::super::subject::Subject;
use super::Capture;
use super::replica::{Applied, Replica};
use super::writers::meeting;

/// How long a position is waited for under load, and at rest.
pub const SEAL_MAX: Duration = Duration::from_secs(3);
const SEAL_REST_MAX: Duration = Duration::from_secs(30);
/// Windows at rest until nothing is left to be read again, and between them: what is not shown to complete is waited for for seconds.
const SETTLE_TRIES_MAX: usize = 20;
const SETTLE_PAUSE: Duration = Duration::from_millis(300);

/// What a window brought.
pub enum Window {
    /// It is not proved: nothing is to be said of the devices.
    Lost(Loss),
    /// The replicas are what they were, or no state of the devices: blocks are lacking.
    Stayed,
    /// The replicas are at a later position.
    Moved,
}

/// See the module.
pub struct Follower<'r, 's> {
    capture: &'r mut Capture,
    /// Of each device.
    pub replicas: Vec<Replica<'s>>,
    /// Proved windows.
    pub windows: usize,
    /// Times that no position could be sealed in time.
    unsealed: usize,
    /// What was read again saw at most what the stream has up to here.
    floor: StreamPosition,
    /// The last position that was applied.
    sealed: StreamPosition,
    sealing: Duration,
    proving: Duration,
    /// The programs' counts when it began: changes, bytes, and times that a copy was skipped.
    counted: (u64, u64, u64),
}

impl<'r, 's> Follower<'r, 's> {
    /// Copies devices that are at rest, the first `kept_bytes` of each in whole, and captures them from now on.
    pub fn begin(capture: &'r mut Capture, subjects: &'s mut [Subject], kept_bytes: usize) -> Result<Self> {
        let replicas = copies(subjects, kept_bytes)?;
        let counted = counts(capture)?;
        let disk = |replica: &Replica<'_>| CapturedDisk {
            id: replica.subject.id,
            dev: replica.subject.device.whole_kernel_dev(),
            start: 0,
            bytes: replica.subject.device.size_bytes,
            by_bio: replica.subject.device.hook == Hook::Bio,
            skip: vec![],
        };
        let disks: Vec<CapturedDisk> = replicas.iter().map(disk).collect();
        let devices: BTreeMap<_, _> =
            replicas.iter().map(|r| (r.subject.id, r.subject.device.clone())).collect();
        let whole: Vec<u32> = disks.iter().map(|disk| disk.dev).collect();
        capture.reader.begin(disks, devices);
        capture.tap.begin(whole, &capture.barrier)?;
        Ok(Self {
            capture,
            replicas,
            windows: 0,
            unsealed: 0,
            floor: StreamPosition::default(),
            sealed: StreamPosition::default(),
            sealing: Duration::ZERO,
            proving: Duration::ZERO,
            counted,
        })
    }

    /// Captures nothing any more. Answers what was applied to each replica.
    pub fn end(self) -> Vec<Applied> {
        self.capture.tap.end();
        self.capture.reader.end();
        self.replicas.iter().map(|replica| replica.applied).collect()
    }

    /// At rest: until nothing has to be read again.
    pub fn settle(&mut self) -> Result<Option<Loss>> {
        for _ in 0..SETTLE_TRIES_MAX {
            let unsealed = self.unsealed;
            if let Window::Lost(loss) = self.window(true, SEAL_REST_MAX)? {
                return Ok(Some(loss));
            }
            ensure!(self.unsealed == unsealed, "no position could be sealed at rest");
            if self.capture.reader.doubtful() == 0 {
                return Ok(None);
            }
            thread::sleep(SETTLE_PAUSE);
        }
        anyhow::bail!("{} blocks stay in doubt at rest", self.capture.reader.doubtful())
    }

    /// One window: what can be read again is read, a position is sealed, and applied if the stream up to it is proved. `demanded`: not
    /// the last position that came by itself, but one behind all that was written until now.
    pub fn window(&mut self, demanded: bool, most: Duration) -> Result<Window> {
        for (id, again) in self.capture.reader.take_again() {
            let replica = self.replicas.iter_mut().find(|r| r.subject.id == id);
            replica.context("only captured disks are told of")?.read_again(&again, &meeting())?;
            // Whatever these reads saw lies before the end of the stream now.
            self.floor = self.capture.reader.position();
        }
        let at_least = if demanded { self.capture.reader.position() } else { self.floor };
        let started = Instant::now();
        let sealed = self.capture.reader.seal(at_least, most).map(|(sealed, _)| sealed);
        self.sealing += started.elapsed();
        if let Some((disk, error)) = self.capture.reader.take_broken() {
            return Err(anyhow::Error::new(error).context(format!("cannot read {disk:?}")));
        }
        let started = Instant::now();
        self.capture.tap.before()?;
        self.capture.barrier.wait()?;
        if let Some(loss) = self.capture.tap.after()? {
            return Ok(Window::Lost(loss));
        }
        // Here no bits are asked what they are explained by, but what is taken to be over waits for it.
        let _ = self.capture.reader.explain(StreamPosition::default(), Duration::ZERO);
        self.proving += started.elapsed();
        self.windows += 1;
        let Some(sealed) = sealed else {
            self.unsealed += 1;
            return Ok(Window::Stayed);
        };
        for disk in sealed.disks {
            let replica = self.replicas.iter_mut().find(|r| r.subject.id == disk.id);
            replica.context("only captured disks are sealed")?.apply(disk.batch);
        }
        let moved = std::mem::replace(&mut self.sealed, sealed.position) < sealed.position;
        if moved && !self.capture.reader.is_lacking(sealed.position) {
            return Ok(Window::Moved);
        }
        Ok(Window::Stayed)
    }

    /// Changes captured, bytes of them, and times that a copy was skipped, since it began.
    pub fn counted(&self) -> Result<(u64, u64, u64)> {
        let now = counts(self.capture)?;
        Ok((now.0 - self.counted.0, now.1 - self.counted.1, now.2 - self.counted.2))
    }

    /// Tells how it went.
    pub fn tell(&self) -> Result<()> {
        let (events, bytes, skipped) = self.counted()?;
        println!(
            "  {events} changes, {} MiB, {} windows proved, {} without a position, {skipped} skipped; sealing took {:.1} s, proving {:.1} s",
            bytes >> 20,
            self.windows,
            self.unsealed,
            self.sealing.as_secs_f64(),
            self.proving.as_secs_f64(),
        );
        println!("  {:?}", self.capture.reader.figures());
        Ok(())
    }
}

fn counts(capture: &Capture) -> Result<(u64, u64, u64)> {
    let now = capture.tap.counters()?;
    Ok((now.bios, now.bytes, capture.tap.misses()?))
}

fn copies(subjects: &mut [Subject], kept_bytes: usize) -> Result<Vec<Replica<'_>>> {
    thread::scope(|scope| {
        let copies: Vec<_> =
            subjects.iter_mut().map(|s| scope.spawn(move || Replica::base(s, kept_bytes))).collect();
        copies.into_iter().map(|copy| copy.join().expect("readers do not panic")).collect()
    })
}
