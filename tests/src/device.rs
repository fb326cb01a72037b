//! Block devices made for one test: loop on a file or on tmpfs, with partitions if wanted, and zram.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

use crate::command;

/// How long to try to release a device that something still holds open (udev's probes, a dying process).
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a loop device's bytes lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A sparse file on the machine's own file system, with direct I/O where it can.
    File,
    /// A file on a tmpfs of its own: the fastest, and never written to disk.
    Tmpfs,
}

/// A loop device. Dropped: its partitions, itself, its backing file.
pub struct LoopDisk {
    path: PathBuf,
    partitions: Vec<PathBuf>,
    image: PathBuf,
    // Dropped after the device is detached; the mount before its directory.
    _tmpfs: Option<TmpfsMount>,
    _dir: TempDir,
    size_bytes: u64,
}

impl LoopDisk {
    /// Makes a disk of zeros.
    pub fn new(backing: Backing, size_bytes: u64) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hwtest-loop-").tempdir_in("/var/tmp")?;
        let tmpfs = match backing {
            Backing::File => None,
            Backing::Tmpfs => Some(TmpfsMount::new(dir.path())?),
        };
        let image = dir.path().join("image");
        File::create(&image)?.set_len(size_bytes)?;
        let direct = if backing == Backing::File { "--direct-io=on" } else { "--direct-io=off" };
        let attach = |direct: &str| {
            let image = image.to_string_lossy();
            command::run("losetup", &["--find", "--show", "--partscan", direct, &image])
        };
        let path = attach(direct).or_else(|_| attach("--direct-io=off"))?;
        Ok(LoopDisk {
            path: path.into(),
            partitions: Vec::new(),
            image,
            _tmpfs: tmpfs,
            _dir: dir,
            size_bytes,
        })
    }

    /// The device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The backing file. What is written to it does not pass the block device: for damage on purpose.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Adds the next partition (no partition table is written: some kernels cannot read one) and returns its path.
    pub fn add_partition(&mut self, start_sector: u64, sectors: u64) -> Result<PathBuf> {
        let number = self.partitions.len() + 1;
        let disk = self.path.to_string_lossy().into_owned();
        command::run(
            "addpart",
            &[disk.clone(), number.to_string(), start_sector.to_string(), sectors.to_string()],
        )?;
        let path = PathBuf::from(format!("{disk}p{number}"));
        self.partitions.push(path.clone());
        ensure_node(&path)?;
        Ok(path)
    }

    /// Deletes the last partition and makes it again at another place, under the same number; its device's number is the same
    /// too, unless somebody else took it.
    pub fn move_last_partition(&mut self, start_sector: u64, sectors: u64) -> Result<PathBuf> {
        let path = self.partitions.last().context("no partition")?.clone();
        let number = fs::metadata(&path)?.rdev();
        for _ in 0..10 {
            self.delete_last_partition()?;
            // The kernel gives the number back a moment later.
            thread::sleep(Duration::from_millis(100));
            self.add_partition(start_sector, sectors)?;
            if fs::metadata(&path)?.rdev() == number {
                break;
            }
        }
        Ok(path)
    }

    fn delete_last_partition(&mut self) -> Result<()> {
        let (disk, number) = (self.path.to_string_lossy().into_owned(), self.partitions.len().to_string());
        let deleted = retry(|| command::run("delpart", &[disk.as_str(), &number]).map(drop));
        if let Some(node) = self.partitions.pop() {
            // Ours by mknod, or the kernel's, which it has removed.
            fs::remove_file(node).ok();
        }
        deleted
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let disk = self.path.to_string_lossy().into_owned();
        while !self.partitions.is_empty() {
            report(self.delete_last_partition());
        }
        report(command::run("losetup", &["--detach", &disk]).map(drop));
        // Detaching a device still open only marks it; wait, so that the backing can go.
        let name = self.path.file_name().map(PathBuf::from).unwrap_or_default();
        let bound = Path::new("/sys/block").join(name).join("loop/backing_file");
        report(retry(|| if bound.exists() { bail!("{disk} is still in use") } else { Ok(()) }));
    }
}

/// A tmpfs mounted on a directory.
struct TmpfsMount(PathBuf);

impl TmpfsMount {
    fn new(dir: &Path) -> Result<Self> {
        command::run("mount", &["-t", "tmpfs", "-o", "size=90%", "highwater-test", &dir.to_string_lossy()])?;
        Ok(TmpfsMount(dir.to_path_buf()))
    }
}

impl Drop for TmpfsMount {
    fn drop(&mut self) {
        let dir = self.0.to_string_lossy();
        report(retry(|| command::run("umount", &[&*dir]).map(drop)));
    }
}

/// A zram device: bio-based. Dropped: reset and removed.
pub struct Zram {
    path: PathBuf,
    number: u32,
    size_bytes: u64,
}

impl Zram {
    /// Makes a device of zeros; fails where the kernel has no zram.
    pub fn new(size_bytes: u64) -> Result<Self> {
        let number: u32 = fs::read_to_string("/sys/class/zram-control/hot_add")
            .context("this kernel offers no zram")?
            .trim()
            .parse()?;
        let zram = Zram { path: PathBuf::from(format!("/dev/zram{number}")), number, size_bytes };
        fs::write(format!("/sys/block/zram{number}/disksize"), size_bytes.to_string())
            .context("cannot set the size of the zram device")?;
        ensure_node(&zram.path)?;
        Ok(zram)
    }

    /// The device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let number = self.number;
        report(retry(|| {
            fs::write(format!("/sys/block/zram{number}/reset"), "1")?;
            fs::write("/sys/class/zram-control/hot_remove", number.to_string())?;
            Ok(())
        }));
        fs::remove_file(&self.path).ok();
    }
}

/// Makes a device's node if nothing else does (no udev, no devtmpfs).
fn ensure_node(path: &Path) -> Result<()> {
    let name = path.file_name().context("a device has a name")?;
    let numbers = Path::new("/sys/class/block").join(name).join("dev");
    let numbers =
        fs::read_to_string(&numbers).with_context(|| format!("the kernel has no {}", path.display()))?;
    let deadline = Instant::now() + Duration::from_millis(200);
    while Instant::now() < deadline {
        if path.exists() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let (major, minor) = numbers.trim().split_once(':').context("device numbers are major:minor")?;
    match mknod(
        path,
        SFlag::S_IFBLK,
        Mode::from_bits_truncate(0o600),
        makedev(major.parse()?, minor.parse()?),
    ) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot make {}", path.display())),
    }
}

/// Tries until it works or the time is over.
pub(crate) fn retry(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
}

/// A destructor cannot fail; what it could not release shows here and in the census at the end of the test.
pub(crate) fn report(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("harness: {error:#}");
    }
}
