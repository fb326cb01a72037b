//! Where on a disk the sectors of a logical volume lie: device-mapper tables, linear targets only. Whatever is mapped in
//! another way (crypt, raid, thin, snapshot) is not resolved, so its swap areas are copied like anything else.

use crate::device::{DevNumber, sysfs};
use std::{fs::File, ops::Range, os::fd::AsRawFd};

/// Tables of ordinary volumes take some hundred bytes.
const REPLY_BYTES: usize = 64 * 1024;
/// `struct dm_ioctl`
const HEAD_BYTES: usize = 312;
/// `struct dm_target_spec`
const SPEC_BYTES: usize = 40;
/// Its flag for "the table did not fit".
const BUFFER_FULL: u32 = 1 << 8;

/// A stretch of a device-mapper device and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    start: u64,
    sectors: u64,
    target: DevNumber,
    target_start: u64,
}

/// The sectors `wanted` of a device-mapper device, as stretches of the devices below. `None` if any part of the device is mapped
/// otherwise than linearly.
pub(super) fn resolve(dev: DevNumber, wanted: Range<u64>) -> Option<Vec<(DevNumber, Range<u64>)>> {
    Some(map(&table(dev)?, wanted))
}

fn map(segments: &[Segment], wanted: Range<u64>) -> Vec<(DevNumber, Range<u64>)> {
    let piece = |segment: &Segment| {
        let start = wanted.start.max(segment.start);
        let end = wanted.end.min(segment.start.checked_add(segment.sectors)?);
        let at = segment.target_start.checked_add(start.checked_sub(segment.start)?)?;
        (start < end).then(|| (segment.target, at..at + (end - start)))
    };
    segments.iter().filter_map(piece).collect()
}

fn table(dev: DevNumber) -> Option<Vec<Segment>> {
    const DM_TABLE_STATUS: libc::Ioctl = 0xC138_FD0C_u32 as libc::Ioctl;
    const STATUS_TABLE: u32 = 1 << 4;
    let control = File::open("/dev/mapper/control").ok()?;
    let mut reply = vec![0_u64; REPLY_BYTES / 8];
    let mut put = |at: usize, value: u32| {
        let shift = (at % 8) * 8;
        reply[at / 8] |= u64::from(value) << shift;
    };
    put(0, 4); // The interface's major version.
    put(12, u32::try_from(REPLY_BYTES).ok()?);
    put(16, u32::try_from(HEAD_BYTES).ok()?);
    put(28, STATUS_TABLE);
    reply[5] = libc::makedev(dev.0, dev.1);
    let mut bytes: Vec<u8> = reply.iter().flat_map(|word| word.to_le_bytes()).collect();
    // SAFETY: the ioctl reads and writes a `struct dm_ioctl` followed by data, as long as its data_size says, which is the
    // length of `bytes`; the kernel copies it, so its alignment does not matter.
    if unsafe { libc::ioctl(control.as_raw_fd(), DM_TABLE_STATUS, bytes.as_mut_ptr()) } != 0 {
        return None;
    }
    parse(&bytes)
}

pub(super) fn parse(reply: &[u8]) -> Option<Vec<Segment>> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(reply.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(reply.get(at..at.checked_add(8)?)?.try_into().ok()?));
    if u32_at(28)? & BUFFER_FULL != 0 {
        return None;
    }
    let data = u32_at(16)? as usize;
    let mut at = data;
    let mut segments = Vec::new();
    for _ in 0..u32_at(20)? {
        let kind = text(reply.get(at.checked_add(24)?..at.checked_add(SPEC_BYTES)?)?);
        if kind != "linear" {
            return None;
        }
        let parameters = text(reply.get(at + SPEC_BYTES..)?);
        let (target, target_start) = parameters.split_once(' ')?;
        segments.push(Segment {
            start: u64_at(at)?,
            sectors: u64_at(at + 8)?,
            target: sysfs::parse_number(target)?,
            target_start: target_start.trim().parse().ok()?,
        });
        // Counted from the beginning of the data.
        at = data.checked_add(u32_at(at + 20)? as usize)?;
    }
    Some(segments)
}

fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(targets: &[(u64, u64, &str, &str)]) -> Vec<u8> {
        let mut bytes = vec![0; HEAD_BYTES];
        bytes[16..20].copy_from_slice(&312_u32.to_le_bytes());
        bytes[20..24].copy_from_slice(&u32::try_from(targets.len()).expect("few").to_le_bytes());
        for (start, length, kind, parameters) in targets {
            let mut spec = [0; SPEC_BYTES];
            spec[..8].copy_from_slice(&start.to_le_bytes());
            spec[8..16].copy_from_slice(&length.to_le_bytes());
            let padded = (parameters.len() + 1).next_multiple_of(8);
            let next = bytes.len() - HEAD_BYTES + SPEC_BYTES + padded;
            spec[20..24].copy_from_slice(&u32::try_from(next).expect("small").to_le_bytes());
            spec[24..24 + kind.len()].copy_from_slice(kind.as_bytes());
            bytes.extend(spec);
            bytes.extend(parameters.bytes().chain(std::iter::repeat(0)).take(padded));
        }
        bytes
    }

    #[test]
    fn maps_a_volume_of_two_pieces() {
        let segments =
            parse(&reply(&[(0, 100, "linear", "8:2 2048"), (100, 50, "linear", "8:16 10")])).expect("linear");
        assert_eq!(map(&segments, 8..120), [((8, 2), 2056..2148), ((8, 16), 10..30)]);
        assert_eq!(map(&segments, 150..150), []);
    }

    #[test]
    fn what_is_not_linear_or_not_whole_is_not_resolved() {
        assert_eq!(parse(&reply(&[(0, 100, "crypt", "aes 8:2 0")])), None);
        assert_eq!(parse(&reply(&[(0, 100, "linear", "8:2")])), None);
        let good = reply(&[(0, 100, "linear", "8:2 2048")]);
        for length in 0..HEAD_BYTES + SPEC_BYTES {
            assert_eq!(parse(&good[..length]), None, "cut at {length}");
        }
    }
}
