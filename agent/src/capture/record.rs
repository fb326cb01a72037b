//! Records of the stream, as they come out of the ring.

use highwater_abi::stream::{HEADER_BYTES, Header, kind};

/// A record's header and its payload (nothing where its kind has none); `None` if it is cut off: then it is none of ours.
#[must_use]
pub fn split(record: &[u8]) -> Option<(Header, &[u8])> {
    let (head, rest) = record.split_at_checked(HEADER_BYTES)?;
    let long = |at: usize| head.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let word = |at: usize| head.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let header = Header {
        at: long(0)?,
        bio: long(8)?,
        dev: word(16)?,
        bytes: word(20)?,
        kind: word(24)? as u16,
        more: (word(24)? >> 16) as u16,
        flags: word(28)?,
    };
    let payload = match header.kind {
        kind::WRITE | kind::PROBE => rest.get(..header.bytes as usize)?,
        _ => &[],
    };
    Some((header, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_split_as_it_was_laid_out() {
        let header = Header { at: 1 << 40, bio: 2, dev: 3, bytes: 5, kind: kind::WRITE, more: 1, flags: 6 };
        // SAFETY: integers without padding.
        let mut record =
            unsafe { std::slice::from_raw_parts((&raw const header).cast::<u8>(), HEADER_BYTES) }.to_vec();
        record.extend_from_slice(b"payload");
        assert_eq!(split(&record), Some((header, &b"paylo"[..])));
        assert_eq!(split(&record[..HEADER_BYTES + 4]), None);
        assert_eq!(split(&record[..HEADER_BYTES - 1]), None);
    }
}
