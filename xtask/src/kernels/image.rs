//! A kernel's files: packages unpacked without being installed, and the uncompressed image taken out of them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Kernel;
use super::apt::Archive;
use crate::sh;

/// The largest kernel file accepted; today's are below 120 MiB uncompressed.
const IMAGE_BYTES_MAX: usize = 512 << 20;

/// Unpacks the newest kernel of a series unless one is there, and returns its release.
///
/// The file `release` is written last: without it, an interrupted run starts over.
pub fn unpack(archive: &mut Archive, series: &str, dir: &Path) -> Result<String> {
    let marker = dir.join("release");
    if let Ok(release) = fs::read_to_string(&marker) {
        return Ok(release);
    }
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    let image = archive.newest_image(series)?;
    let packages = archive.with_parts(image)?;
    let debs = dir.join("debs");
    let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    sh::step(format_args!("fetching {}", names.join(", ")));
    archive.download(&packages, &debs)?;
    let files = dir.join("files");
    for deb in fs::read_dir(&debs)? {
        sh::run(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&files))?;
    }
    fs::remove_dir_all(&debs)?;
    let modules = modules_dir(&files)?;
    let release = modules.file_name().context("a release has a name")?.to_string_lossy().into_owned();
    fs::write(&marker, &release)?;
    Ok(release)
}

/// The directory of the modules in unpacked packages: `lib/modules/<release>`, below `usr` or not.
pub fn modules_dir(files: &Path) -> Result<PathBuf> {
    for base in ["lib/modules", "usr/lib/modules"] {
        if let Some(entry) = fs::read_dir(files.join(base)).into_iter().flatten().flatten().next() {
            return Ok(entry.path());
        }
    }
    bail!("no modules in {}", files.display())
}

/// Takes the uncompressed kernel out of its self-extracting image: it boots fastest under emulation.
pub fn extract_vmlinux(kernel: &Kernel) -> Result<()> {
    let vmlinux = kernel.vmlinux();
    if vmlinux.is_file() {
        return Ok(());
    }
    let path = find_image(kernel)?;
    let image = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let payload = payload(&image).with_context(|| format!("{} is no bzImage", path.display()))?;
    let (packed, fresh) = (kernel.dir.join("payload"), kernel.dir.join("vmlinux.new"));
    fs::write(&packed, payload.bytes)?;
    // The length that follows the stream makes the unpackers end unhappily; the length itself is the check.
    let _ = Command::new(payload.unpacker[0])
        .args(&payload.unpacker[1..])
        .stdin(File::open(&packed)?)
        .stdout(File::create(&fresh)?)
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", payload.unpacker[0]))?;
    let length = fs::metadata(&fresh)?.len();
    if length != payload.unpacked_bytes {
        bail!("{} gave {length} bytes of {}", payload.unpacker[0], payload.unpacked_bytes);
    }
    fs::remove_file(&packed)?;
    fs::rename(&fresh, &vmlinux)?;
    Ok(())
}

/// The self-extracting image.
pub fn find_image(kernel: &Kernel) -> Result<PathBuf> {
    let files = kernel.dir.join("files");
    let boot = files.join("boot").join(format!("vmlinuz-{}", kernel.release));
    let beside = modules_dir(&files)?.join("vmlinuz");
    let Some(found) = [boot, beside].into_iter().find(|path| path.is_file()) else {
        bail!("no kernel image in {}", files.display());
    };
    Ok(found)
}

struct Payload<'a> {
    bytes: &'a [u8],
    unpacker: &'static [&'static str],
    unpacked_bytes: u64,
}

/// The compressed kernel in a bzImage, as the boot protocol tells (`payload_offset`, `payload_length`).
fn payload(image: &[u8]) -> Option<Payload<'_>> {
    if image.len() > IMAGE_BYTES_MAX || image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let offset = (setup_sectors + 1) * 512 + u32_at(image, 0x248)? as usize;
    let bytes = image.get(offset..offset.checked_add(u32_at(image, 0x24c)? as usize)?)?;
    let unpacker: &[&str] = match bytes {
        [0x1f, 0x8b, ..] => &["gzip", "-dc"],
        [0xfd, b'7', b'z', b'X', b'Z', ..] => &["xz", "-dc", "--single-stream"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dcq"],
        [0x02, 0x21, 0x4c, 0x18, ..] => &["lz4", "-dcq"],
        _ => return None,
    };
    let unpacked_bytes = u64::from(u32_at(bytes, bytes.len().checked_sub(4)?)?);
    Some(Payload { bytes, unpacker, unpacked_bytes })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(magic: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 512 * 5];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 3;
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&100u32.to_le_bytes());
        let start = 512 * 4 + 16;
        image[start..start + magic.len()].copy_from_slice(magic);
        image[start + 96..start + 100].copy_from_slice(&7u32.to_le_bytes());
        image
    }

    #[test]
    fn the_payload_is_found_by_the_header() {
        let image = image(&[0xfd, b'7', b'z', b'X', b'Z', 0]);
        let payload = payload(&image).unwrap();
        assert_eq!((payload.unpacker[0], payload.unpacked_bytes, payload.bytes.len()), ("xz", 7, 100));
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(payload(&[]).is_none());
        assert!(payload(&image(b"unknown")).is_none());
        let mut cut = image(&[0x1f, 0x8b]);
        cut.truncate(512 * 4 + 20);
        assert!(payload(&cut).is_none());
    }
}
