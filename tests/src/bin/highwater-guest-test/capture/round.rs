//! One round: copies at rest, capture of all devices at once, load, proved windows, and the comparison when all is at rest again.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_agent::capture::Loss;
use highwater_tests::buffer::{Aligned, open_direct};
use highwater_tests::free_space::free_space;
use highwater_tests::{FileSystem, Freeze};

use super::super::machine;
use super::super::subject::{Differing, Subject, differing};
use super::follow::{Follower, SEAL_MAX, Window};
use super::replica::Applied;
use super::work::Work;
use super::writers::CHAINED_BYTES;
use super::{Capture, Figures};

const MOUNT: &str = "/mnt/captured";
const STATES: &str = "/tmp/states";
/// States that are kept; each takes memory of the guest.
const STATES_MAX: usize = 24;
/// The smallest write of those that depend on each other.
const SECTOR: u32 = 512;
/// Between two windows.
const WINDOW: Duration = Duration::from_millis(250);

/// Everything of a round that lasts as long as it does.
struct Round<'r, 's> {
    follower: Follower<'r, 's>,
    /// Those of the replicas with writes that depend on each other.
    chained: Vec<usize>,
    /// States kept.
    states: usize,
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

    let frozen = Freeze::new(mount)?;
    let follower = Follower::begin(capture, subjects, CHAINED_BYTES)?;
    let mut round = Round { follower, chained, states: 0 };
    drop(frozen);
    let (loss, history) = work.during(mount, || round.under_load(duration))?;
    nix::unistd::sync();
    let frozen = Freeze::new(mount)?;
    let loss = match loss {
        None => round.follower.settle(),
        loss => Ok(loss),
    };
    (figures.events, figures.bytes, figures.skipped) = round.follower.counted()?;
    (figures.windows, figures.states) = (round.follower.windows, round.states);
    round.follower.tell()?;
    let images = |state| round.chained.iter().map(|disk| kept(state, *disk)).collect();
    let states: Vec<Vec<PathBuf>> = (0..round.states).map(images).collect();
    let applied = round.follower.end();
    let loss = loss?;
    if loss.is_none() {
        judge(subjects, &applied, Some(ext4))?;
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

/// Compares devices with replicas. `ext4`: this one holds a frozen file system, the free space of which may differ (see
/// [`free_space`]).
pub fn judge(subjects: &[Subject], applied: &[Applied], ext4: Option<usize>) -> Result<()> {
    let mut wrong = vec![];
    for (at, ((subject, differing), applied)) in
        subjects.iter().zip(differing(subjects)?).zip(applied).enumerate()
    {
        println!(
            "  {}: {} blocks and {} of zeros sealed, {} read again, {} elsewhere, {} lacking, {} of {} wrong",
            subject.name,
            applied.blocks,
            applied.zeroed,
            applied.healed,
            applied.healed_elsewhere,
            applied.lacking,
            differing.blocks,
            subject.device.sectors() / 8,
        );
        let in_use = match ext4 {
            Some(ext4) if ext4 == at => in_use(subject, &differing)?,
            _ => differing.bytes.len(),
        };
        if in_use > 0 {
            let of = differing.blocks;
            wrong.push(format!(
                "{in_use} sectors of {of} blocks of {} are not those of the stream",
                subject.name
            ));
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

/// How many of these sectors the frozen file system has in use.
fn in_use(subject: &Subject, differing: &Differing) -> Result<usize> {
    let free = free_space(FileSystem::Ext4, &subject.path)?;
    ensure!(!free.is_empty(), "{} tells no free space", subject.name);
    let in_use = differing.bytes.iter().filter(|byte| !free.iter().any(|range| range.contains(byte))).count();
    if differing.blocks > 0 {
        println!("  {}: {} sectors differ, {in_use} of them in use", subject.name, differing.bytes.len());
    }
    Ok(in_use)
}

impl Round<'_, '_> {
    fn under_load(&mut self, duration: Duration) -> Result<Option<Loss>> {
        let until = Instant::now() + duration;
        for demanded in [false, false, true].into_iter().cycle() {
            if Instant::now() >= until {
                break;
            }
            thread::sleep(WINDOW);
            match self.follower.window(demanded, SEAL_MAX)? {
                Window::Lost(loss) => return Ok(Some(loss)),
                Window::Moved if self.states < STATES_MAX => self.keep()?,
                Window::Moved | Window::Stayed => {}
            }
        }
        Ok(None)
    }

    fn keep(&mut self) -> Result<()> {
        for disk in &self.chained {
            self.follower.replicas[*disk].keep(&kept(self.states, *disk))?;
        }
        self.states += 1;
        Ok(())
    }
}
