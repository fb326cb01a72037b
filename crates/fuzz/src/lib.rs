//! What the fuzz targets do with their bytes: one function for each decoder. It may answer what it likes; it must not
//! panic, hang, or allocate what it has not checked. Where something is decoded, what must hold for it is asserted.

mod damage;
mod mutate;
mod seeds;

pub use damage::damage;
pub use mutate::Mutator;
pub use seeds::seeds;

/// A decoder: takes anything.
pub type Target = fn(&[u8]);

/// All of them, by the names of the fuzz targets.
pub const TARGETS: [(&str, Target); 23] = [
    ("agent_config", agent_config),
    ("agent_message", agent_message),
    ("btf", btf),
    ("checkpoint", checkpoint),
    ("chunk", chunk),
    ("collector_message", collector_message),
    ("control_request", control_request),
    ("damage", damage),
    ("enrolment", enrolment),
    ("frame", frame),
    ("guest", guest),
    ("keys_document", keys_document),
    ("mountinfo", mountinfo),
    ("peer_message", peer_message),
    ("record", record),
    ("relay_request", relay_request),
    ("roster", roster),
    ("sealed", sealed),
    ("segment_footer", segment_footer),
    ("segment_page", segment_page),
    ("session", session),
    ("sysfs", sysfs),
    ("token", token),
];

use highwater_delta::{BLOCK_BYTES, CHUNK_BLOCKS_MAX, ChunkView, HashKey, MachineId};
use highwater_group::Marker;
use highwater_wire::message::{AgentMessage, CollectorMessage};
use highwater_wire::{
    Frame, FrameReader, PeerMessage, Roster, Timeouts, certificate, codec, enroll, frame::FrameHeader,
    identity,
};
use std::sync::OnceLock;

/// The key under which seeds are made.
pub fn key() -> HashKey {
    HashKey::new([7; 32])
}

/// A chunk, with right checksums where the fuzzer would not find them.
pub fn chunk(data: &[u8]) {
    one_chunk(data);
    // What its checksum covers ends where header, extents and hashes do.
    let number = |at: usize| Some(usize::from(u16::from_le_bytes([*data.get(at)?, *data.get(at + 1)?])));
    let Some(end) = number(6).zip(number(24)).map(|(extents, blocks)| 32 + 16 * (extents + blocks)) else {
        return;
    };
    if data.len() >= end + 4 {
        let mut fixed = data.to_vec();
        let crc = crc32c::crc32c(&fixed[..end]);
        fixed[end..end + 4].copy_from_slice(&crc.to_le_bytes());
        one_chunk(&fixed);
    }
}

fn one_chunk(data: &[u8]) {
    let Ok(view) = ChunkView::parse(data) else { return };
    assert!(view.data_blocks() <= CHUNK_BLOCKS_MAX);
    assert_eq!(view.data_block_numbers().count(), view.data_blocks());
    assert_eq!(view.hashes().len(), view.data_blocks());
    let mut content = Vec::new();
    if view.decompress_into(&mut content).is_ok() {
        assert_eq!(content.len(), view.data_blocks() * BLOCK_BYTES);
    }
    let _ = view.open(&key(), &mut content);
}

/// A frame's header; what is accepted is what would be written.
pub fn frame(data: &[u8]) {
    let Some((head, body)) = data.split_first_chunk::<28>() else { return };
    let mut fixed = *head;
    fixed[24..].copy_from_slice(&crc32c::crc32c(&head[..24]).to_le_bytes());
    for bytes in [*head, fixed] {
        let mut expected = [0; 8];
        expected.copy_from_slice(&bytes[8..16]);
        if let Ok(header) = FrameHeader::decode(&bytes, u64::from_le_bytes(expected)) {
            assert_eq!(header.encode(), bytes);
            assert!(header.body_bytes <= header.kind.body_bytes_max());
            let _ = header.check_body(body);
        }
    }
}

/// A whole stream: frames, and the messages in them, in both directions.
pub fn session(data: &[u8]) {
    runtime().block_on(async {
        let mut frames = FrameReader::new(data, Timeouts::default());
        while let Ok(Some(frame)) = frames.next().await {
            match frame {
                Frame::Control(body) => {
                    let _ = codec::decode::<AgentMessage>(&body);
                    let _ = codec::decode::<CollectorMessage>(&body);
                }
                Frame::Chunk { chunk, .. } => one_chunk(&chunk),
            }
        }
    });
}

/// What an agent says. What is understood can be said again.
pub fn agent_message(data: &[u8]) {
    if let Ok(message) = codec::decode::<AgentMessage>(data) {
        let again = codec::encode(&message).expect("what was decoded is within the limits");
        assert_eq!(codec::decode::<AgentMessage>(&again).expect("it was just encoded"), message);
    }
}

/// What a collector says.
pub fn collector_message(data: &[u8]) {
    if let Ok(message) = codec::decode::<CollectorMessage>(data) {
        let again = codec::encode(&message).expect("what was decoded is within the limits");
        let again = codec::decode::<CollectorMessage>(&again).expect("it was just encoded");
        // Key material has no equality of its own.
        assert_eq!(codec::encode(&again).ok(), codec::encode(&message).ok());
    }
}

/// What a member of a group says. What is understood can be said again.
pub fn peer_message(data: &[u8]) {
    if let Ok(message) = codec::decode::<PeerMessage>(data) {
        let again = codec::encode(&message).expect("what was decoded is within the limits");
        assert_eq!(codec::decode::<PeerMessage>(&again).expect("it was just encoded"), message);
    }
    if let Ok(Ok(marker)) = std::str::from_utf8(data).map(str::parse::<Marker>) {
        assert_eq!(marker.to_string().as_bytes(), data);
    }
}

/// A group's roster. What is read has members, and times that the protocol can go by.
pub fn roster(data: &[u8]) {
    if let Ok(roster) = Roster::read(data) {
        assert!(roster.membership().is_ok());
        let timing = roster.timing();
        assert!(timing.hold_max > 0 && timing.freeze_max > 0 && timing.prepare_max > 0);
    }
}

/// An enrolment token, and an address.
pub fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = text.parse::<enroll::Token>() {
        assert!(token.to_string().parse::<enroll::Token>().is_ok_and(|again| again == token));
    }
    let _ = enroll::host_of_url(text);
    let _ = enroll::split_endpoint(text);
}

/// An enrolment request with its signing request, answers to one, and a certificate.
pub fn enrolment(data: &[u8]) {
    static AUTHORITY: OnceLock<Option<identity::Authority>> = OnceLock::new();
    let authority = AUTHORITY.get_or_init(|| identity::Authority::create("fuzz").ok());
    let sign = |pem: &str| {
        if let Some(authority) = authority {
            let _ = authority.sign_csr(pem, MachineId::from_bytes([1; 16]));
        }
    };
    if let Ok(request) = serde_json::from_slice::<enroll::EnrolRequest>(data) {
        sign(&request.csr_pem);
        let _ = enroll::unhex::<16>(&request.token_id);
    }
    if let Ok(answer) = serde_json::from_slice::<enroll::EnrolResponse>(data) {
        let _ = highwater_wire::Identity::from_pems("", &answer.cert_pem, &answer.ca_pem);
    }
    let _ = serde_json::from_slice::<enroll::EnrolRefusal>(data);
    if let Ok(text) = std::str::from_utf8(data) {
        sign(text);
        let _ = identity::load_chain(text, text);
    }
    let cert = rustls_pki_types::CertificateDer::from(data);
    let _ = identity::machine_from_cert(&cert);
    let _ = certificate::is_collector_cert(&cert);
    let _ = certificate::serial_of(&cert);
}

/// A page of a segment's index.
pub fn segment_page(data: &[u8]) {
    highwater_vault::fuzz::page(data);
}
/// A segment's footer.
pub fn segment_footer(data: &[u8]) {
    highwater_vault::fuzz::footer(data);
}
/// A manifest record.
pub fn record(data: &[u8]) {
    highwater_vault::fuzz::record(data);
}
/// A checkpoint.
pub fn checkpoint(data: &[u8]) {
    highwater_vault::fuzz::checkpoint(data);
}
/// A document of the ways to open a vault.
pub fn keys_document(data: &[u8]) {
    highwater_vault::fuzz::keys_document(data);
}
/// A sealed document, and `vault.json`.
pub fn sealed(data: &[u8]) {
    highwater_vault::fuzz::sealed(data);
}

/// A relay's request: its method, a space, its target; a name; the place of a vault. What is understood is written alike.
pub fn relay_request(data: &[u8]) {
    use highwater_relay::{Name, Request};
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = text.parse::<Name>() {
        assert_eq!(name.path().as_ref(), name.as_str());
        assert!(name.as_str().split('/').all(|part| !matches!(part, "" | "." | "..")));
    }
    if let Ok(location) = text.parse::<highwater_vault::Location>() {
        let written = location.to_string();
        assert!(
            written.parse::<highwater_vault::Location>().is_ok_and(|again| again == location),
            "{written}"
        );
    }
    let Some((method, target)) = text.split_once(' ') else { return };
    let Ok(method) = method.parse() else { return };
    if let Ok(request) = Request::parse(&method, target) {
        let (method, target) = request.encode();
        assert!(Request::parse(&method, &target).is_ok_and(|again| again == request), "{target}");
    }
}

/// A request on the agent's control socket, and an answer.
pub fn control_request(data: &[u8]) {
    use highwater_agent::control::{Request, Response};
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let text = serde_json::to_vec(&request).expect("a request can be written");
        assert!(serde_json::from_slice::<Request>(&text).is_ok_and(|again| again == request));
    }
    let _ = serde_json::from_slice::<Response>(data);
}

/// The agent's configuration; what is accepted can be shown and read again.
pub fn agent_config(data: &[u8]) {
    use highwater_agent::config::Config;
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = Config::parse(text) {
        let shown = config.effective();
        match Config::parse(&shown) {
            Ok(again) => assert_eq!(again, config),
            Err(problems) => panic!("what is shown cannot be read: {problems:?}\n{shown}"),
        }
    }
}

/// The kernel's type information.
pub fn btf(data: &[u8]) {
    use highwater_agent::tracker::btf::KernelBtf;
    if let Ok(btf) = KernelBtf::parse(data.to_vec()) {
        for path in ["bio.bi_iter.bi_sector", "request.__sector", "a.b", "block_device.bd_dev"] {
            let _ = btf.offset(path);
        }
        let _ = btf.has_name("btf_trace_block_rq_complete");
    }
}

/// Mount tables, device-mapper tables, swap headers.
pub fn mountinfo(data: &[u8]) {
    highwater_agent::mounts::fuzz::mountinfo(data);
    highwater_agent::mounts::fuzz::dm_table(data);
    highwater_agent::mounts::fuzz::swap_header(data);
}

/// Attributes of `/sys`, partition tables.
pub fn sysfs(data: &[u8]) {
    highwater_agent::device::fuzz::partition_table(data);
    if let Ok(text) = std::str::from_utf8(data) {
        highwater_agent::device::fuzz::stat(text);
        let _ = highwater_agent::device::sysfs::parse_number(text);
    }
}

/// What a guest's agent says, and what tells of guests: libvirt's definitions, command lines of QEMU.
pub fn guest(data: &[u8]) {
    use highwater_agent::guests::{
        answer::{Answer, LINE_BYTES_MAX, Lines, offers},
        libvirt, process,
    };
    let mut lines = Lines::default();
    for line in data.iter().filter_map(|byte| lines.push(*byte)) {
        assert!(line.text.as_ref().is_none_or(|text| text.len() <= LINE_BYTES_MAX));
        match line.answer() {
            Answer::Error(said) => assert!(!said.is_empty() && !said.chars().any(char::is_control)),
            Answer::Return(value) => drop(offers(&value, &["guest-fsfreeze-freeze"])),
            Answer::Garbage => {}
        }
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = libvirt::parse(text);
        let words: Vec<String> = text.split('\0').map(str::to_owned).collect();
        let _ = process::parse(&words, |path| path.starts_with("/dev"));
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime can be made")
}
