//! Bytes made by the real encoders, and by this machine's kernel, for the fuzzers to begin with.

use crate::{damage, key};
use highwater_agent::{config::Config, control::Request};
use highwater_delta::{
    BLOCK_BYTES, Block, BlockHash, BlockRange, CommitId, CommitKind, Consistency, DeltaId, DiskId, Extent,
    Fill, GroupId, HashKey, MachineId, PointDisk, PointInfo, StoredBlock, VaultId, encode_chunk,
};
use highwater_group::{Kind, Life, Marker, Message};
use highwater_vault::VaultKey;
use highwater_wire::message::{
    AgentMessage, CollectorMessage, DeltaCommit, DiskInfo, Hello, Kept, PointAnswer, Reachable, Refusal,
    Welcome,
};
use highwater_wire::{
    FrameWriter, PeerMessage, Roster, RosterMember, Timeouts, certificate, codec, enroll, identity,
};
use std::{error::Error, fs, sync::Arc};

type Done<T = ()> = Result<T, Box<dyn Error>>;

struct Seeds(Vec<(&'static str, Vec<u8>)>);

impl Seeds {
    fn add(&mut self, target: &'static str, bytes: &[u8]) -> Done {
        self.0.push((target, bytes.to_vec()));
        Ok(())
    }
}

fn chunks() -> Done<Vec<Vec<u8>>> {
    let (disk, mut made) = (DiskId::new(), Vec::new());
    let data = |start, count| Extent { start: Block(start), count, fill: Fill::Data };
    let zero = |start, count| Extent { start: Block(start), count, fill: Fill::Zero };
    let noise: Vec<u8> =
        (0..BLOCK_BYTES as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (extents, payload) in [
        (vec![data(0, 1)], vec![7; BLOCK_BYTES]),
        (vec![data(3, 1)], noise),
        (vec![zero(9, 100_000)], vec![]),
        (vec![zero(0, 1), data(2, 3), zero(90, 2)], vec![1; 3 * BLOCK_BYTES]),
    ] {
        let mut out = Vec::new();
        encode_chunk(disk, &extents, &payload, &key(), 1, &mut out)?;
        made.push(out);
    }
    Ok(made)
}

fn agent_messages() -> Vec<AgentMessage> {
    let (disk, delta) = (DiskId::new(), DeltaId::new());
    let text = |text: &str| text.to_owned();
    let info = PointInfo {
        consistency: Consistency::Filesystem,
        taken_at_ms: 1 << 40,
        freeze_us: 900,
        disks: vec![PointDisk { disk, size_bytes: 1 << 30 }],
    };
    vec![
        AgentMessage::Hello(Hello {
            machine: MachineId::new(),
            version_min: 1,
            version_max: 1,
            agent_version: text("0.1.0"),
            host_name: text("host"),
            kernel: text("6.12.0"),
        }),
        AgentMessage::Disks(vec![DiskInfo { disk, name: text("vda"), size_bytes: 1 << 30 }]),
        AgentMessage::DeltaBegin(delta),
        AgentMessage::DeltaCommit(DeltaCommit { delta, chunks: 3, kind: CommitKind::Point(info) }),
        AgentMessage::DeltaCommit(DeltaCommit { delta, chunks: 0, kind: CommitKind::Partial }),
        AgentMessage::DeltaAbort(delta),
        AgentMessage::Hashes { disk, range: BlockRange::new(0, 8192) },
        AgentMessage::Ping(1),
        AgentMessage::Goodbye,
        AgentMessage::Reachable(Reachable { host: Some(text("db1")), port: 20004 }),
        AgentMessage::Kept(Kept {
            group: GroupId::new(),
            epoch: 2,
            marker: marker(),
            kind: Kind::Application,
            commit: CommitId(9),
            taken_at_ms: 1 << 40,
        }),
        AgentMessage::Withdrawn { group: GroupId::new(), marker: marker() },
        AgentMessage::MarkerEnded {
            group: GroupId::new(),
            marker: marker(),
            kind: Kind::Crash,
            failed: Some(text("db2 could not freeze")),
        },
        AgentMessage::Answer { request: 4, answer: PointAnswer::Point(CommitId(3)) },
    ]
}

fn collector_messages() -> Vec<CollectorMessage> {
    let (disk, delta) = (DiskId::new(), DeltaId::new());
    vec![
        CollectorMessage::Welcome(Welcome {
            version: 1,
            vault: VaultId::new(),
            hash_key: HashKey::new([9; 32]),
            window_bytes: 4 << 20,
            last_commit: CommitId(7),
            disks: vec![disk],
        }),
        CollectorMessage::Received { delta, chunks: 3 },
        CollectorMessage::Stored { delta, commit: CommitId(8) },
        CollectorMessage::Hashes {
            disk,
            range: BlockRange::new(5, 3),
            blocks: vec![StoredBlock::Absent, StoredBlock::Zero, StoredBlock::Data(BlockHash([3; 16]))],
        },
        CollectorMessage::Pong(1),
        CollectorMessage::Refused(Refusal {
            code: 1302,
            cause: "another machine's".to_owned(),
            action: "look".to_owned(),
            retry: false,
            fatal: true,
        }),
        CollectorMessage::Group(None),
        CollectorMessage::PointWanted { request: 4, group: Some(GroupId::new()), application: true },
    ]
}

fn marker() -> Marker {
    Marker {
        coordinator: MachineId::from_bytes([5; 16]),
        life: Life { since: 1_790_000_000_000, nonce: 77 },
        number: 3,
    }
}

fn roster() -> Roster {
    let member = |n: u8| RosterMember {
        machine: MachineId::from_bytes([n; 16]),
        host_name: "host".to_owned(),
        address: Some("10.0.0.1:20004".to_owned()),
        generation_min: 0,
    };
    Roster {
        group: GroupId::from_bytes([6; 16]),
        name: "shop".to_owned(),
        epoch: 3,
        issued_ms: 1_790_000_000_000,
        members: vec![member(1), member(2)],
        crash_every_ms: Some(300_000),
        application_every_ms: None,
        prepare_max_ms: 60_000,
        hold_max_ms: 5_000,
    }
}

async fn stream(messages: &[Vec<u8>], chunks: &[Vec<u8>]) -> Done<Vec<u8>> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let mut frames = FrameWriter::new(&mut bytes, Timeouts::default());
    for message in messages {
        frames.control(message).await?;
    }
    for chunk in chunks {
        frames.chunk(DeltaId::new(), chunk).await?;
    }
    frames.flush().await?;
    Ok(bytes.into_inner())
}

async fn wire(seeds: &mut Seeds) -> Done {
    let chunks = chunks()?;
    for chunk in &chunks {
        seeds.add("chunk", chunk)?;
    }
    let said = agent_messages().iter().map(codec::encode).collect::<Result<Vec<_>, _>>()?;
    let answered = collector_messages().iter().map(codec::encode).collect::<Result<Vec<_>, _>>()?;
    for (target, bodies) in [("agent_message", &said), ("collector_message", &answered)] {
        for body in bodies {
            seeds.add(target, body)?;
        }
    }
    for (bodies, chunks) in [(&said, &chunks[..]), (&answered, &[])] {
        let bytes = stream(bodies, chunks).await?;
        seeds.add("session", &bytes)?;
        seeds.add("frame", &bytes[..bytes.len().min(200)])?;
    }
    let authority = identity::Authority::create("seed")?;
    let (roster, marker) = (roster(), marker());
    let signed = roster.sign(&authority)?;
    seeds.add("roster", &signed.roster)?;
    seeds.add("peer_message", marker.to_string().as_bytes())?;
    let message = Message::Prepare { marker, kind: Kind::Crash, epoch: 3 };
    for said in [PeerMessage::Roster(signed), PeerMessage::Said { group: roster.group, message }] {
        seeds.add("peer_message", &codec::encode(&said)?)?;
    }
    let csr = identity::Csr::create()?;
    let token = enroll::Token {
        id: identity::random()?,
        secret: identity::random::<32>()?.into(),
        ca_fingerprint: certificate::fingerprint(authority.cert()),
    };
    seeds.add("token", token.to_string().as_bytes())?;
    seeds.add("token", b"https://[::1]:9444/")?;
    let cert_pem = authority.sign_csr(&csr.csr_pem, MachineId::new())?;
    seeds.add("enrolment", csr.csr_pem.as_bytes())?;
    seeds.add("enrolment", cert_pem.as_bytes())?;
    seeds.add("enrolment", authority.cert())?;
    let (chain, _) = identity::load_chain(&cert_pem, &csr.key_pem)?;
    seeds.add("enrolment", &chain[0])?;
    let request = enroll::EnrolRequest {
        token_id: certificate::hex(&token.id),
        secret: certificate::hex(token.secret.as_ref()),
        csr_pem: csr.csr_pem.clone(),
        host_name: "host".to_owned(),
    };
    seeds.add("enrolment", &serde_json::to_vec(&request)?)
}

async fn vault(seeds: &mut Seeds) -> Done {
    let store = Arc::new(object_store::memory::InMemory::new());
    let (vault, _) = damage::make(store, &VaultKey::generate()?).await?;
    for (decoder, bytes) in highwater_vault::fuzz::seeds(&vault, damage::machine()).await? {
        let target = match decoder {
            "page" => "segment_page",
            "footer" => "segment_footer",
            other => other,
        };
        seeds.add(target, &bytes)?;
    }
    for object in 0..8 {
        seeds.add("damage", &[object, 3, 0, 255, object, 40, 1, 16])?;
    }
    seeds.add("damage", &[])
}

fn agent(seeds: &mut Seeds) -> Done {
    for request in [
        Request::Status,
        Request::Protect { path: "/dev/vda".into(), name: Some("data".to_owned()) },
        Request::Unprotect { disk: "data".to_owned() },
        Request::Point { application: true },
        Request::ResyncNow { disk: "data".to_owned() },
    ] {
        seeds.add("control_request", &serde_json::to_vec(&request)?)?;
    }
    seeds.add("agent_config", include_bytes!("../../../packaging/examples/agent.toml"))?;
    seeds.add("agent_config", Config::default().effective().as_bytes())?;
    seeds.add("btf", &small_btf())?;
    seeds.add("mountinfo", &fs::read("/proc/self/mountinfo")?)?;
    seeds.add("mountinfo", &dm_reply())?;
    let mut swap = vec![0; 4096];
    swap[1024..1032].copy_from_slice(&[1, 0, 0, 0, 9, 0, 0, 0]);
    swap[4086..].copy_from_slice(b"SWAPSPACE2");
    seeds.add("mountinfo", &swap)?;
    seeds.add("sysfs", b"1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n")?;
    seeds.add("sysfs", b"259:3")?;
    seeds.add(
        "guest",
        b"\xFF{\"return\": 7}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n",
    )?;
    seeds.add("guest", b"{\"return\": {\"supported_commands\": [{\"name\": \"guest-fsfreeze-freeze\", \"enabled\": true}]}}\n")?;
    seeds.add("guest", DOMAIN)?;
    seeds.add("guest", QEMU)?;
    let mut gpt = vec![0; 4096];
    gpt[510..512].copy_from_slice(&[0x55, 0xaa]);
    gpt[440] = 1;
    gpt[512..520].copy_from_slice(b"EFI PART");
    gpt[512 + 72] = 2;
    gpt[512 + 80] = 4;
    gpt[512 + 84] = 128;
    gpt[1024..1056].fill(9);
    gpt[1024 + 32..1024 + 40].copy_from_slice(&2048_u64.to_le_bytes());
    seeds.add("sysfs", &gpt)
}

/// A structure `a` with a member `b`, and an anonymous one within.
fn small_btf() -> Vec<u8> {
    let strings = b"\0a\0b\0bio\0bi_iter\0bi_sector\0";
    let types: [u32; 21] = [
        // 1: int "a"
        1,
        1 << 24,
        4,
        32, // 2: struct "bio" { bi_iter: 3; anonymous: 3 }
        5,
        4 << 24 | 2,
        16,
        9,
        3,
        0,
        0,
        3,
        64, // 3: struct "a" { b: 1 } and bi_sector
        1,
        4 << 24 | 1,
        8,
        17,
        1,
        0, // 4: typedef "b" = 1
        3,
        8 << 24,
    ];
    let mut body: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
    body.extend_from_slice(&1_u32.to_le_bytes());
    let mut out = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, body.len() as u32, body.len() as u32, strings.len() as u32] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&body);
    out.extend_from_slice(strings);
    out
}

/// One linear target.
/// A guest as libvirt defines one.
const DOMAIN: &[u8] = b"<domain type='kvm'><name>web</name><uuid>c7a5fdbd-cdaf-9455-926a-d65c16db1809</uuid><devices>\
    <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/><source dev='/dev/vg0/web'/>\
    <target dev='vda' bus='virtio'/></disk><channel type='unix'><source mode='bind' path='/run/web.qga'/>\
    <target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>";
/// One as it is started by hand.
const QEMU: &[u8] = b"qemu-system-x86_64\0-name\0web\0-drive\0file=/dev/vg0/web,format=raw,if=virtio,cache=none\0-chardev\0\
    socket,id=qga0,path=/run/web.qga,server=on,wait=off\0-device\0virtserialport,chardev=qga0,name=org.qemu.guest_agent.0";

fn dm_reply() -> Vec<u8> {
    let mut reply = vec![0; 312 + 64];
    reply[16..20].copy_from_slice(&312_u32.to_le_bytes());
    reply[20] = 1;
    reply[312 + 8] = 64;
    reply[312 + 24..312 + 30].copy_from_slice(b"linear");
    reply[312 + 40..312 + 48].copy_from_slice(b"7:0 2048");
    reply
}

/// Seeds, each with the name of its target.
///
/// # Errors
/// Something could not be encoded, or this machine has no `/proc`.
pub fn seeds() -> Done<Vec<(&'static str, Vec<u8>)>> {
    let mut seeds = Seeds(Vec::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(wire(&mut seeds))?;
    runtime.block_on(vault(&mut seeds))?;
    for text in [
        "PUT /objects/machines/0/manifest/00000000000000000001?create=1",
        "GET /objects/vault.json?from=1&to=20",
        "GET /objects/vault.json?last=8",
        "POST /uploads/a/b.seg?upload=0123456789abcdef0123456789abcdef&parts=3&bytes=99",
        "PUT /uploads/a/b.seg?upload=0123456789abcdef0123456789abcdef&part=7",
        "GET /list?folders=0&prefix=machines&after=machines/1",
        "highwater://b.example:9443/site-a?identity=/etc/highwater/relay",
        "s3://dr/site-a/vault?region=eu-central-1",
    ] {
        seeds.add("relay_request", text.as_bytes())?;
    }
    agent(&mut seeds)?;
    Ok(seeds.0)
}
