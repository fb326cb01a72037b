//! Devices, what is mounted on them, and reading them: on real ones.

mod support;

use highwater_agent::{
    device::{self, DeviceError, Hook, StableIdentity, admit, find, inspect},
    mounts::survey,
    source::{SourceError, SourceOptions, SourceReader},
};
use highwater_delta::BlockRange;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use support::{Loop, Mounted, machine, run, scratch};

/// A partition made by `addpart`; removed when dropped.
struct Part<'a> {
    disk: &'a Loop,
    number: u32,
    path: std::path::PathBuf,
}

impl<'a> Part<'a> {
    fn add(disk: &'a Loop, number: u32, start: u64, sectors: u64) -> Self {
        let (number_text, start, sectors) = (number.to_string(), start.to_string(), sectors.to_string());
        run("addpart", &[&disk.text(), &number_text, &start, &sectors]);
        let path = std::path::PathBuf::from(format!("{}p{number}", disk.text()));
        if !path.exists() {
            let name = path.file_name().expect("a node").to_string_lossy().into_owned();
            let dev = fs::read_to_string(format!("/sys/class/block/{name}/dev")).expect("added");
            let (major, minor) = dev.trim().split_once(':').expect("major:minor");
            run("mknod", &[&path.display().to_string(), "b", major, minor]);
        }
        Self { disk, number, path }
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        let _ = Command::new("delpart").args([&self.disk.text(), &self.number.to_string()]).output();
        let _ = fs::remove_file(&self.path);
    }
}

#[test]
fn a_loop_device_is_known_by_its_file() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let first = Loop::create(dir.path(), "disk.img", 8 << 20);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&first.path, &link).expect("can be made");
    let device = inspect(&link).expect("a device");
    assert_eq!((device.size_bytes, device.start_sector, device.hook), (8 << 20, 0, Hook::Request));
    assert_eq!((device.dev, device.kernel_dev), (device.whole, device.dev.0 << 20 | device.dev.1));
    assert!(device.diskseq.is_some() && !device.is_partition());
    admit(&device).expect("fit to be protected");
    let identity = StableIdentity::of(&device).expect("has a file");
    let text = serde_json::to_string(&identity).expect("serialises");
    assert_eq!(serde_json::from_str::<StableIdentity>(&text).expect("parses"), identity);
    assert_eq!(find(&identity).expect("unambiguous").expect("there").dev, device.dev);

    drop(first);
    assert!(find(&identity).expect("unambiguous").is_none(), "gone");
    let _other = Loop::create(dir.path(), "other.img", 8 << 20);
    let again = Loop::attach(&dir.path().join("disk.img"));
    assert_eq!(find(&identity).expect("unambiguous").expect("back").path, again.path);
    let twice = Loop::attach(&dir.path().join("disk.img"));
    assert!(matches!(find(&identity), Err(DeviceError::Ambiguous { .. })));
    drop((twice, again));
    fs::rename(dir.path().join("other.img"), dir.path().join("disk.img")).expect("same directory");
    let _imposter = Loop::attach(&dir.path().join("disk.img"));
    assert!(find(&identity).expect("unambiguous").is_none(), "another file at the same path is another disk");
}

#[test]
fn what_is_no_disk_is_refused() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    assert!(matches!(inspect(Path::new("/dev/null")), Err(DeviceError::NotABlockDevice(_))));
    assert!(matches!(inspect(dir.path()), Err(DeviceError::NotABlockDevice(_))));
    assert!(matches!(inspect(&dir.path().join("none")), Err(DeviceError::Path { .. })));
    let device = Loop::create(dir.path(), "empty.img", 0);
    assert!(matches!(inspect(&device.path), Err(DeviceError::Empty(_))));
    let swap = Loop::create(dir.path(), "swap.img", 8 << 20);
    run("mkswap", &[&swap.text()]);
    let error = admit(&inspect(&swap.path).expect("a device")).expect_err("swap");
    assert!(error.to_string().contains("swap area"), "{error}");
    if let Ok(zram) = inspect(Path::new("/dev/zram0")) {
        assert_eq!(zram.hook, Hook::Bio);
    }
}

#[test]
fn the_kernels_account_counts_what_is_written() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let disk = Loop::create(dir.path(), "disk.img", 8 << 20);
    let device = inspect(&disk.path).expect("a device");
    let before = device::stat(device.whole).expect("there");
    run("dd", &["if=/dev/urandom", &format!("of={}", disk.text()), "bs=64k", "count=16", "oflag=direct"]);
    let after = device::stat(device.whole).expect("there");
    assert_eq!(after.sectors_written - before.sectors_written, 2048);
    assert!(after.writes > before.writes);
    assert_eq!(device::inflight(device.whole).expect("there"), (0, 0));
    assert!(device::iostats_on(device.whole).expect("there"));
}

#[test]
fn partitions_swap_and_filesystems_of_a_disk_are_found() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let disk = Loop::create(dir.path(), "disk.img", 96 << 20);
    let data = Part::add(&disk, 1, 2048, 64 << 11);
    let swap = Part::add(&disk, 2, 2048 + (64 << 11), 16 << 11);
    run("mkswap", &[&swap.path.display().to_string()]);
    let mounted = Mounted::format(&data.path, "ext4", &dir.path().join("data"));

    let whole = inspect(&disk.path).expect("a device");
    let part = inspect(&data.path).expect("a device");
    assert!(part.is_partition() && part.whole == whole.dev && part.start_sector == 2048);
    let identity = StableIdentity::of(&part).expect("has a place");
    assert!(matches!(&identity, StableIdentity::PartitionPlace { number: 1, start_sector: 2048, .. }));
    assert_eq!(find(&identity).expect("unambiguous").expect("there").dev, part.dev);

    let found = survey(&[whole.clone(), part]).expect("readable");
    assert_eq!(found.filesystems.len(), 1);
    assert_eq!(found.filesystems[0].mount_point, mounted.point);
    assert!(found.disks.iter().all(|disk| disk.has_filesystem));
    let start = 2048 + (64 << 11);
    let area = found.disks[0].swap.clone();
    assert_eq!(area.len(), 1);
    assert_eq!((area[0].start, area[0].end), (start + 8, start + (16 << 11)));
    assert!(found.disks[1].swap.is_empty());

    // The same place in use as a filesystem, with the stale signature still there, must be copied.
    let header = fs::read(&swap.path).expect("readable")[4086..4096].to_vec();
    run("mkfs.ext4", &["-q", "-F", &swap.path.display().to_string()]);
    let raw = File::options().write(true).open(&swap.path).expect("writable");
    raw.write_all_at(&header, 4086).expect("written");
    drop(raw);
    assert!(survey(&[whole]).expect("readable").disks[0].swap.is_empty());
    drop(mounted);
}

#[test]
fn btrfs_is_found_on_each_of_its_devices() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let one = Loop::create(dir.path(), "one.img", 160 << 20);
    let two = Loop::create(dir.path(), "two.img", 160 << 20);
    run("mkfs.btrfs", &["-q", "-f", "-d", "single", &one.text(), &two.text()]);
    let _ = Command::new("btrfs").args(["device", "scan", &two.text()]).output();
    let mounted = Mounted::mount(&one.path, &dir.path().join("data"));
    for disk in [&one, &two] {
        let found = survey(&[inspect(&disk.path).expect("a device")]).expect("readable");
        assert_eq!(found.filesystems.len(), 1, "on {}", disk.text());
        assert_eq!(found.filesystems[0].devices.len(), 2);
        assert_eq!(found.filesystems[0].mount_point, mounted.point);
    }
    // A loop file in a subvolume that is not mounted by itself: its device number is in no mountinfo.
    let inner_dir = mounted.point.join("sub");
    run("btrfs", &["subvolume", "create", &inner_dir.display().to_string()]);
    let inner = Loop::create(&inner_dir, "inner.img", 32 << 20);
    let above = Mounted::format(&inner.path, "ext4", &dir.path().join("above"));
    let found = survey(&[inspect(&two.path).expect("a device")]).expect("readable").filesystems;
    let order: Vec<_> = found.iter().map(|fs| fs.mount_point.clone()).collect();
    assert_eq!(order, [above.point.clone(), mounted.point.clone()]);
    drop(above);
    drop(inner);
    drop(mounted);
}

#[test]
fn filesystems_of_other_mount_namespaces_and_covered_ones_are_reached() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let disk = Loop::create(dir.path(), "disk.img", 32 << 20);
    run("mkfs.ext4", &["-q", "-F", &disk.text()]);
    let point = dir.path().join("hidden");
    fs::create_dir_all(&point).expect("can be made");
    let script = format!("mount {} {} && echo ready && read line", disk.text(), point.display());
    let mut other = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("can be started");
    let mut line = String::new();
    BufReader::new(other.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
    assert_eq!(line.trim(), "ready");
    let found = survey(&[inspect(&disk.path).expect("a device")]).expect("readable");
    let result =
        found.filesystems.first().map(|fs| (fs.mount_point.clone(), fs.open().map(|f| f.metadata())));
    let _ = other.stdin.take().expect("piped").write_all(b"end\n");
    let _ = other.wait();
    let (path, opened) = result.expect("found in the other namespace");
    assert!(
        path.starts_with("/proc") && path.ends_with(point.strip_prefix("/").expect("absolute")),
        "{path:?}"
    );
    let meta = opened.expect("reachable").expect("readable");
    assert_eq!(meta.ino(), 2, "the root of the ext4, not the directory below");
    assert!(survey(&[inspect(&disk.path).expect("a device")]).expect("readable").filesystems.is_empty());

    let below = Mounted::mount(&disk.path, &point);
    run("mount", &["-t", "tmpfs", "none", &point.display().to_string()]);
    let found = survey(&[inspect(&disk.path).expect("a device")]).expect("readable");
    let opened = found.filesystems[0].open();
    run("umount", &[&point.display().to_string()]);
    assert!(opened.is_err(), "a covered mount is told, not mistaken for what covers it");
    assert!(found.filesystems[0].open().is_ok());
    drop(below);
}

fn reader(disk: &Loop, options: SourceOptions) -> SourceReader {
    SourceReader::open(&inspect(&disk.path).expect("a device"), options).expect("opens")
}

#[test]
fn reads_every_block_once_and_pads_the_last() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let size = (24 << 20) + 512;
    let mut content = vec![0_u8; size];
    let mut state = 1_u32;
    for byte in &mut content {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    fs::write(dir.path().join("disk.img"), &content).expect("room");
    let disk = Loop::attach(&dir.path().join("disk.img"));
    let blocks = (size as u64).div_ceil(4096);
    let reader = reader(&disk, SourceOptions { readers: 4, memory_bytes: 4 << 20 });
    let mut job = reader.read_ranges([
        BlockRange::new(0, 3),
        BlockRange::new(3, 4000),
        BlockRange::new(4003, blocks - 4003),
    ]);
    let mut seen = vec![false; usize::try_from(blocks).expect("small")];
    content.resize(seen.len() * 4096, 0);
    while let Some(run) = job.next_blocking() {
        let run = run.expect("readable");
        let start = usize::try_from(run.range.start.0).expect("small");
        assert!(run.buffer.len() as u64 == run.range.bytes() && run.buffer.len() <= 1 << 20);
        assert!(run.buffer[..] == content[start * 4096..start * 4096 + run.buffer.len()]);
        for block in &mut seen[start..start + run.buffer.len() / 4096] {
            assert!(!std::mem::replace(block, true), "read twice");
        }
    }
    assert!(seen.iter().all(|block| *block));
}

#[test]
fn a_shrunk_device_and_a_cancelled_job_end() {
    let Some(_machine) = machine() else { return };
    let dir = scratch();
    let disk = Loop::create(dir.path(), "disk.img", 32 << 20);
    let reader = reader(&disk, SourceOptions { readers: 2, memory_bytes: 2 << 20 });
    let start = Instant::now();
    let job = reader.read_ranges((0..1_000_000_u64).map(|n| BlockRange::new(n * 2 % 8000, 1)));
    drop(job);
    assert!(start.elapsed() < Duration::from_millis(500), "cancelling does not wait");
    let file = File::options().write(true).open(dir.path().join("disk.img")).expect("there");
    file.set_len(16 << 20).expect("shrinks");
    run("losetup", &["-c", &disk.text()]);
    let mut job = reader.read_ranges([BlockRange::new(0, 8192)]);
    let mut errors = Vec::new();
    while let Some(result) = job.next_blocking() {
        errors.extend(result.err());
    }
    let Some(SourceError::Shrunk { size_bytes, .. }) = errors.first() else { panic!("{errors:?}") };
    assert!(errors.iter().all(SourceError::is_fatal));
    assert_eq!(*size_bytes, 16 << 20);
    assert_eq!(reader.size_now().expect("there"), 16 << 20);
}
