//! The harness on real devices: what it makes works, what it made goes, and what is wrong is noticed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use highwater_tests::{
    Arena, Backing, Census, Churn, Daemon, FileSystem, Fio, FioKind, Freeze, FrozenCopy, LoopDisk, Mounted,
    Sectors, Zram, churn, command, compare_devices, freeze,
};

type Test = anyhow::Result<()>;

#[test]
fn loop_disks_take_and_keep_sectors() -> Test {
    let _arena = Arena::enter("loop")?;
    for backing in [Backing::File, Backing::Tmpfs] {
        let disk = LoopDisk::new(backing, 32 << 20)?;
        let sectors = Sectors::new(1, 4096);
        let file = sectors.open(disk.path())?;
        for first in [0, 100, 8191] {
            sectors.write(&file, 0, first, 1)?;
        }
        churn::discard(disk.path(), 100 * 4096, 4096)?;
        sectors.forget(100, 1);
        assert_eq!(sectors.verify(disk.path(), sectors.sequence())?, []);
    }
    Ok(())
}

#[test]
fn partitions_are_windows_of_their_disk() -> Test {
    let _arena = Arena::enter("partition")?;
    let mut disk = LoopDisk::new(Backing::Tmpfs, 32 << 20)?;
    let first = disk.add_partition(2048, 8192)?;
    let second = disk.add_partition(16384, 8192)?;
    let sectors = Sectors::new(2, 512);
    let file = sectors.open(&second)?;
    sectors.write(&file, 0, 0, 8)?;
    drop(file);
    let (whole, copy) = (FrozenCopy::of(disk.path())?, FrozenCopy::of(&second)?);
    let bytes = fs::read(whole.path())?;
    assert_eq!(bytes[16384 * 512..(16384 + 8192) * 512], fs::read(copy.path())?[..]);
    assert_eq!(compare_devices(&first, &second, &[])?, [0]);
    Ok(())
}

#[test]
fn zram_is_made_and_removed() -> Test {
    let _arena = Arena::enter("zram")?;
    let zram = Zram::new(16 << 20)?;
    let sectors = Sectors::new(3, 4096);
    let file = sectors.open(zram.path())?;
    sectors.write(&file, 0, 5, 2)?;
    drop(file);
    assert_eq!(sectors.verify(zram.path(), sectors.sequence())?, []);
    Ok(())
}

#[test]
fn a_copy_made_while_frozen_is_the_device_and_mounts() -> Test {
    let _arena = Arena::enter("frozen")?;
    for kind in FileSystem::ALL {
        let disk = LoopDisk::new(Backing::Tmpfs, kind.size_bytes_min())?;
        let mounted = Mounted::make(kind, disk.path())?;
        let work = Churn::start(mounted.path(), 11)?;
        std::thread::sleep(Duration::from_millis(300));
        let copy = {
            let _freeze = Freeze::new(mounted.path())?;
            let copy = FrozenCopy::of(disk.path())?;
            assert_eq!(compare_devices(disk.path(), copy.path(), &[])?, Vec::<u64>::new(), "{kind:?}");
            copy
        };
        let counts = work.stop()?;
        fs::write(mounted.path().join("after"), "the copy does not have this")?;
        assert!(counts.total() > 20, "{kind:?}: {counts:?}");
        drop(mounted);
        assert!(
            !compare_devices(disk.path(), copy.path(), &[])?.is_empty(),
            "{kind:?}: nothing was written after"
        );
        kind.replay_and_check(copy.path())?;
    }
    Ok(())
}

#[test]
fn fio_writes_in_every_kind() -> Test {
    let _arena = Arena::enter("fio")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 128 << 20)?;
    let mounted = Mounted::make(FileSystem::Ext4, disk.path())?;
    for kind in [FioKind::Direct, FioKind::Buffered, FioKind::Mmap] {
        let file = mounted.path().join(format!("{kind:?}"));
        let report = Fio::new(&file, kind, 16 << 20).runtime_s(1).jobs(2).run()?;
        assert!(report.writes > 100, "{kind:?}: {report:?}");
    }
    Ok(())
}

#[test]
fn a_mount_left_frozen_by_a_panic_is_thawed_and_gone() -> Test {
    let _arena = Arena::enter("panic")?;
    let before = Census::take();
    let result = std::panic::catch_unwind(|| {
        let disk = LoopDisk::new(Backing::Tmpfs, 64 << 20).unwrap();
        let mounted = Mounted::make(FileSystem::Ext4, disk.path()).unwrap();
        // As a daemon that died would leave it: frozen, with nobody holding it open.
        command::run("fsfreeze", &["--freeze", &*mounted.path().to_string_lossy()]).unwrap();
        assert!(freeze::is_frozen(mounted.path()).unwrap());
        panic!("on purpose");
    });
    assert!(result.is_err());
    assert_eq!(Census::left_over(&before, &Census::take()), Vec::<String>::new());
    Ok(())
}

#[test]
fn what_is_left_behind_is_noticed() -> Test {
    let arena = Arena::enter("leak")?;
    let leaked = arena.dir().join("mount");
    fs::create_dir(&leaked)?;
    let before = Census::take();
    let name = leaked.to_string_lossy();
    command::run("mount", &["-t", "tmpfs", "leak", &*name])?;
    let left = Census::left_over(&before, &Census::take());
    command::run("umount", &[&*name])?;
    assert_eq!(left, [format!("mount {name}")]);
    assert!(!Path::new(arena.bpf_dir()).exists());
    Ok(())
}

#[test]
fn a_daemons_orphan_is_noticed() -> Test {
    let arena = Arena::enter("orphan")?;
    let before = Census::take();
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "sleep 60 & echo started $!; wait"]);
    let mut daemon = Daemon::spawn("parent", arena.dir(), command)?;
    daemon.wait_for("started", Duration::from_secs(10))?;
    let log = daemon.log();
    let orphan: i32 = log.split_whitespace().last().unwrap_or_default().parse()?;
    daemon.kill_9()?;
    let left = Census::left_over(&before, &Census::take());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(orphan), nix::sys::signal::Signal::SIGKILL)?;
    assert_eq!(left, [format!("process {orphan} sleep")]);
    Ok(())
}
