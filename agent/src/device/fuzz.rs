//! The parsers of this module, for `fuzz/`.

use super::superblock::{self, ReadAt};

/// `/sys/block/*/stat`.
pub fn stat(text: &str) {
    let _ = super::stat::parse(text);
}

/// A partitioned disk.
pub fn partition_table(disk: &[u8]) {
    struct Disk<'a>(&'a [u8]);
    impl ReadAt for Disk<'_> {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> Option<()> {
            let from = usize::try_from(offset).ok()?;
            buffer.copy_from_slice(self.0.get(from..from.checked_add(buffer.len())?)?);
            Some(())
        }
    }
    for block_bytes in [512, 4096] {
        let _ = superblock::gpt_uuid(&Disk(disk), block_bytes, 2048);
    }
    let _ = superblock::mbr_uuid(&Disk(disk), 1);
}
