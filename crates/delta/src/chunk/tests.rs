use super::*;
use proptest::prelude::*;

fn key() -> HashKey {
    HashKey::new([7; 32])
}
fn disk() -> DiskId {
    DiskId::from_bytes([3; 16])
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    Text(u8),
    Noise(u64),
}
fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        2 => Just(Content::Zero),
        3 => any::<u8>().prop_map(Content::Text),
        2 => any::<u64>().prop_map(Content::Noise)
    ]
}
fn fill_block(content: Content) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    match content {
        Content::Zero => {}
        Content::Text(byte) => {
            for (i, b) in block.iter_mut().enumerate() {
                *b = byte.wrapping_add((i / 64) as u8) | 1;
            }
        }
        Content::Noise(seed) => {
            let mut state = seed | 1;
            for b in &mut block {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *b = (state >> 24) as u8;
            }
        }
    }
    block
}

/// Extents with gaps, and the content of each block.
fn layout() -> impl Strategy<Value = (Vec<Extent>, Vec<u8>)> {
    let piece = (
        0_u64..3,
        prop_oneof![prop::collection::vec(content(), 1..9).prop_map(Some), Just(None)],
        1_u32..1000,
    );
    prop::collection::vec(piece, 1..5).prop_map(|pieces| {
        let (mut at, mut extents, mut payload) = (0, Vec::new(), Vec::new());
        for (gap, blocks, zeros) in pieces {
            at += gap;
            let (count, fill) = match &blocks {
                Some(blocks) => (blocks.len() as u32, Fill::Data),
                None => (zeros, Fill::Zero),
            };
            extents.push(Extent { start: Block(at), count, fill });
            at += u64::from(count);
            for block in blocks.into_iter().flatten() {
                payload.extend_from_slice(&fill_block(block));
            }
        }
        (extents, payload)
    })
}

/// What a reader sees: block → content, `None` for zeros.
fn expand(extents: impl Iterator<Item = Extent>, payload: &[u8]) -> Vec<(u64, Option<Vec<u8>>)> {
    let mut blocks = payload.chunks(BLOCK_BYTES);
    let mut seen = Vec::new();
    for extent in extents {
        for number in extent.start.0..extent.end() {
            let content = match extent.fill {
                Fill::Data => Some(blocks.next().unwrap().to_vec()).filter(|c| c.iter().any(|b| *b != 0)),
                Fill::Zero => None,
            };
            seen.push((number, content));
        }
    }
    seen
}

proptest! {
    #[test]
    fn what_goes_in_comes_out((extents, payload) in layout(), level in -5..4_i32) {
        let mut out = vec![9; 5];
        ChunkEncoder::new(level).unwrap().encode(disk(), &extents, &payload, &key(), &mut out).unwrap();
        prop_assert!(out.len() <= CHUNK_BYTES_MAX);
        let view = ChunkView::parse(&out).unwrap();
        let mut raw = Vec::new();
        view.open(&key(), &mut raw).unwrap();
        prop_assert_eq!(view.disk(), disk());
        prop_assert_eq!(view.hashes().len(), view.data_blocks());
        prop_assert_eq!(expand(extents.iter().copied(), &payload), expand(view.extents(), &raw));
        for block in raw.chunks(BLOCK_BYTES) {
            prop_assert!(block.iter().any(|b| *b != 0), "a block of zeros was sent as payload");
        }
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut bytes = bytes;
        let _ = ChunkView::parse(&bytes);
        for (at, byte) in MAGIC.iter().chain(&[VERSION]).enumerate() {
            if let Some(slot) = bytes.get_mut(at) { *slot = *byte; }
        }
        let _ = ChunkView::parse(&bytes);
    }
}

fn sample() -> Vec<u8> {
    let extents = [
        Extent { start: Block(5), count: 2, fill: Fill::Data },
        Extent { start: Block(9), count: 100, fill: Fill::Zero },
    ];
    let mut payload = fill_block(Content::Text(40)).to_vec();
    payload.extend_from_slice(&fill_block(Content::Text(90)));
    let mut out = Vec::new();
    encode_chunk(disk(), &extents, &payload, &key(), 1, &mut out).unwrap();
    out
}

#[test]
fn every_flipped_bit_is_found() {
    let good = sample();
    assert_eq!(ChunkView::parse(&good).unwrap().codec(), Codec::Zstd);
    let mut clean = Vec::new();
    ChunkView::parse(&good).unwrap().open(&key(), &mut clean).unwrap();
    for at in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[at / 8] ^= 1 << (at % 8);
        let mut raw = Vec::new();
        match ChunkView::parse(&bad).and_then(|view| view.open(&key(), &mut raw)) {
            Err(_) => {}
            // zstd leaves some bits of a frame's header without meaning; the content must be right then.
            Ok(()) => assert_eq!(raw, clean, "bit {at}"),
        }
    }
}

#[test]
fn every_truncation_is_found() {
    let good = sample();
    for len in 0..good.len() {
        assert!(ChunkView::parse(&good[..len]).is_err(), "{len}");
    }
    let mut long = good;
    long.push(0);
    assert!(ChunkView::parse(&long).is_err());
}

#[test]
fn wrong_key_is_found() {
    let good = sample();
    let mut raw = Vec::new();
    let error = ChunkView::parse(&good).unwrap().open(&HashKey::new([8; 32]), &mut raw).unwrap_err();
    assert_eq!(error, ChunkError::Hash(Block(5)));
    assert_eq!(error.code(), 1008);
}

#[test]
fn encoder_refuses_what_a_chunk_cannot_hold() {
    let mut out = Vec::new();
    let mut encode =
        |extents: &[Extent], payload: &[u8]| encode_chunk(disk(), extents, payload, &key(), 1, &mut out);
    let data = |start, count| Extent { start: Block(start), count, fill: Fill::Data };
    assert!(matches!(encode(&[], &[]), Err(ChunkError::TooLarge(_))));
    assert!(matches!(encode(&[data(0, 33)], &vec![1; 33 * BLOCK_BYTES]), Err(ChunkError::TooLarge(_))));
    assert!(matches!(encode(&[data(0, 1)], &[1; 100]), Err(ChunkError::Malformed(_))));
    assert!(matches!(encode(&[data(0, 0)], &[]), Err(ChunkError::Extents(_))));
    assert!(matches!(encode(&[data(u64::MAX, 1)], &[1; 4096]), Err(ChunkError::Extents(_))));
    assert!(matches!(encode(&[data(4, 2), data(5, 1)], &[1; 3 * 4096]), Err(ChunkError::Extents(_))));
    assert!(matches!(encode(&[data(4, 1), data(3, 1)], &[1; 2 * 4096]), Err(ChunkError::Extents(_))));
}

#[test]
fn noise_is_stored_raw_and_fits() {
    let payload: Vec<u8> = (0..32).flat_map(|i| fill_block(Content::Noise(i * 77 + 5))).collect();
    let extents: Vec<_> =
        (0..32).map(|i| Extent { start: Block(i * 3), count: 1, fill: Fill::Data }).collect();
    let mut out = Vec::new();
    encode_chunk(disk(), &extents, &payload, &key(), 3, &mut out).unwrap();
    let view = ChunkView::parse(&out).unwrap();
    assert_eq!((view.codec(), view.raw_len(), view.payload_len()), (Codec::Raw, 131_072, 131_072));
}

#[test]
fn format_does_not_change() {
    // Golden: a vault written by an older release must be read for ever.
    let mut out = Vec::new();
    let extents = [
        Extent { start: Block(1), count: 1, fill: Fill::Data },
        Extent { start: Block(0x0102_0304), count: 0x0A0B, fill: Fill::Zero },
    ];
    let payload = fill_block(Content::Noise(1)).to_vec();
    encode_chunk(disk(), &extents, &payload, &key(), 1, &mut out).unwrap();
    let head: String = out[..84].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        head,
        "48574348010002000303030303030303030303030303030301000000001000000100000000000000010000000000000004030201000000000b0a000001000000f709458028bd5cdddf0db8bbeeadba1015c2aaf8"
    );
    assert_eq!(&out[84..], &payload[..]);
}
