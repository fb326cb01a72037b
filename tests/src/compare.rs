//! Copies of devices made past all caches, and block-by-block comparison.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::buffer::{Aligned, open_direct};

/// The unit of comparison, as of tracking.
pub const BLOCK_BYTES: u64 = 4096;
const CHUNK_BYTES: usize = 1 << 20;

/// A device's content in a sparse file. Dropped: removed.
pub struct FrozenCopy {
    file: PathBuf,
    _dir: TempDir,
}

impl FrozenCopy {
    /// Copies a device with O_DIRECT. It is a state of the device only if nothing writes meanwhile: the caller freezes.
    pub fn of(device: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hwtest-copy-").tempdir_in("/var/tmp")?;
        let file = dir.path().join("copy");
        copy_device(device, &file)?;
        Ok(FrozenCopy { file, _dir: dir })
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        &self.file
    }
}

/// Copies a device or file into a new sparse file.
pub fn copy_device(from: &Path, to: &Path) -> Result<()> {
    let source = open_direct(from, false).with_context(|| format!("cannot open {}", from.display()))?;
    let size = size_bytes(from)?;
    let target = File::create(to)?;
    target.set_len(size)?;
    let mut buffer = Aligned::zeroed(CHUNK_BYTES);
    let mut offset = 0;
    while offset < size {
        let count = read_at_most(&source, &mut buffer, offset, size)?;
        if buffer[..count].iter().any(|byte| *byte != 0) {
            target.write_all_at(&buffer[..count], offset)?;
        }
        offset += count as u64;
    }
    Ok(())
}

/// The numbers of the 4 KiB blocks in which two devices or files differ, outside the ignored ranges of blocks.
///
/// Different sizes are an error and no list.
pub fn compare_devices(a: &Path, b: &Path, ignore: &[Range<u64>]) -> Result<Vec<u64>> {
    let size = size_bytes(a)?;
    let other = size_bytes(b)?;
    if size != other {
        bail!("{} has {size} bytes, {} has {other}", a.display(), b.display());
    }
    let (file_a, file_b) = (open_direct(a, false)?, open_direct(b, false)?);
    let (mut buffer_a, mut buffer_b) = (Aligned::zeroed(CHUNK_BYTES), Aligned::zeroed(CHUNK_BYTES));
    let mut differing = Vec::new();
    let mut offset = 0;
    while offset < size {
        let count = read_at_most(&file_a, &mut buffer_a, offset, size)?;
        let count_b = read_at_most(&file_b, &mut buffer_b, offset, size)?;
        if count != count_b {
            bail!("a read at byte {offset} gave {count} bytes of one and {count_b} of the other");
        }
        if buffer_a[..count] != buffer_b[..count] {
            let blocks_a = buffer_a[..count].chunks(BLOCK_BYTES as usize);
            let blocks_b = buffer_b[..count].chunks(BLOCK_BYTES as usize);
            for (block, (in_a, in_b)) in (offset / BLOCK_BYTES..).zip(blocks_a.zip(blocks_b)) {
                if in_a != in_b && !ignore.iter().any(|range| range.contains(&block)) {
                    differing.push(block);
                }
            }
        }
        offset += count as u64;
    }
    Ok(differing)
}

/// How one block of two files differs, for a message: which bytes, and what begins there in both.
///
/// # Errors
/// One of them cannot be read.
pub fn difference(a: &Path, b: &Path, block: u64) -> Result<String> {
    let read = |path: &Path| -> Result<Vec<u8>> {
        let mut content = vec![0; BLOCK_BYTES as usize];
        let count = File::open(path)?.read_at(&mut content, block * BLOCK_BYTES)?;
        content.truncate(count);
        Ok(content)
    };
    let (a, b) = (read(a)?, read(b)?);
    let differing: Vec<usize> = (0..a.len().min(b.len())).filter(|at| a[*at] != b[*at]).collect();
    let (Some(first), Some(last)) = (differing.first(), differing.last()) else {
        return Ok("no byte differs now".into());
    };
    let begins =
        |content: &[u8]| content[*first..].iter().take(24).map(|b| format!("{b:02x}")).collect::<String>();
    Ok(format!("{} bytes of {first}..={last}, first {} for {}", differing.len(), begins(&b), begins(&a)))
}

/// Fills the buffer from `offset`, up to the end. Direct reads must keep their length a multiple of the sector.
fn read_at_most(file: &File, buffer: &mut Aligned, offset: u64, size: u64) -> Result<usize> {
    let want = usize::try_from(size - offset).unwrap_or(usize::MAX).min(buffer.len());
    let mut done = 0;
    while done < want {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => bail!("the device ends at byte {} of {size}", offset + done as u64),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read at byte {offset}")),
        }
        // A direct read that came short cannot go on from an unaligned place; it ends at the end.
        if !done.is_multiple_of(512) {
            break;
        }
    }
    Ok(done.min(want))
}

/// The size of a device or a file.
pub fn size_bytes(path: &Path) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(file.seek(SeekFrom::End(0))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_files(size: u64) -> (TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        File::create(&a).unwrap().set_len(size).unwrap();
        File::create(&b).unwrap().set_len(size).unwrap();
        (dir, a, b)
    }

    #[test]
    fn the_differing_blocks_are_found_and_the_ignored_left_out() {
        let (_dir, a, b) = two_files((3 << 20) + 512);
        let file = File::options().write(true).open(&a).unwrap();
        for block in [0, 255, 256, 700] {
            file.write_all_at(&[1], block * BLOCK_BYTES + 17).unwrap();
        }
        file.write_all_at(&[1], (3 << 20) + 511).unwrap();
        assert_eq!(compare_devices(&a, &b, &[]).unwrap(), [0, 255, 256, 700, 768]);
        assert_eq!(compare_devices(&a, &b, &[200..300, 768..769]).unwrap(), [0, 700]);
    }

    #[test]
    fn a_copy_is_equal_and_sparse() {
        use std::os::unix::fs::MetadataExt;
        let (dir, a, _) = two_files(64 << 20);
        File::options().write(true).open(&a).unwrap().write_all_at(&[7; 5000], 40 << 20).unwrap();
        let copy = dir.path().join("copy");
        copy_device(&a, &copy).unwrap();
        assert!(compare_devices(&a, &copy, &[]).unwrap().is_empty());
        assert!(copy.metadata().unwrap().blocks() * 512 <= 2 << 20);
    }

    #[test]
    fn different_sizes_are_an_error() {
        let (_dir, a, b) = two_files(8192);
        File::options().write(true).open(&a).unwrap().set_len(4096).unwrap();
        assert!(compare_devices(&a, &b, &[]).is_err());
    }
}
