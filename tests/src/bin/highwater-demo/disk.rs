//! The disk of the demo: a loop device on a sparse file with a mounted ext4, which can be destroyed for good.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::interrupt::{report, retry};
use highwater_tests::{FileSystem, command};

/// See the module. Dropped: unmounted, detached; its file goes with its directory.
pub struct Disk {
    image: PathBuf,
    mount_point: PathBuf,
    device: Option<PathBuf>,
    mounted: bool,
}

impl Disk {
    /// Makes it in a directory.
    pub fn make(dir: &Path, size_bytes: u64) -> Result<Self> {
        let (image, mount_point) = (dir.join("disk.img"), dir.join("data"));
        File::create(&image)?.set_len(size_bytes)?;
        fs::create_dir(&mount_point)?;
        let mut disk = Disk { image, mount_point, device: None, mounted: false };
        let image = disk.image.to_string_lossy().into_owned();
        let attach = |direct| command::run("losetup", &["--find", "--show", direct, &image]);
        let device = attach("--direct-io=on").or_else(|_| attach("--direct-io=off"))?;
        disk.device = Some(device.clone().into());
        FileSystem::Ext4.make(Path::new(&device))?;
        command::run("mount", &["-t", "ext4", &device, &disk.mount_point.to_string_lossy()])?;
        disk.mounted = true;
        Ok(disk)
    }

    /// The device.
    pub fn device(&self) -> Result<&Path> {
        self.device.as_deref().context("the disk is gone")
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Bytes that its file really occupies: what was ever written.
    pub fn used_bytes(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(fs::metadata(&self.image)?.blocks() * 512)
    }

    /// Destroys it under its users: every byte of it is gone, and so is the device as soon as nobody holds it open.
    pub fn destroy(&mut self) -> Result<()> {
        let file = File::options().write(true).open(&self.image)?;
        file.set_len(0)?;
        file.sync_all()?;
        fs::remove_file(&self.image)?;
        if self.mounted {
            command::run("umount", &["--lazy", &self.mount_point.to_string_lossy()])?;
            self.mounted = false;
        }
        if let Some(device) = self.device.take() {
            command::run("losetup", &["--detach", &device.to_string_lossy()])?;
        }
        ensure!(!self.image.exists(), "{} is still there", self.image.display());
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            let place = self.mount_point.to_string_lossy().into_owned();
            report(retry(|| command::run("umount", &[&place]).map(drop)));
        }
        if let Some(device) = self.device.take() {
            report(command::run("losetup", &["--detach", &device.to_string_lossy()]).map(drop));
        }
    }
}
