use super::*;
use proptest::prelude::*;
use tokio::io::duplex;

const SHORT: Timeouts = Timeouts {
    idle: Duration::from_millis(200),
    frame: Duration::from_millis(200),
    write: Duration::from_millis(200),
};

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

async fn bytes_of(frames: &[Frame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = FrameWriter::new(&mut bytes, Timeouts::default());
    for frame in frames {
        match frame {
            Frame::Control(body) => writer.control(body).await.unwrap(),
            Frame::Chunk { delta, chunk } => writer.chunk(*delta, chunk).await.unwrap(),
        }
    }
    bytes
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let body = || proptest::collection::vec(any::<u8>(), 1..3000).prop_map(Bytes::from);
    prop_oneof![
        body().prop_map(Frame::Control),
        (any::<[u8; 16]>(), body())
            .prop_map(|(id, chunk)| Frame::Chunk { delta: DeltaId::from_bytes(id), chunk }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn frames_come_back_through_any_pipe(frames in proptest::collection::vec(any_frame(), 0..8), pipe in 1_usize..200) {
        block_on(async {
            let (near, far) = duplex(pipe);
            let sent = frames.clone();
            let writing = tokio::spawn(async move {
                let mut writer = FrameWriter::new(near, Timeouts::default());
                for frame in &sent {
                    match frame {
                        Frame::Control(body) => writer.control(body).await.unwrap(),
                        Frame::Chunk { delta, chunk } => writer.chunk(*delta, chunk).await.unwrap(),
                    }
                }
            });
            let mut reader = FrameReader::new(far, Timeouts::default());
            for frame in frames {
                assert_eq!(reader.next().await.unwrap(), Some(frame));
            }
            assert_eq!(reader.next().await.unwrap(), None);
            writing.await.unwrap();
        });
    }

    #[test]
    fn a_cut_stream_is_truncated_or_ends_between_frames(frames in proptest::collection::vec(any_frame(), 1..4), cut: usize) {
        block_on(async {
            let bytes = bytes_of(&frames).await;
            let cut = cut % bytes.len();
            let mut reader = FrameReader::new(&bytes[..cut], Timeouts::default());
            let mut whole = 0;
            let end = loop {
                match reader.next().await {
                    Ok(Some(_)) => whole += 1,
                    other => break other,
                }
            };
            let expected = bytes_of(&frames[..whole]).await.len();
            match end {
                Ok(None) => assert_eq!(cut, expected),
                Err(WireError::Truncated) => assert!(cut > expected),
                other => panic!("{other:?}"),
            }
        });
    }

    #[test]
    fn garbage_ends_in_a_typed_error(bytes in proptest::collection::vec(any::<u8>(), 28..400)) {
        block_on(async {
            let error = FrameReader::new(&bytes[..], Timeouts::default()).next().await.unwrap_err();
            assert_eq!(error.code(), 1105);
        });
    }
}

#[tokio::test]
async fn golden_chunk_frame() {
    let delta = DeltaId::from_bytes(*b"0123456789abcdef");
    let bytes = bytes_of(&[Frame::Chunk { delta, chunk: Bytes::from_static(b"payload") }]).await;
    let crc = crc32c::crc32c(b"0123456789abcdef").to_le_bytes();
    let mut golden = b"HWF1\x02\0\0\0\0\0\0\0\0\0\0\0\x17\0\0\0".to_vec();
    golden.extend(crc);
    golden.extend(crc32c::crc32c(&golden).to_le_bytes());
    golden.extend(b"0123456789abcdefpayload");
    assert_eq!(bytes, golden);
}

#[tokio::test]
async fn a_replayed_and_a_dropped_frame_are_noticed() {
    let first = bytes_of(&[Frame::Control(Bytes::from_static(b"a"))]).await;
    let both =
        bytes_of(&[Frame::Control(Bytes::from_static(b"a")), Frame::Control(Bytes::from_static(b"b"))]).await;
    let replayed = [&first[..], &first[..]].concat();
    let mut reader = FrameReader::new(&replayed[..], Timeouts::default());
    reader.next().await.unwrap();
    assert!(matches!(reader.next().await, Err(WireError::Sequence { expected: 1, found: 0 })));
    let mut reader = FrameReader::new(&both[first.len()..], Timeouts::default());
    assert!(matches!(reader.next().await, Err(WireError::Sequence { expected: 0, found: 1 })));
}

#[tokio::test]
async fn next_may_be_dropped_at_any_byte() {
    let chunk = Bytes::from(vec![7; 5000]);
    let frames =
        [Frame::Control(Bytes::from_static(b"hello")), Frame::Chunk { delta: DeltaId::new(), chunk }];
    let bytes = bytes_of(&frames).await;
    let (mut near, far) = duplex(64);
    let mut reader = FrameReader::new(far, Timeouts::default());
    let feeding = tokio::spawn(async move {
        for byte in bytes.chunks(13) {
            near.write_all(byte).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    let mut found = Vec::new();
    while found.len() < frames.len() {
        // A poll or two, then dropped.
        tokio::select! {
            biased;
            frame = reader.next() => found.push(frame.unwrap().unwrap()),
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(found, frames);
    feeding.await.unwrap();
}

#[tokio::test]
async fn silence_and_dribble_time_out() {
    let (_near, far) = duplex(64);
    let mut reader = FrameReader::new(far, SHORT);
    assert!(matches!(reader.next().await, Err(WireError::TimedOut { what: "waiting for a frame", .. })));
    let mut reader = FrameReader::new(duplex(1).1, SHORT);
    assert!(matches!(reader.next().await, Ok(None)), "a closed pipe is an end, not silence");
    let (mut near, far) = duplex(64);
    let mut reader = FrameReader::new(far, SHORT);
    let dribbling = tokio::spawn(async move {
        for byte in b"HWF1\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
            if near.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    });
    assert!(matches!(reader.next().await, Err(WireError::TimedOut { what: "receiving a frame", .. })));
    drop(reader);
    dribbling.await.unwrap();
}

#[tokio::test]
async fn a_cancelled_or_stuck_write_poisons() {
    let (near, _far) = duplex(16);
    let mut writer = FrameWriter::new(near, SHORT);
    let cancelled = timeout(Duration::from_millis(20), writer.control(&[1; 500])).await;
    assert!(cancelled.is_err());
    assert!(matches!(writer.control(b"x").await, Err(WireError::Poisoned)));
    let (near, _far) = duplex(16);
    let mut writer = FrameWriter::new(near, SHORT);
    assert!(matches!(writer.control(&[1; 500]).await, Err(WireError::TimedOut { what: "sending", .. })));
    assert!(matches!(writer.flush().await, Err(WireError::Poisoned)));
}
