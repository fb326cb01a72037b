//! One round: copies at rest, capture of all devices at once, load, proved windows, and the comparison when all is at rest again.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_agent::capture::assemble::CapturedDisk;
use highwater_agent::capture::{Loss, StreamPosition};
use highwater_agent::device::Hook;
use highwater_tests::Freeze;
use highwater_tests::buffer::{Aligned, open_direct};

use super::super::machine;
use super::super::subject::{Subject, missed};
use super::replica::{Applied, Replica};
use super::work::Work;
use super::writers::{CHAINED_BYTES, meeting};
use super::{Capture, Figures};

const MOUNT: &str = "/mnt/captured";
const STATES: &str = "/tmp/states";
/// States that are kept; each takes memory of the guest.
const STATES_MAX: usize = 24;
/// The smallest write of those that depend on each other.
const SECTOR: u32 = 512;
/// Between two windows.
const WINDOW: Duration = Duration::from_millis(250);
/// How long a position is waited for under load, and at rest.
const SEAL_MAX: Duration = Duration::from_secs(3);
const SEAL_REST_MAX: Duration = Duration::from_secs(30);
/// Windows at rest until nothing is left to be read again.
const SETTLE_TRIES_MAX: usize = 20;

/// Everything of a round that lasts as long as it does.
struct Round<'r, 's> {
    capture: &'r mut Capture,
    replicas: Vec<Replica<'s>>,
    /// Those of the replicas with writes that depend on each other.
    chained: Vec<usize>,
    windows: usize,
    /// What was read again saw at most what the stream has up to here.
    floor: StreamPosition,
    /// The last position that was applied.
    sealed: StreamPosition,
    /// States kept.
    states: usize,
    /// Times that no position could be sealed in time.
    unsealed: usize,
    sealing: Duration,
    proving: Duration,
}

/// `Some`: a window was not proved, and nothing is to be said of the devices.
pub fn run(
    capture: &mut Capture,
    subjects: &mut [Subject],
    ext4: usize,
    (duration, seed): (Duration, u64),
    figures: &mut Figures,
) -> Result<Option<Loss>> {
    std::fs::remove_dir_all(STATES).ok();
    std::fs::create_dir_all(STATES)?;
    let mount = Path::new(MOUNT);
    machine::mount_ext4(&subjects[ext4].path, mount)?;
    let chained: Vec<usize> = (0..subjects.len())
        .filter(|at| *at != ext4 && subjects[*at].device.logical_block_bytes == SECTOR)
        .collect();
    for at in &chained {
        open_direct(&subjects[*at].path, true)?.write_all_at(&Aligned::zeroed(CHAINED_BYTES), 0)?;
    }
    nix::unistd::sync();
    let work = Work::new(subjects, ext4, &chained, seed);
    let (counted, skipped) = (capture.tap.counters()?, capture.tap.misses()?);

    let frozen = Freeze::new(mount)?;
    let mut round = Round::new(capture, copies(subjects)?, chained);
    round.begin()?;
    drop(frozen);
    let (loss, history) = work.during(mount, || round.under_load(duration))?;
    nix::unistd::sync();
    let frozen = Freeze::new(mount)?;
    let loss = match loss {
        None => round.settle(),
        loss => Ok(loss),
    };
    let now = round.capture.tap.counters()?;
    (figures.events, figures.bytes) = (now.bios - counted.bios, now.bytes - counted.bytes);
    figures.skipped = round.capture.tap.misses()? - skipped;
    (figures.windows, figures.states) = (round.windows, round.states);
    round.tell(figures);
    let (applied, states) = round.end();
    let loss = loss?;
    if loss.is_none() {
        judge(subjects, &applied)?;
        for (number, images) in states.iter().enumerate() {
            let images: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
            history.check(&images).with_context(|| format!("state {number} of {}", states.len()))?;
        }
        println!("  {} states are such as a crash could have left", states.len());
    }
    drop(frozen);
    nix::mount::umount(mount).context("cannot unmount")?;
    Ok(loss)
}

fn kept(state: usize, disk: usize) -> PathBuf {
    Path::new(STATES).join(format!("{state}-{disk}"))
}

fn copies(subjects: &mut [Subject]) -> Result<Vec<Replica<'_>>> {
    thread::scope(|scope| {
        let copies: Vec<_> = subjects.iter_mut().map(|s| scope.spawn(|| Replica::base(s))).collect();
        copies.into_iter().map(|copy| copy.join().expect("readers do not panic")).collect()
    })
}

/// Compares devices with replicas.
fn judge(subjects: &[Subject], applied: &[Applied]) -> Result<()> {
    let mut wrong = vec![];
    for ((subject, missed), applied) in subjects.iter().zip(missed(subjects)?).zip(applied) {
        println!(
            "  {}: {} blocks and {} of zeros sealed, {} read again, {} elsewhere, {} lacking, {missed} of {} wrong",
            subject.name,
            applied.blocks,
            applied.zeroed,
            applied.healed,
            applied.healed_elsewhere,
            applied.lacking,
            subject.device.sectors() / 8,
        );
        if missed > 0 {
            wrong.push(format!("{missed} blocks of {} are not those of the stream", subject.name));
        }
        if applied.lacking > 0 {
            wrong.push(format!("the stream lacked {} blocks of {}", applied.lacking, subject.name));
        }
        if applied.blocks == 0 {
            wrong.push(format!("nothing was captured of {}", subject.name));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

impl<'r, 's> Round<'r, 's> {
    fn new(capture: &'r mut Capture, replicas: Vec<Replica<'s>>, chained: Vec<usize>) -> Self {
        Self {
            capture,
            replicas,
            chained,
            windows: 0,
            floor: StreamPosition::default(),
            sealed: StreamPosition::default(),
            states: 0,
            unsealed: 0,
            sealing: Duration::ZERO,
            proving: Duration::ZERO,
        }
    }

    /// Captures nothing any more. Answers what was applied to each replica, and where states were kept.
    fn end(self) -> (Vec<Applied>, Vec<Vec<PathBuf>>) {
        self.capture.tap.end();
        self.capture.reader.end();
        let images = |state| self.chained.iter().map(|disk| kept(state, *disk)).collect();
        (
            self.replicas.iter().map(|replica| replica.applied).collect(),
            (0..self.states).map(images).collect(),
        )
    }

    fn begin(&mut self) -> Result<()> {
        let disk = |replica: &Replica<'_>| CapturedDisk {
            id: replica.subject.id,
            dev: replica.subject.device.whole_kernel_dev(),
            start: 0,
            bytes: replica.subject.device.size_bytes,
            by_bio: replica.subject.device.hook == Hook::Bio,
            skip: vec![],
        };
        let disks: Vec<CapturedDisk> = self.replicas.iter().map(disk).collect();
        let devices: BTreeMap<_, _> =
            self.replicas.iter().map(|r| (r.subject.id, r.subject.device.clone())).collect();
        let whole: Vec<u32> = disks.iter().map(|disk| disk.dev).collect();
        self.capture.reader.begin(disks, devices);
        Ok(self.capture.tap.begin(whole, &self.capture.barrier)?)
    }

    fn under_load(&mut self, duration: Duration) -> Result<Option<Loss>> {
        let until = Instant::now() + duration;
        for demanded in [false, false, true].into_iter().cycle() {
            if Instant::now() >= until {
                break;
            }
            thread::sleep(WINDOW);
            if let Some(loss) = self.window(demanded, SEAL_MAX)? {
                return Ok(Some(loss));
            }
        }
        Ok(None)
    }

    /// At rest: until nothing has to be read again.
    fn settle(&mut self) -> Result<Option<Loss>> {
        for _ in 0..SETTLE_TRIES_MAX {
            let unsealed = self.unsealed;
            if let Some(loss) = self.window(true, SEAL_REST_MAX)? {
                return Ok(Some(loss));
            }
            ensure!(self.unsealed == unsealed, "no position could be sealed at rest");
            if self.capture.reader.doubtful() == 0 {
                return Ok(None);
            }
        }
        anyhow::bail!("{} blocks stay in doubt at rest", self.capture.reader.doubtful())
    }

    /// One window: what can be read again is read, a position is sealed, and applied if the stream up to it is proved. `demanded`: not
    /// the last position that came by itself, but one behind all that was written until now.
    fn window(&mut self, demanded: bool, most: Duration) -> Result<Option<Loss>> {
        for (id, again) in self.capture.reader.take_again() {
            let replica = self.replicas.iter_mut().find(|r| r.subject.id == id);
            replica.context("only captured disks are told of")?.read_again(&again, &meeting())?;
            // Whatever these reads saw lies before the end of the stream now.
            self.floor = self.capture.reader.position();
        }
        let at_least = if demanded { self.capture.reader.position() } else { self.floor };
        let started = Instant::now();
        let sealed = self.capture.reader.seal(at_least, most);
        self.sealing += started.elapsed();
        if let Some((disk, error)) = self.capture.reader.take_broken() {
            return Err(anyhow::Error::new(error).context(format!("cannot read {disk:?}")));
        }
        let started = Instant::now();
        self.capture.tap.before()?;
        self.capture.barrier.wait()?;
        if let Some(loss) = self.capture.tap.after()? {
            return Ok(Some(loss));
        }
        self.proving += started.elapsed();
        self.windows += 1;
        let Some(sealed) = sealed else {
            self.unsealed += 1;
            return Ok(None);
        };
        for disk in sealed.disks {
            let replica = self.replicas.iter_mut().find(|r| r.subject.id == disk.id);
            replica.context("only captured disks are sealed")?.apply(disk.batch);
        }
        let moved = std::mem::replace(&mut self.sealed, sealed.position) < sealed.position;
        if moved && self.states < STATES_MAX && !self.capture.reader.is_lacking(sealed.position) {
            for disk in &self.chained {
                self.replicas[*disk].keep(&kept(self.states, *disk))?;
            }
            self.states += 1;
        }
        Ok(None)
    }

    fn tell(&self, figures: &Figures) {
        let stream = self.capture.reader.figures();
        println!(
            "  {} changes, {} MiB, {} windows proved, {} without a position, {} skipped; sealing took {:.1} s, proving {:.1} s",
            figures.events,
            figures.bytes >> 20,
            self.windows,
            self.unsealed,
            figures.skipped,
            self.sealing.as_secs_f64(),
            self.proving.as_secs_f64(),
        );
        println!("  {stream:?}");
    }
}
