//! A partition that is deleted and made again elsewhere on its disk: what was tracked at the old place says nothing of the
//! new one.

use anyhow::{Result, ensure};
use highwater_tests::{
    Arena, Backing, LoopDisk, Site, SiteOptions, compare_devices,
    raw::{kernel_number, write_random},
};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

const MIB: u64 = 1 << 20;
const SECTORS: u64 = 16 * 2048;
const HERE: u64 = 2048;
const THERE: u64 = 30 * 2048;
const RESYNCS: &str = "highwater_agent_resynchronizations_total";

/// A disk with other content everywhere and a partition that is replicated. With a signature, the partition has a UUID,
/// which it keeps wherever it is.
fn replicated(arena: &Arena, signature: bool) -> Result<(LoopDisk, PathBuf, Site)> {
    let mut disk = LoopDisk::new(Backing::Tmpfs, 64 * MIB)?;
    write_random(disk.path(), MIB, 60 * MIB, 1)?;
    if signature {
        let file = File::options().write(true).open(disk.path())?;
        file.write_all_at(&[0xde, 0xad, 0xbe, 0xef], 440)?;
        file.write_all_at(&[0x55, 0xaa], 510)?;
        file.sync_all()?;
    }
    let partition = disk.add_partition(HERE, SECTORS)?;
    let mut site = Site::new(arena, &SiteOptions::default())?;
    site.start_agent()?;
    site.protect(&partition, "part")?;
    site.wait_replicated()?;
    site.point()?;
    Ok((disk, partition, site))
}

fn write_in(partition: &Path) -> Result<()> {
    write_random(partition, 3 * MIB, MIB, 2)
}

fn compared_and_exact(site: &Site) -> Result<()> {
    let point = site.point()?;
    site.assert_exact(point)?;
    ensure!(site.metric(RESYNCS)? == 1.0, "{} comparisons", site.metric(RESYNCS)?);
    Ok(())
}

/// The point is asked for at once, before the agent has looked at its devices again.
#[test]
fn a_partition_that_moves_under_its_uuid_is_tracked_anew_and_compared() -> Result<()> {
    let arena = Arena::enter("moved")?;
    let (mut disk, partition, mut site) = replicated(&arena, true)?;
    for expected in ["HW-1460", "HW-1438", "no recovery point this time"] {
        site.allow(expected);
    }
    let number = kernel_number(&partition)?;
    write_in(&disk.move_last_partition(THERE, SECTORS)?)?;
    ensure!(
        kernel_number(&partition)? == number,
        "it is another device to the kernel: nothing to be mistaken for"
    );
    compared_and_exact(&site)?;
    // What is written from now on is seen at the new place.
    write_random(disk.path(), THERE * 512 + 9 * MIB, MIB, 3)?;
    compared_and_exact(&site)?;
    site.stop_agent()
}

#[test]
fn a_partition_that_moves_while_no_agent_runs_is_not_taken_over() -> Result<()> {
    let arena = Arena::enter("moved2")?;
    let (mut disk, _, mut site) = replicated(&arena, true)?;
    site.stop_agent()?;
    write_in(&disk.move_last_partition(THERE, SECTORS)?)?;
    site.allow("HW-1460");
    site.start_agent()?;
    compared_and_exact(&site)?;
    site.stop_agent()
}

/// Without a UUID a partition is its place: the one at the other place is another disk, and the old one is gone.
#[test]
fn a_partition_without_a_uuid_is_its_place() -> Result<()> {
    let arena = Arena::enter("place")?;
    let (mut disk, _, mut site) = replicated(&arena, false)?;
    for expected in ["HW-1438", "HW-1468", "no recovery point this time"] {
        site.allow(expected);
    }
    let partition = disk.move_last_partition(THERE, SECTORS)?;
    write_in(&partition)?;
    site.wait_state("part", "error", Duration::from_secs(10))?;
    ensure!(site.point_within(Duration::ZERO).is_err(), "a point was made without its disk");
    site.protect(&partition, "other")?;
    site.wait_state("other", "bitmap", Duration::from_secs(20))?;
    site.agent_command(&["unprotect", "part"])?;
    let point = site.point()?;
    let recovered = site.recover(point)?;
    ensure!(!recovered.image("part").exists(), "the point has the disk that is gone");
    ensure!(compare_devices(&partition, &recovered.image("other"), &[])?.is_empty(), "it is not exact");
    site.stop_agent()
}
