//! Swap areas. Their content is worthless after a reboot, and busy: copying it would cost most where memory is short.
//!
//! Wrong the other way would lose data, so an unused area counts only if its header is whole, and neither a filesystem nor
//! a stacked device uses or could claim the same place. A hibernation image (`S1SUSPEND`) is not a swap area.

use crate::device::{DevNumber, inspect_number, sysfs};
use highwater_delta::{BLOCK_BYTES, BlockRange};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
};

/// Sectors of a protected device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SectorRange {
    /// The first sector.
    pub start: u64,
    /// The first sector behind it.
    pub end: u64,
}

impl SectorRange {
    /// The blocks that lie wholly inside; the partial ones at its ends belong to the neighbours too.
    #[must_use]
    pub fn blocks_inside(&self) -> Option<BlockRange> {
        let first = self.start.div_ceil(8);
        let end = self.end / 8;
        (first < end).then(|| BlockRange::new(first, end - first))
    }
}

/// The bytes of the swap area on a device that need not be copied: from behind its header page to its end.
/// `mounted`: a filesystem on this device is mounted.
pub(super) fn area_bytes(dev: DevNumber, mounted: bool) -> Option<std::ops::Range<u64>> {
    let device = inspect_number(dev).ok()?;
    let page = page_bytes();
    // The kernel itself vouches for an active one.
    if !is_active(dev) && (mounted || !sysfs::linked(&sysfs::dir(dev).ok()?, "holders").ok()?.is_empty()) {
        return None;
    }
    // Ends behind the btrfs superblock, the last of the signatures looked for.
    let mut head = vec![0; 128 * 1024];
    let file = File::open(&device.path).ok()?;
    let length = usize::try_from(device.size_bytes).unwrap_or(usize::MAX).min(head.len());
    head.truncate(length);
    file.read_exact_at(&mut head, 0).ok()?;
    let end = header_end(&head, page)?;
    (end > page && end <= device.size_bytes).then_some(page..end)
}

fn is_active(dev: DevNumber) -> bool {
    let Ok(text) = fs::read_to_string("/proc/swaps") else { return false };
    let nodes = text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    nodes
        .filter_map(|node| fs::metadata(node).ok())
        .any(|meta| meta.mode() & libc::S_IFMT == libc::S_IFBLK && sysfs::split(meta.rdev()) == dev)
}

/// Where the area described by this header ends, in bytes.
pub(super) fn header_end(head: &[u8], page: u64) -> Option<u64> {
    let at = usize::try_from(page).ok()?;
    if head.get(at - 10..at)? != b"SWAPSPACE2" {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    let (version, last_page) = (word(1024)?, word(1028)?);
    let is = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    let claimed =
        is(1024 + 56, &[0x53, 0xef]) || is(0, b"XFSB") || is(0x1_0040, b"_BHRfS_M") || is(0, b"LUKS");
    if version != 1 || claimed {
        return None;
    }
    (u64::from(last_page) + 1).checked_mul(page)
}

fn page_bytes() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(last_page: u32) -> Vec<u8> {
        let mut head = vec![0; 128 * 1024];
        head[4086..4096].copy_from_slice(b"SWAPSPACE2");
        head[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
        head[1028..1032].copy_from_slice(&last_page.to_le_bytes());
        head
    }

    #[test]
    fn a_stale_signature_under_a_filesystem_is_no_swap_area() {
        assert_eq!(header_end(&header(9), 4096), Some(40_960));
        let mut ext4 = header(9);
        ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(header_end(&ext4, 4096), None);
        let mut btrfs = header(9);
        btrfs[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
        assert_eq!(header_end(&btrfs, 4096), None);
        let mut suspended = header(9);
        suspended[4086..4096].copy_from_slice(b"S1SUSPEND\0");
        assert_eq!(header_end(&suspended, 4096), None);
        assert_eq!(header_end(&[], 4096), None);
    }

    #[test]
    fn only_whole_blocks_are_left_out() {
        let range = SectorRange { start: 63 + 8, end: 63 + 8 + 20 };
        assert_eq!(range.blocks_inside(), Some(BlockRange::new(9, 2)));
        assert_eq!(SectorRange { start: 1, end: 9 }.blocks_inside(), None);
    }
}
