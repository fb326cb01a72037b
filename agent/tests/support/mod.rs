//! Real devices for tests: loop devices on a tmpfs, mounted filesystems, all undone when dropped (also by a panic).
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod fake_guest;

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

static SERIAL: Mutex<()> = Mutex::new(());

/// One test at a time: they share the machine's devices. `None`: not root, the test is skipped.
pub fn machine() -> Option<MutexGuard<'static, ()>> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root for loop devices and mounts");
        return None;
    }
    Some(SERIAL.lock().unwrap_or_else(PoisonError::into_inner))
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("can be started");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A directory on a tmpfs, so that freezing never touches the disk the tests run from.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("highwater-").tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm")
}

/// An attached loop device.
pub struct Loop {
    pub path: PathBuf,
}

impl Loop {
    pub fn attach(file: &Path) -> Self {
        let path = run("losetup", &["--find", "--show", &file.display().to_string()]);
        Self { path: path.into() }
    }
    /// A new sparse file of so many bytes, attached.
    pub fn create(dir: &Path, name: &str, bytes: u64) -> Self {
        let file = dir.join(name);
        File::create(&file).and_then(|f| f.set_len(bytes)).expect("room in the directory");
        Self::attach(&file)
    }
    pub fn text(&self) -> String {
        self.path.display().to_string()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).output();
    }
}

/// A mounted filesystem.
pub struct Mounted {
    pub point: PathBuf,
}

impl Mounted {
    pub fn mount(device: &Path, point: &Path) -> Self {
        std::fs::create_dir_all(point).expect("can be made");
        run("mount", &[&device.display().to_string(), &point.display().to_string()]);
        Self { point: point.to_owned() }
    }
    pub fn format(device: &Path, fs_type: &str, point: &Path) -> Self {
        let force = if fs_type == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{fs_type}"), &["-q", force, &device.display().to_string()]);
        Self::mount(device, point)
    }
    /// Writes a file and waits until it is on the disk; says whether that took less than the limit.
    pub fn writes_within(&self, limit: Duration) -> bool {
        let path = self.point.join("probe");
        let (done, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let written = std::fs::write(&path, b"probe").and_then(|()| File::open(&path)?.sync_all());
            let _ = done.send(written.is_ok());
        });
        wait.recv_timeout(limit) == Ok(true)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        thaw(&self.point);
        for _ in 0..20 {
            let done = Command::new("umount").arg(&self.point).output();
            if done.is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = Command::new("umount").arg("-l").arg(&self.point).output();
    }
}

pub fn freeze(point: &Path) -> std::io::Result<()> {
    let file = File::open(point)?;
    // SAFETY: FIFREEZE ignores its argument.
    if unsafe { libc::ioctl(file.as_raw_fd(), 0xC004_5877, 0) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

pub fn thaw(point: &Path) -> bool {
    // SAFETY: FITHAW ignores its argument.
    File::open(point).is_ok_and(|file| unsafe { libc::ioctl(file.as_raw_fd(), 0xC004_5878, 0) } == 0)
}

/// Asks the kernel, without changing the answer.
pub fn is_frozen(point: &Path) -> bool {
    match freeze(point) {
        Ok(()) => {
            thaw(point);
            false
        }
        Err(error) => error.raw_os_error() == Some(libc::EBUSY),
    }
}

pub fn eventually(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    condition()
}
