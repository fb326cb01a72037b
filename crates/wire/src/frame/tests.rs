use super::*;
use proptest::prelude::*;

#[test]
fn golden_control_header() {
    let header = FrameHeader::new(FrameKind::Control, 0x0102_0304_0506_0708, b"123456789", 9).unwrap();
    // The checksum of "123456789" is CRC-32C's published check value, 0xE3069283.
    assert_eq!(
        header.encode()[..24],
        *b"HWF1\x01\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01\x09\0\0\0\x83\x92\x06\xe3"
    );
    assert_eq!(header.encode()[24..], GOLDEN_HEADER_CRC);
}

// Computed by another implementation of CRC-32C.
const GOLDEN_HEADER_CRC: [u8; 4] = [0x7e, 0xc3, 0xe3, 0x3b];

#[test]
fn limits_hold_before_anything_is_allocated() {
    for kind in [FrameKind::Control, FrameKind::Chunk] {
        let max = kind.body_bytes_max();
        assert!(FrameHeader::new(kind, 0, &[0; 16], max).is_ok());
        assert_eq!(FrameHeader::new(kind, 0, &[0; 16], max + 1).unwrap_err().code(), 1106);
        assert_eq!(FrameHeader::new(kind, 0, &[], 0).unwrap_err().code(), 1105);
        let huge = FrameHeader { kind, sequence: 0, body_bytes: u32::MAX as usize, body_crc: 0 };
        assert_eq!(FrameHeader::decode(&huge.encode(), 0).unwrap_err().code(), 1106);
    }
}

#[test]
fn a_frame_out_of_turn_is_told() {
    let bytes = FrameHeader::new(FrameKind::Control, 4, b"x", 1).unwrap().encode();
    for expected in [0, 3, 5] {
        let error = FrameHeader::decode(&bytes, expected).unwrap_err();
        assert!(matches!(error, WireError::Sequence { expected: e, found: 4 } if e == expected));
    }
}

proptest! {
    #[test]
    fn headers_come_back(sequence: u64, chunk: bool, body in proptest::collection::vec(any::<u8>(), 17..600)) {
        let kind = if chunk { FrameKind::Chunk } else { FrameKind::Control };
        let checked = if chunk { &body[..16] } else { &body[..] };
        let header = FrameHeader::new(kind, sequence, checked, body.len()).unwrap();
        let back = FrameHeader::decode(&header.encode(), sequence).unwrap();
        prop_assert_eq!(back, header);
        prop_assert!(back.check_body(&body).is_ok());
    }

    #[test]
    fn any_flipped_bit_of_a_header_is_noticed(sequence in 0_u64..9, bit in 0_usize..HEADER_BYTES * 8) {
        let mut bytes = FrameHeader::new(FrameKind::Control, sequence, b"abc", 3).unwrap().encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(FrameHeader::decode(&bytes, sequence).is_err());
    }

    #[test]
    fn any_flipped_bit_of_a_control_body_is_noticed(mut body in proptest::collection::vec(any::<u8>(), 1..200), bit: usize) {
        let header = FrameHeader::new(FrameKind::Control, 0, &body, body.len()).unwrap();
        let bit = bit % (body.len() * 8);
        body[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(header.check_body(&body).unwrap_err().code(), 1105);
    }

    #[test]
    fn garbage_is_never_a_panic(bytes: [u8; HEADER_BYTES], valid_start: bool, expected: u64) {
        let mut bytes = bytes;
        if valid_start {
            bytes[..4].copy_from_slice(&MAGIC);
            let crc = crc32c::crc32c(&bytes[..24]);
            bytes[24..].copy_from_slice(&crc.to_le_bytes());
        }
        let _ = FrameHeader::decode(&bytes, expected);
    }
}
