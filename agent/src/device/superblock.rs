//! Identities that stand on the medium: a partition's UUID (GPT, MBR) and an md array's. Only for what `/sys` does not tell.
//! Everything read is untrusted: lengths are bounded, and what does not parse is simply not an identity.

use super::{DevNumber, node, sysfs};
use std::{cell::Cell, fs::File, io, os::unix::fs::FileExt, path::Path};

const GPT_ENTRIES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES: usize = 128;

/// `PARTUUID` of the partition that starts at `start_sector` of a whole disk.
///
/// # Errors
/// It could not be asked for; see [`sysfs::asked`].
pub(super) fn partition_uuid(whole: DevNumber, number: u64, start_sector: u64) -> io::Result<Option<String>> {
    let Some(dir) = sysfs::asked(sysfs::dir(whole))? else { return Ok(None) };
    let block_bytes = sysfs::asked(sysfs::read_u64(&dir, "queue/logical_block_size"))?;
    let (Some(block_bytes), Some(disk)) = (block_bytes, Medium::open(whole)?) else { return Ok(None) };
    let uuid = gpt_uuid(&disk, block_bytes, start_sector).or_else(|| mbr_uuid(&disk, number));
    disk.unless_troubled(uuid)
}

/// A medium that is read for what it says of itself, and what kept it from being read.
struct Medium {
    file: File,
    trouble: Cell<Option<io::Error>>,
}

impl Medium {
    fn open(dev: DevNumber) -> io::Result<Option<Self>> {
        Ok(node::open(dev)?.map(|file| Self { file, trouble: Cell::new(None) }))
    }
    /// What was found out, if nothing kept it from being read: then it says nothing.
    fn unless_troubled<T>(self, found: T) -> io::Result<T> {
        self.trouble.into_inner().map_or(Ok(found), Err)
    }
}

pub(super) fn gpt_uuid(disk: &impl ReadAt, block_bytes: u64, start_sector: u64) -> Option<String> {
    let mut header = [0; 92];
    disk.read_at(&mut header, block_bytes)?;
    if &header[..8] != b"EFI PART" {
        return None;
    }
    let entries_at = le64(&header, 72)?.checked_mul(block_bytes)?;
    let count = le32(&header, 80)?.min(GPT_ENTRIES_MAX);
    let stride = u64::from(le32(&header, 84)?);
    if stride < GPT_ENTRY_BYTES as u64 || stride > 4096 {
        return None;
    }
    let mut entry = [0; GPT_ENTRY_BYTES];
    for index in 0..u64::from(count) {
        disk.read_at(&mut entry, entries_at.checked_add(index * stride)?)?;
        let used = entry[..16].iter().any(|byte| *byte != 0);
        if used && le64(&entry, 32)?.checked_mul(block_bytes)? == start_sector.checked_mul(512)? {
            return Some(mixed_endian(entry.get(16..32)?));
        }
    }
    None
}

pub(super) fn mbr_uuid(disk: &impl ReadAt, number: u64) -> Option<String> {
    let mut sector = [0; 512];
    disk.read_at(&mut sector, 0)?;
    let signature = le32(&sector, 440)?;
    if sector[510..] != [0x55, 0xaa] || signature == 0 || number == 0 {
        return None;
    }
    Some(format!("{signature:08x}-{number:02x}"))
}

/// The set UUID of a native md array (superblocks 1.0 to 1.2), read from one of its members.
///
/// # Errors
/// As [`partition_uuid`].
pub(super) fn md_uuid(md_dir: &Path) -> io::Result<Option<String>> {
    let version = sysfs::some(md_dir, "md/metadata_version")?;
    let member = sysfs::linked(md_dir, "slaves")?.into_iter().next();
    let (Some(version), Some(member)) = (version, member) else { return Ok(None) };
    let Some(dir) = sysfs::asked(sysfs::dir(member))? else { return Ok(None) };
    let sectors = sysfs::asked(sysfs::read_u64(&dir, "size"))?;
    let (Some(sectors), Some(disk)) = (sectors, Medium::open(member)?) else { return Ok(None) };
    let uuid = md_uuid_of(&disk, &version, sectors);
    disk.unless_troubled(uuid)
}

fn md_uuid_of(disk: &impl ReadAt, version: &str, sectors: u64) -> Option<String> {
    let at = match version {
        "1.0" => (sectors.checked_sub(16)? & !7) * 512,
        "1.1" => 0,
        "1.2" => 4096,
        _ => return None,
    };
    let mut head = [0; 32];
    disk.read_at(&mut head, at)?;
    if le32(&head, 0)? != 0xa92b_4efc {
        return None;
    }
    Some(hex(head.get(16..32)?))
}

/// A seam for tests.
pub(super) trait ReadAt {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Option<()>;
}
impl ReadAt for Medium {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Option<()> {
        match self.file.read_exact_at(buffer, offset) {
            Ok(()) => Some(()),
            // Behind its end.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => {
                self.trouble.set(Some(error));
                None
            }
        }
    }
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// GPT stores the first three groups of a UUID little-endian.
fn mixed_endian(b: &[u8]) -> String {
    let reversed = |range: std::ops::Range<usize>| hex(&b[range].iter().rev().copied().collect::<Vec<_>>());
    format!("{}-{}-{}-{}-{}", reversed(0..4), reversed(4..6), reversed(6..8), hex(&b[8..10]), hex(&b[10..16]))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ReadAt for Vec<u8> {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> Option<()> {
            let start = usize::try_from(offset).ok()?;
            buffer.copy_from_slice(self.get(start..start.checked_add(buffer.len())?)?);
            Some(())
        }
    }

    fn gpt(entries_at: u64, count: u32, stride: u32) -> Vec<u8> {
        let mut disk = vec![0; 64 * 512];
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[512 + 72..512 + 80].copy_from_slice(&entries_at.to_le_bytes());
        disk[512 + 80..512 + 84].copy_from_slice(&count.to_le_bytes());
        disk[512 + 84..512 + 88].copy_from_slice(&stride.to_le_bytes());
        let entry = 1024 + 128;
        disk[entry] = 1;
        for (index, byte) in disk[entry + 16..entry + 32].iter_mut().enumerate() {
            *byte = u8::try_from(index).expect("small");
        }
        disk[entry + 32..entry + 40].copy_from_slice(&2048_u64.to_le_bytes());
        disk
    }

    #[test]
    fn finds_a_partition_by_its_start() {
        let disk = gpt(2, 128, 128);
        assert_eq!(gpt_uuid(&disk, 512, 2048).as_deref(), Some("03020100-0504-0706-0809-0a0b0c0d0e0f"));
        assert_eq!(gpt_uuid(&disk, 512, 4096), None);
    }

    #[test]
    fn hostile_tables_are_no_identity() {
        for (at, count, stride) in [(u64::MAX, 4, 128), (2, u32::MAX, 128), (2, 4, 0), (2, 4, u32::MAX)] {
            assert_eq!(gpt_uuid(&gpt(at, count, stride), 512, 9), None);
        }
        assert_eq!(gpt_uuid(&Vec::new(), 512, 0), None);
    }
}
