//! The tracker on a real loop device. Needs root and the eBPF object; says so and passes without.

use super::*;
use crate::device::{self, BlockDevice};
use highwater_abi::class;
use std::{
    fs,
    os::unix::fs::{FileExt, OpenOptionsExt},
    process::Command,
    sync::atomic::Ordering,
};

struct Loop {
    device: BlockDevice,
    path: String,
    _dir: tempfile::TempDir,
}

impl Loop {
    fn new(bytes: u64) -> Option<Self> {
        // SAFETY: no arguments, no memory.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        let out = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        let path = String::from_utf8(out.stdout).unwrap().trim().to_owned();
        let device = device::inspect(Path::new(&path)).unwrap();
        Some(Self { device, path, _dir: dir })
    }
    fn write(&self, block: u64, blocks: usize) {
        let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&self.path).unwrap();
        let layout = std::alloc::Layout::from_size_align(blocks * 4096, 4096).unwrap();
        // SAFETY: a non-zero layout, freed below with the same one.
        let buffer = unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc(layout), blocks * 4096) };
        buffer.fill(block as u8 | 1);
        file.write_all_at(buffer, block * 4096).unwrap();
        // SAFETY: allocated above.
        unsafe { std::alloc::dealloc(buffer.as_mut_ptr(), layout) };
    }
}
impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.path]).status();
    }
}

struct Pins(PathBuf, tempfile::TempDir);
impl Pins {
    fn new(name: &str) -> Self {
        let dir = PathBuf::from(format!("/sys/fs/bpf/highwater-test-{name}-{}", std::process::id()));
        Self(dir, tempfile::tempdir().unwrap())
    }
    fn options(&self) -> Options {
        Options {
            bpf_dir: self.0.clone(),
            run_dir: self.1.path().to_owned(),
            copies: None,
            net: true,
            bits_max: 1 << 28,
        }
    }
}
impl Pins {
    /// A tracker of its own; none without the eBPF object.
    fn tracker(&self) -> Option<Tracker> {
        match Tracker::open(self.options()) {
            Err(TrackerError::NoObject) => None,
            other => Some(other.unwrap().0),
        }
    }
}
impl Drop for Pins {
    fn drop(&mut self) {
        let _ = object::remove(&self.0);
    }
}

fn blocks(tracker: &mut Tracker, disk: DiskId) -> (Vec<u64>, Vec<(DiskId, Fault)>) {
    let mut found = vec![];
    let end = tracker
        .end_epoch(|d, index, bits| {
            assert_eq!(d, disk);
            found.extend((0..64).filter(|b| bits >> b & 1 == 1).map(|b| index as u64 * 64 + b));
        })
        .unwrap();
    found.sort_unstable();
    found.dedup();
    (found, end.faults)
}

#[test]
fn marks_takes_over_and_notices_a_hidden_write() {
    if !Path::new("/sys/fs/bpf").exists() {
        return;
    }
    let Some(disk) = Loop::new(64 << 20) else { return };
    let pins = Pins::new("tracker");
    let id = DiskId::new();
    let (mut tracker, origin) = match Tracker::open(pins.options()) {
        Err(TrackerError::NoObject) => {
            eprintln!("skipped: no eBPF object");
            return;
        }
        other => other.unwrap(),
    };
    assert!(matches!(origin, Origin::Fresh(_)));
    tracker.protect(id, &disk.device).unwrap();
    disk.write(3, 1);
    disk.write(100, 300);
    let (found, faults) = blocks(&mut tracker, id);
    let mut expected = vec![3];
    expected.extend(100..400);
    assert_eq!(found, expected);
    assert_eq!(faults, vec![]);
    assert_eq!(tracker.figures(id).unwrap().counters.sectors[class::WRITE], 301 * 8);

    // The agent dies; tracking goes on; the next life finds what was written meanwhile and what was pending.
    drop(tracker);
    disk.write(1000, 2);
    let (mut tracker, origin) = Tracker::open(pins.options()).unwrap();
    assert_eq!(origin, Origin::TakenOver);
    let (found, faults) = blocks(&mut tracker, id);
    assert_eq!((found, faults), (vec![1000, 1001], vec![]));
    let pending: u32 = tracker.pending(id).unwrap().iter().map(|w| w.count_ones()).sum();
    assert_eq!(pending, 303);
    let mut stored = vec![0; 16];
    stored[0] = 1 << 3;
    tracker.stored(id, &stored).unwrap();
    let pending: u32 = tracker.pending(id).unwrap().iter().map(|w| w.count_ones()).sum();
    assert_eq!(pending, 302);

    // Tracking is switched off for a moment and a write slips by: the counts tell.
    let (_, faults) = blocks(&mut tracker, id);
    assert_eq!(faults, vec![]);
    let dev = disk.device.whole_kernel_dev();
    let target = tracker.object.target(dev).unwrap().unwrap();
    tracker.object.remove_target(dev).unwrap();
    disk.write(5, 2);
    tracker.object.set_target(dev, &target).unwrap();
    let (found, faults) = blocks(&mut tracker, id);
    assert_eq!(found, Vec::<u64>::new());
    assert_eq!(faults, vec![(id, Fault::UnseenSectors(16))]);

    // Nobody has noted it: it is told again, in this life and in the next.
    let fault = vec![(id, Fault::UnseenSectors(16))];
    assert_eq!(blocks(&mut tracker, id), (vec![], fault.clone()));
    drop(tracker);
    let (mut tracker, origin) = Tracker::open(pins.options()).unwrap();
    assert_eq!(origin, Origin::TakenOver);
    assert_eq!(blocks(&mut tracker, id).1, fault);
    tracker.faults_noted().unwrap();
    assert_eq!(blocks(&mut tracker, id).1, vec![]);
    drop(tracker);
    let (mut tracker, _) = Tracker::open(pins.options()).unwrap();
    assert_eq!(blocks(&mut tracker, id).1, vec![]);

    tracker.detach().unwrap();
    assert!(!pins.0.exists());
}

/// The kernel refuses the barrier after the programs were sent to the other bitmap: nothing is lost, and the next end tells
/// what both epochs marked.
#[test]
fn an_end_that_failed_half_way_is_made_good() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("half-way");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    tracker.protect(id, &disk.device).unwrap();
    disk.write(7, 1);
    // What `end_epoch` does before the barrier.
    tracker.spares_full = true;
    let slot = tracker.slots.get_mut(&id).unwrap();
    slot.parity ^= 1;
    tracker.epochs.set(slot.record.slot, slot.parity);
    disk.write(9, 1);
    assert_eq!(blocks(&mut tracker, id), (vec![7, 9], vec![]));
    disk.write(7, 1);
    assert_eq!(blocks(&mut tracker, id), (vec![7], vec![]));
    tracker.detach().unwrap();
}

/// The note of a write of two blocks at block 5.
fn hidden_note(dev: u32) -> highwater_abi::Issued {
    highwater_abi::Issued { sector: 40, bytes: 8192, started_ns: 1, issued_ns: 1, dev, ..Default::default() }
}

/// A write of two blocks at block 5 that no completion program is shown; only the net has it.
fn write_hidden(tracker: &mut Tracker, disk: &Loop) {
    let dev = disk.device.whole_kernel_dev();
    let target = tracker.object.target(dev).unwrap().unwrap();
    tracker.object.remove_target(dev).unwrap();
    disk.write(5, 2);
    tracker.object.set_target(dev, &target).unwrap();
    tracker.object.forge(FORGED, hidden_note(dev));
}

/// The agent dies after the net's notes were marked and counted, but before that was written down.
#[test]
fn a_life_that_ends_before_its_record_leaves_the_net_as_it_was() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("net-unrecorded");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    tracker.protect(id, &disk.device).unwrap();
    write_hidden(&mut tracker, &disk);
    tracker.options.run_dir = pins.1.path().join("gone");
    assert!(matches!(tracker.end_epoch(|_, _, _| ()), Err(TrackerError::Record { .. })));
    drop(tracker);
    let (mut tracker, origin) = Tracker::open(pins.options()).unwrap();
    assert_eq!(origin, Origin::TakenOver);
    assert_eq!(blocks(&mut tracker, id), (vec![5, 6], vec![]));
    // Counted once, and gone.
    assert_eq!(blocks(&mut tracker, id), (vec![], vec![]));
    let figures = tracker.figures(id).unwrap();
    assert_eq!((figures.late, figures.kernel), (16, Some(figures.counters.sectors)));
    tracker.detach().unwrap();
}

/// The address of a forged note.
const FORGED: u64 = 0xffff_8880_0000_0000;

/// A request that discarded several ranges, whose end was not shown: nobody knows which they were.
#[test]
fn what_a_scattered_note_stands_for_is_everything() {
    let Some(disk) = Loop::new(1 << 20) else { return };
    let pins = Pins::new("net-scattered");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    tracker.protect(id, &disk.device).unwrap();
    write_hidden(&mut tracker, &disk);
    let dev = disk.device.whole_kernel_dev();
    tracker.object.forge(FORGED, highwater_abi::Issued { scattered: 1, ..hidden_note(dev) });
    assert_eq!(blocks(&mut tracker, id).0, (0..256).collect::<Vec<_>>());
    tracker.detach().unwrap();
}

/// The request of a note is used again after it was counted, before it is taken away: the issue program counts it then.
#[test]
fn a_note_that_is_used_again_counts_once() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("net-reused");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    tracker.protect(id, &disk.device).unwrap();
    write_hidden(&mut tracker, &disk);
    let dev = disk.device.whole_kernel_dev();
    let look = tracker.look(dev).unwrap();
    tracker.barrier.wait().unwrap();
    assert!(tracker.compare(look, &mut |_, _, _| ()).unwrap().fault.is_none());
    assert_eq!(tracker.devices[&dev].reaped[class::WRITE], 16);
    // While it is counted and not recorded yet, it explains nothing else.
    let look = tracker.look(dev).unwrap();
    tracker.barrier.wait().unwrap();
    assert!(tracker.compare(look, &mut |_, _, _| ()).unwrap().fault.is_none());
    assert_eq!((tracker.devices[&dev].reaped[class::WRITE], tracker.hauled.len()), (16, 1));
    let again = highwater_abi::Issued { started_ns: 2, seen: 1, dev, ..Default::default() };
    tracker.object.forge(FORGED, again);
    tracker.save().unwrap();
    assert_eq!((tracker.devices[&dev].reaped[class::WRITE], tracker.hauled.len()), (0, 0));
    tracker.detach().unwrap();
}

/// Tracking of a device is broken, and put right because another of its disks is protected: the first is in doubt all the same.
#[test]
fn protecting_another_partition_heals_no_doubt() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("healed");
    let Some(mut tracker) = pins.tracker() else { return };
    let half = |start_sector| BlockDevice { start_sector, size_bytes: 8 << 20, ..disk.device.clone() };
    let (first, second) = (DiskId::new(), DiskId::new());
    tracker.protect(first, &half(0)).unwrap();
    tracker.object.remove_target(disk.device.whole_kernel_dev()).unwrap();
    disk.write(5, 2);
    tracker.protect(second, &half(16 << 10)).unwrap();
    let end = tracker.end_epoch(|_, _, _| ()).unwrap();
    assert_eq!(end.faults, vec![(first, Fault::Tampered)]);
    tracker.detach().unwrap();
}

/// A write ends between the two readings of the counts, so that they can't tell how much of the net's was counted.
#[test]
fn the_net_is_counted_at_a_quiet_moment() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("net-disturbed");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    tracker.protect(id, &disk.device).unwrap();
    write_hidden(&mut tracker, &disk);
    let look = tracker.look(disk.device.whole_kernel_dev()).unwrap();
    disk.write(9, 1);
    tracker.barrier.wait().unwrap();
    let mut marked = vec![];
    let checked = tracker.compare(look, &mut |_, index, bits| marked.push((index, bits))).unwrap();
    assert_eq!((checked.fault, checked.exact), (None, false));
    assert_eq!(marked, vec![(0, 1 << 5), (0, 1 << 6)]);
    tracker.save().unwrap();
    let (found, faults) = blocks(&mut tracker, id);
    assert_eq!(faults, vec![]);
    assert!(found.contains(&9));
    let figures = tracker.figures(id).unwrap();
    assert_eq!((figures.late, figures.kernel), (16, Some(figures.counters.sectors)));
    tracker.detach().unwrap();
}

/// A second disk of the same device takes nothing away from what is known of the first.
#[test]
fn another_partition_hides_nothing() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("partitions");
    let Some(mut tracker) = pins.tracker() else { return };
    let half = |start_sector| BlockDevice { start_sector, size_bytes: 8 << 20, ..disk.device.clone() };
    let (first, second) = (DiskId::new(), DiskId::new());
    tracker.protect(first, &half(0)).unwrap();
    assert_eq!(blocks(&mut tracker, first), (vec![], vec![]));
    let dev = disk.device.whole_kernel_dev();
    let target = tracker.object.target(dev).unwrap().unwrap();
    tracker.object.remove_target(dev).unwrap();
    disk.write(5, 2);
    tracker.object.set_target(dev, &target).unwrap();
    disk.write(9, 1);
    tracker.protect(second, &half(16 << 10)).unwrap();
    let (mut found, mut suspect) = (vec![], vec![]);
    // The counts are compared at a quiet moment, which need not be the first.
    for _ in 0..50 {
        let end = tracker.end_epoch(|id, index, bits| found.push((id, index, bits))).unwrap();
        suspect = end.faults;
        if !suspect.is_empty() {
            break;
        }
    }
    assert_eq!(found, vec![(first, 0, 1 << 9)]);
    suspect.sort_by_key(|(id, _)| *id);
    let mut expected = vec![(first, Fault::UnseenSectors(16)), (second, Fault::UnseenSectors(16))];
    expected.sort_by_key(|(id, _)| *id);
    assert_eq!(suspect, expected);
    tracker.detach().unwrap();
}

/// Programs are attached while a device needs them, and links that somebody removed are a fault, not a silence.
#[test]
fn programs_are_attached_while_needed() {
    let Some(disk) = Loop::new(16 << 20) else { return };
    let pins = Pins::new("hooks");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    let links = || {
        let mut names: Vec<String> = fs::read_dir(pins.0.join("links"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(links(), Vec::<String>::new());
    tracker.protect(id, &disk.device).unwrap();
    let wanted: Vec<String> =
        (1..=tracker.copies()).map(|n| format!("rq_complete_{n}")).chain(["rq_issue_1".into()]).collect();
    assert_eq!(links(), wanted);

    // Somebody empties the directory: the programs no longer run.
    fs::remove_dir_all(&pins.0).unwrap();
    disk.write(3, 1);
    // The kernel detaches them a little later: the write may still have been seen.
    assert_eq!(blocks(&mut tracker, id).1, vec![(id, Fault::Tampered)]);
    tracker.faults_noted().unwrap();
    tracker.protect(id, &disk.device).unwrap();
    assert_eq!(links(), wanted);
    disk.write(4, 2);
    assert_eq!(blocks(&mut tracker, id), (vec![4, 5], vec![]));
    drop(tracker);
    let (mut tracker, origin) = Tracker::open(pins.options()).unwrap();
    assert_eq!(origin, Origin::TakenOver);

    tracker.unprotect(id).unwrap();
    assert_eq!(links(), Vec::<String>::new());
    tracker.detach().unwrap();
}

/// Epochs end all the time under load; the counts agree in the end, and no false alarm is raised.
#[test]
fn counts_agree_under_load() {
    let Some(disk) = Loop::new(128 << 20) else { return };
    let pins = Pins::new("counts");
    let id = DiskId::new();
    let Some(mut tracker) = pins.tracker() else { return };
    tracker.protect(id, &disk.device).unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (stop, disk) = (stop.clone(), &disk);
            scope.spawn(move || {
                let mut block = thread * 8000;
                while !stop.load(Ordering::Relaxed) {
                    disk.write(block, 1 + (block % 7) as usize);
                    block = thread * 8000 + (block * 7 + 13) % 7900;
                }
            });
        }
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let mut epochs = 0;
        while std::time::Instant::now() < until {
            let (_, faults) = blocks(&mut tracker, id);
            assert_eq!(faults, vec![], "after {epochs} epochs");
            epochs += 1;
        }
        stop.store(true, Ordering::Relaxed);
        eprintln!("{epochs} epochs");
    });
    let (_, faults) = blocks(&mut tracker, id);
    assert_eq!(faults, vec![]);
    let figures = tracker.figures(id).unwrap();
    eprintln!("{figures:?} {:?}", tracker.sample(disk.device.whole_kernel_dev()).unwrap());
    assert_eq!(Some(figures.counters.sectors), figures.kernel);
    assert!(figures.compared && figures.counters.sectors[class::WRITE] > 0);
    tracker.detach().unwrap();
}
