//! The kernel's own account of a disk's I/O, the other side of the tracker's self-check.

use super::{DevNumber, DeviceError, sysfs};

/// `/sys/block/X/stat`. All but `in_flight` only grow (until the device is removed).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[expect(missing_docs, reason = "the kernel's own names, explained in its Documentation/block/stat.rst")]
pub struct DiskStat {
    pub reads: u64,
    pub reads_merged: u64,
    pub sectors_read: u64,
    pub read_ms: u64,
    pub writes: u64,
    pub writes_merged: u64,
    pub sectors_written: u64,
    pub write_ms: u64,
    pub in_flight: u64,
    pub io_ms: u64,
    pub queue_ms: u64,
    pub discards: u64,
    pub discards_merged: u64,
    pub sectors_discarded: u64,
    pub discard_ms: u64,
    pub flushes: u64,
    pub flush_ms: u64,
}

/// The statistics of a whole disk. They stand still if [`iostats_on`] is false.
///
/// # Errors
/// The device is gone, or the kernel is too old to count discards (before 4.18).
pub fn stat(whole: DevNumber) -> Result<DiskStat, DeviceError> {
    let text = attribute(whole, "stat")?;
    parse(&text).ok_or_else(|| failed(whole, "stat", std::io::ErrorKind::InvalidData.into()))
}

/// Reads and writes now under way at a whole disk; discards count as writes. Bio-based drivers that do not account
/// their I/O show 0.
///
/// # Errors
/// The device is gone.
pub fn inflight(whole: DevNumber) -> Result<(u64, u64), DeviceError> {
    let text = attribute(whole, "inflight")?;
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(reads)), Some(Ok(writes))) => Ok((reads, writes)),
        _ => Err(failed(whole, "inflight", std::io::ErrorKind::InvalidData.into())),
    }
}

/// Whether the kernel counts a whole disk's I/O (`queue/iostats`). If it does not, the tracker cannot be checked against it.
/// Bio-based drivers count for themselves, whatever that says (0 for device-mapper on 6.1).
///
/// # Errors
/// The device is gone.
pub fn iostats_on(whole: DevNumber) -> Result<bool, DeviceError> {
    let dir = sysfs::dir(whole).map_err(|source| failed(whole, "queue/iostats", source))?;
    Ok(!dir.join("mq").is_dir() || attribute(whole, "queue/iostats")? != "0")
}

fn attribute(whole: DevNumber, name: &str) -> Result<String, DeviceError> {
    let dir = sysfs::dir(whole).map_err(|source| failed(whole, name, source))?;
    sysfs::read(&dir, name).map_err(|source| failed(whole, name, source))
}

fn failed(dev: DevNumber, attribute: &str, source: std::io::Error) -> DeviceError {
    DeviceError::Sysfs { major: dev.0, minor: dev.1, attribute: attribute.into(), source }
}

pub(super) fn parse(text: &str) -> Option<DiskStat> {
    let numbers: Vec<u64> = text.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    if numbers.len() < 15 {
        return None;
    }
    let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
    Some(DiskStat {
        reads: at(0),
        reads_merged: at(1),
        sectors_read: at(2),
        read_ms: at(3),
        writes: at(4),
        writes_merged: at(5),
        sectors_written: at(6),
        write_ms: at(7),
        in_flight: at(8),
        io_ms: at(9),
        queue_ms: at(10),
        discards: at(11),
        discards_merged: at(12),
        sectors_discarded: at(13),
        discard_ms: at(14),
        flushes: at(15),
        flush_ms: at(16),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_all_columns_and_refuses_short_ones() {
        let line = " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n";
        let stat = parse(line).expect("complete");
        assert_eq!((stat.writes, stat.sectors_written, stat.in_flight), (5, 7, 9));
        assert_eq!((stat.discards, stat.sectors_discarded, stat.flushes), (12, 14, 16));
        assert_eq!(parse("1 2 3 4 5 6 7 8 9 10 11"), None);
        assert_eq!(parse("x"), None);
    }
}
