use super::*;
use crate::message::{DeltaCommit, DiskInfo, Hello, Kept, Reachable, Welcome};
use highwater_delta::{
    BlockHash, BlockRange, CommitId, Consistency, DeltaId, DiskId, GroupId, HashKey, MachineId, PointDisk,
    PointInfo, StoredBlock, VaultId,
};
use highwater_group::{Kind, Life, Marker};
use proptest::prelude::*;

fn id16() -> impl Strategy<Value = [u8; 16]> {
    any::<[u8; 16]>()
}
fn name() -> impl Strategy<Value = String> {
    "[a-zäß ]{0,60}"
}

fn marker() -> impl Strategy<Value = Marker> {
    (id16(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(id, since, nonce, number)| Marker {
        coordinator: MachineId::from_bytes(id),
        life: Life { since, nonce },
        number,
    })
}

fn agent_message() -> impl Strategy<Value = AgentMessage> {
    let disks = proptest::collection::vec(
        (id16(), name(), any::<u64>()).prop_map(|(id, name, size_bytes)| DiskInfo {
            disk: DiskId::from_bytes(id),
            name,
            size_bytes,
        }),
        0..5,
    );
    let kind = prop_oneof![
        Just(CommitKind::Partial),
        (any::<u64>(), any::<u64>(), proptest::collection::vec((id16(), any::<u64>()), 0..4)).prop_map(
            |(taken_at_ms, freeze_us, disks)| CommitKind::Point(PointInfo {
                consistency: Consistency::Filesystem,
                taken_at_ms,
                freeze_us,
                disks: disks
                    .into_iter()
                    .map(|(id, size_bytes)| PointDisk { disk: DiskId::from_bytes(id), size_bytes })
                    .collect(),
            })
        ),
    ];
    prop_oneof![
        (id16(), any::<u16>(), any::<u16>(), name(), name(), name()).prop_map(
            |(id, version_min, version_max, agent_version, host_name, kernel)| AgentMessage::Hello(Hello {
                machine: MachineId::from_bytes(id),
                version_min,
                version_max,
                agent_version,
                host_name,
                kernel
            })
        ),
        disks.prop_map(AgentMessage::Disks),
        id16().prop_map(|id| AgentMessage::DeltaBegin(DeltaId::from_bytes(id))),
        (id16(), any::<u64>(), kind).prop_map(|(id, chunks, kind)| AgentMessage::DeltaCommit(DeltaCommit {
            delta: DeltaId::from_bytes(id),
            chunks,
            kind
        })),
        id16().prop_map(|id| AgentMessage::DeltaAbort(DeltaId::from_bytes(id))),
        (id16(), any::<u32>(), 0..=MAX_HASH_BLOCKS).prop_map(|(id, start, count)| AgentMessage::Hashes {
            disk: DiskId::from_bytes(id),
            range: BlockRange::new(start.into(), count)
        }),
        any::<u64>().prop_map(AgentMessage::Ping),
        Just(AgentMessage::Goodbye),
        name().prop_map(|csr_pem| AgentMessage::Renew { csr_pem }),
        (proptest::option::of(name()), any::<u16>())
            .prop_map(|(host, port)| AgentMessage::Reachable(Reachable { host, port })),
        (id16(), any::<u64>(), marker(), any::<u64>()).prop_map(|(id, epoch, marker, commit)| {
            let group = GroupId::from_bytes(id);
            let (kind, commit, taken_at_ms) = (Kind::Crash, CommitId(commit), commit);
            AgentMessage::Kept(Kept { group, epoch, marker, kind, commit, taken_at_ms })
        }),
        (id16(), marker(), proptest::option::of(name())).prop_map(|(id, marker, failed)| {
            let (group, kind) = (GroupId::from_bytes(id), Kind::Application);
            AgentMessage::MarkerEnded { group, marker, kind, failed }
        }),
        (any::<u64>(), marker()).prop_map(|(request, marker)| AgentMessage::Answer {
            request,
            answer: PointAnswer::Marker(marker)
        }),
    ]
}

proptest! {
    #[test]
    fn messages_come_back(message in agent_message()) {
        prop_assert_eq!(decode::<AgentMessage>(&encode(&message).unwrap()).unwrap(), message);
    }

    #[test]
    fn truncated_or_continued_messages_are_errors(message in agent_message(), cut: usize) {
        let mut body = encode(&message).unwrap();
        // Whatever a shorter body says, it is not the whole message.
        let cut = cut % body.len();
        prop_assert!(decode::<AgentMessage>(&body[..cut]).is_err());
        body.push(0);
        prop_assert_eq!(decode::<AgentMessage>(&body).unwrap_err().code(), 1108);
    }

    #[test]
    fn garbage_is_never_a_panic(body in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = decode::<AgentMessage>(&body);
        let _ = decode::<CollectorMessage>(&body);
    }
}

#[test]
fn golden_hello() {
    let hello = AgentMessage::Hello(Hello {
        machine: MachineId::from_bytes(*b"0123456789abcdef"),
        version_min: 1,
        version_max: 300,
        agent_version: "0.1.0".to_owned(),
        host_name: "db1".to_owned(),
        kernel: "6.12".to_owned(),
    });
    let golden = b"\x00\x100123456789abcdef\x01\xac\x02\x050.1.0\x03db1\x046.12";
    assert_eq!(encode(&hello).unwrap(), golden);
    assert_eq!(decode::<AgentMessage>(golden).unwrap(), hello);
}

#[test]
fn golden_welcome() {
    let welcome = CollectorMessage::Welcome(Welcome {
        version: 1,
        vault: VaultId::from_bytes([7; 16]),
        hash_key: HashKey::new([9; 32]),
        window_bytes: 4 << 20,
        last_commit: CommitId(5),
        disks: vec![DiskId::from_bytes([3; 16])],
    });
    let mut golden = vec![0, 1, 16];
    golden.extend([7; 16]);
    golden.extend([9; 32]);
    golden.extend([0x80, 0x80, 0x80, 0x02, 5, 1, 16]);
    golden.extend([3; 16]);
    assert_eq!(encode(&welcome).unwrap(), golden);
}

#[test]
fn golden_renewal() {
    let ask = AgentMessage::Renew { csr_pem: "CSR".to_owned() };
    assert_eq!(encode(&ask).unwrap(), b"\x08\x03CSR");
    assert_eq!(decode::<AgentMessage>(b"\x08\x03CSR").unwrap(), ask);
    let answer = CollectorMessage::Renewed { cert_pem: "CERT".to_owned() };
    assert_eq!(encode(&answer).unwrap(), b"\x06\x04CERT");
    let refusal = Refusal {
        code: 1325,
        cause: "early".to_owned(),
        action: "wait".to_owned(),
        retry: true,
        fatal: false,
    };
    let golden = b"\x07\xad\x0a\x05early\x04wait\x01\x00";
    assert_eq!(encode(&CollectorMessage::NotRenewed(refusal.clone())).unwrap(), golden);
    assert_eq!(decode::<CollectorMessage>(golden).unwrap(), CollectorMessage::NotRenewed(refusal));
}

#[test]
fn texts_for_people_cannot_forge_a_line() {
    let refusal = Refusal {
        code: 1,
        cause: "bad\n2026-01-01 ERROR forged\u{1b}[2J".to_owned(),
        action: "x".repeat(MAX_REFUSAL_BYTES - 1) + "\n",
        retry: true,
        fatal: true,
    };
    let body = encode(&CollectorMessage::Refused(refusal)).unwrap();
    let CollectorMessage::Refused(told) = decode(&body).unwrap() else { panic!() };
    assert_eq!(told.cause, "bad\\n2026-01-01 ERROR forged\\u{1b}[2J");
    assert_eq!(told.action.len(), MAX_REFUSAL_BYTES - 1, "still within the limit");
    let hello = Hello {
        machine: MachineId::new(),
        version_min: 1,
        version_max: 2,
        agent_version: "1\n".to_owned(),
        host_name: "h\r".to_owned(),
        kernel: "\u{7}".to_owned(),
    };
    let AgentMessage::Hello(told) = decode(&encode(&AgentMessage::Hello(hello)).unwrap()).unwrap() else {
        panic!()
    };
    assert_eq!([told.agent_version, told.host_name, told.kernel], ["1\\n", "h\\r", "\\u{7}"]);
}

#[test]
fn the_tags_of_messages_never_change() {
    let tag = |message: &AgentMessage| encode(message).unwrap()[0];
    let delta = DeltaId::new();
    assert_eq!(tag(&AgentMessage::Disks(vec![])), 1);
    assert_eq!(tag(&AgentMessage::DeltaBegin(delta)), 2);
    assert_eq!(
        tag(&AgentMessage::DeltaCommit(DeltaCommit { delta, chunks: 0, kind: CommitKind::Partial })),
        3
    );
    assert_eq!(tag(&AgentMessage::DeltaAbort(delta)), 4);
    assert_eq!(tag(&AgentMessage::Hashes { disk: DiskId::new(), range: BlockRange::new(0, 0) }), 5);
    assert_eq!(tag(&AgentMessage::Ping(0)), 6);
    assert_eq!(tag(&AgentMessage::Goodbye), 7);
    assert_eq!(tag(&AgentMessage::Renew { csr_pem: String::new() }), 8);
    let tag = |message: &CollectorMessage| encode(message).unwrap()[0];
    assert_eq!(tag(&CollectorMessage::Received { delta, chunks: 0 }), 1);
    assert_eq!(tag(&CollectorMessage::Stored { delta, commit: CommitId(1) }), 2);
    assert_eq!(
        tag(&CollectorMessage::Hashes { disk: DiskId::new(), range: BlockRange::new(0, 0), blocks: vec![] }),
        3
    );
    assert_eq!(tag(&CollectorMessage::Pong(0)), 4);
    assert_eq!(tag(&CollectorMessage::Refused(WireError::Closed.to_refusal())), 5);
    assert_eq!(tag(&CollectorMessage::Renewed { cert_pem: String::new() }), 6);
    assert_eq!(tag(&CollectorMessage::NotRenewed(WireError::Closed.to_refusal())), 7);
}

#[test]
fn the_largest_answer_fits_a_frame() {
    let range = BlockRange::new(u64::from(u32::MAX), MAX_HASH_BLOCKS);
    let blocks = vec![StoredBlock::Data(BlockHash([255; 16])); MAX_HASH_BLOCKS as usize];
    let answer = CollectorMessage::Hashes { disk: DiskId::new(), range, blocks };
    assert!(encode(&answer).unwrap().len() <= frame::CONTROL_BYTES_MAX);
}

#[test]
fn more_than_the_limits_is_refused_on_both_sides() {
    let long = "x".repeat(MAX_NAME_BYTES + 1);
    let disk = |name: &str| DiskInfo { disk: DiskId::new(), name: name.to_owned(), size_bytes: 1 };
    let beyond = [
        AgentMessage::Disks(vec![disk(&long)]),
        AgentMessage::Disks(vec![disk("a"); MAX_DISKS + 1]),
        AgentMessage::Hashes { disk: DiskId::new(), range: BlockRange::new(0, MAX_HASH_BLOCKS + 1) },
        AgentMessage::Hashes { disk: DiskId::new(), range: BlockRange::new(u64::MAX, 2) },
        AgentMessage::Renew { csr_pem: "x".repeat(CSR_BYTES_MAX + 1) },
    ];
    for message in beyond {
        assert_eq!(encode(&message).unwrap_err().code(), 1108, "{message:?}");
        let raw = postcard::to_stdvec(&message).unwrap();
        assert_eq!(decode::<AgentMessage>(&raw).unwrap_err().code(), 1108);
    }
}
