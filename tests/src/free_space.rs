//! Which bytes of a frozen device its file system calls free, as the file system's own tools tell.
//!
//! A write that is under way can still be changed by its writer: a page of the cache that is written to again while it is
//! being written back. What the device then holds is part of both. The page is dirty and is written again, so that no
//! one ever sees the difference, unless its file is cut or removed first: then it stays, in a block that is free. Mirrors (md) know
//! the same difference between their legs.
//!
//! On xfs, such a block may have been given to another file since, without having been written (unwritten extents, and what is allocated
//! behind a file's end): it is in use then, and nobody can read what it holds.

use crate::{
    command,
    compare::difference,
    mount::{FileSystem, Mounted},
};
use anyhow::{Context, Result, ensure};
use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

const BLOCK: u64 = 4096;
const SECTOR: usize = 512;

/// The free space of a file system that was frozen or unmounted, in bytes.
///
/// # Errors
/// Its tools cannot read it, or tell something unknown.
pub fn free_space(kind: FileSystem, image: &Path) -> Result<Vec<Range<u64>>> {
    let image = image.to_string_lossy();
    match kind {
        FileSystem::Ext4 => ext4(&command::run("dumpe2fs", &[&*image])?),
        FileSystem::Xfs => {
            let geometry =
                command::run("xfs_db", &["-r", "-c", "sb 0", "-c", "p agblocks blocksize", &image])?;
            xfs(&geometry, &command::run("xfs_db", &["-r", "-c", "freesp -d", &image])?)
        }
        // Its data is checked by sums, and so its pages are not written to while they are under way.
        FileSystem::Btrfs => Ok(vec![]),
    }
}

fn ext4(told: &str) -> Result<Vec<Range<u64>>> {
    let block: u64 = told
        .lines()
        .find_map(|line| line.strip_prefix("Block size:"))
        .context("no block size")?
        .trim()
        .parse()?;
    let mut free = vec![];
    for list in told.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for range in list.split(", ").filter(|r| !r.trim().is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            free.push(first.trim().parse::<u64>()? * block..(last.trim().parse::<u64>()? + 1) * block);
        }
    }
    Ok(free)
}

fn xfs(geometry: &str, told: &str) -> Result<Vec<Range<u64>>> {
    let number = |name: &str| -> Result<u64> {
        let line = geometry.lines().find_map(|line| line.strip_prefix(name)).context("no geometry")?;
        Ok(line.trim_start_matches([' ', '=']).parse()?)
    };
    let (group, block) = (number("agblocks")?, number("blocksize")?);
    let mut free = vec![];
    for line in told.lines().skip(1) {
        let fields: Vec<u64> = line.split_whitespace().map_while(|f| f.parse().ok()).collect();
        let [agno, agbno, len] = fields[..] else { break };
        let first = agno * group + agbno;
        free.push(first * block..(first + len) * block);
    }
    ensure!(!free.is_empty(), "no free space is told: {told}");
    Ok(free)
}

/// That these blocks of two images differ in nothing but free space; on xfs also in what is allocated, is no metadata, and is read in no
/// file. Answers how many do.
///
/// # Errors
/// Something else differs.
pub fn only_free_differs(kind: FileSystem, frozen: &Path, recovered: &Path, blocks: &[u64]) -> Result<usize> {
    if blocks.is_empty() {
        return Ok(0);
    }
    let free = free_space(kind, frozen)?;
    let (a, b) = (File::open(frozen)?, File::open(recovered)?);
    let mut in_use = vec![];
    for &block in blocks {
        let (mut in_a, mut in_b) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
        a.read_exact_at(&mut in_a, block * BLOCK)?;
        b.read_exact_at(&mut in_b, block * BLOCK)?;
        for (at, (a, b)) in in_a.chunks(SECTOR).zip(in_b.chunks(SECTOR)).enumerate() {
            let byte = block * BLOCK + (at * SECTOR) as u64;
            if a != b && !free.iter().any(|range| range.contains(&byte)) {
                in_use.push(block);
                break;
            }
        }
    }
    let Some(first) = in_use.first() else { return Ok(blocks.len()) };
    let told = format!(
        "{} blocks differ from the frozen device; {} are in use, like {first}: {}",
        blocks.len(),
        in_use.len(),
        difference(frozen, recovered, *first)?
    );
    ensure!(kind == FileSystem::Xfs, "{told}");
    println!("{told}");
    no_metadata(&[&a, &b], &in_use).context(told.clone())?;
    same_files(kind, frozen, recovered).context(told)?;
    Ok(blocks.len())
}

/// That none of these blocks is metadata: all that xfs has of it (but the log) bears the file system's UUID.
fn no_metadata(images: &[&File], blocks: &[u64]) -> Result<()> {
    /// Of `sb_uuid`, in the superblock at the beginning.
    const UUID_AT: u64 = 32;
    for image in images {
        let mut uuid = [0; 16];
        image.read_exact_at(&mut uuid, UUID_AT)?;
        ensure!(uuid != [0; 16], "a file system without a UUID");
        for block in blocks {
            let mut content = vec![0; BLOCK as usize];
            image.read_exact_at(&mut content, block * BLOCK)?;
            ensure!(!content.windows(16).any(|window| window == uuid), "block {block} is metadata");
        }
    }
    Ok(())
}

/// That every file of two images reads the same.
fn same_files(kind: FileSystem, frozen: &Path, recovered: &Path) -> Result<()> {
    const OPTIONS: &str = "ro,norecovery";
    let (a, b) = (Mounted::existing(kind, frozen, OPTIONS)?, Mounted::existing(kind, recovered, OPTIONS)?);
    let (a, b) = (a.path().to_string_lossy(), b.path().to_string_lossy());
    command::run("diff", &["--recursive", "--no-dereference", &*a, &*b]).map(drop).context("files differ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let told = "Block size:               1024\n  Free blocks: 7987-8192\n  Free blocks: \n  Free blocks: 5, 9-10\n";
        assert_eq!(ext4(told).unwrap(), [7987 * 1024..8193 * 1024, 5 * 1024..6 * 1024, 9 * 1024..11 * 1024]);
        let told = "    agno    agbno      len\n       0        6        1\n       1       24    20456\n   from      to\n";
        assert_eq!(
            xfs("agblocks = 20480\nblocksize = 4096\n", told).unwrap(),
            [6 * 4096..7 * 4096, 20504 * 4096..40960 * 4096]
        );
    }
}
