//! The decoders of what lies behind the encryption, for `fuzz/`: only who has the vault's key can write such bytes, and a
//! mistaken or newer program is enough.

use crate::{
    MachineState, Result, SegmentRef, Vault, VaultKey,
    key::{MachineKeys, Secret},
    keys::{DOCUMENT_BYTES_MAX, Document},
    maps::{Inner, MapFooter, decode_table},
    policy::Rules,
    record::Envelope,
    runs::Kind,
    seal,
    segment::{FrameKind, Page, PageKind, PageRef, SegmentReader},
    store,
};
use highwater_delta::{CommitId, DiskId, MachineId, SegmentId, VaultId};
use object_store::memory::InMemory;
use std::sync::Arc;
use zeroize::Zeroizing;

fn machine() -> MachineId {
    MachineId::from_bytes([1; 16])
}

/// A segment's footer.
pub fn footer(plain: &[u8]) {
    let reference = SegmentRef {
        id: SegmentId::from_bytes([2; 16]),
        commit: CommitId(1),
        bytes: 1 << 20,
        salt: [3; 16],
        footer_offset: 64,
        footer_len: 64,
        footer_frame: 1,
        spans: Vec::new(),
    };
    let Ok(keys) = MachineKeys::new(Secret(Zeroizing::new([4; 32]))) else { return };
    if let Ok(reader) =
        SegmentReader::new(Arc::new(InMemory::new()), machine(), &keys, Kind::Segment, &reference)
    {
        let _ = reader.parse_footer(plain);
        if let Ok(footer) = MapFooter::decode(plain, &"a map") {
            for table in &footer.tables {
                assert!(footer.table_of(table.first).is_some());
                let _ = decode_table(plain, table, &"a table");
            }
        }
    }
}

/// A page, behind the eight bytes of the end that the footer states for it.
pub fn page(input: &[u8]) {
    let Some((end, plain)) = input.split_first_chunk::<8>() else { return };
    let Some(head) = plain.first_chunk::<28>() else { return };
    let (disk, rest) = head.split_at(16);
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
    let at = PageRef {
        disk: DiskId::from_bytes(disk.try_into().unwrap_or_default()),
        first: number(&rest[4..]),
        end: u64::from_le_bytes(*end),
        frame: 0,
        offset: 64,
        len: 64,
    };
    for kind in [PageKind::Segment, PageKind::Leaf] {
        let _ = Page::bounds(plain, kind);
        if let Ok(page) = Page::decode(plain, kind, &at, &"a page") {
            for from in [0, at.first, at.first + 1, at.end] {
                assert!(page.touching(from, at.end).all(|entry| entry.end() > from && entry.start < at.end));
            }
        }
    }
    let inner = PageRef { first: number(plain.get(24..32).unwrap_or_default()), ..at };
    if let Ok(inner) = Inner::decode(plain, 1, &inner, &"an inner page") {
        assert!(inner.touching(3, at.end).all(|page| page.end > 3 && page.first < at.end));
    }
}

/// A manifest record, as the first of a machine. What it says of its place is made to fit, so that its body is looked at.
pub fn record(plain: &[u8]) {
    let Ok(mut envelope) = postcard::from_bytes::<Envelope>(plain) else { return };
    let mut state = MachineState::empty(machine(), String::new());
    for _ in 0..3 {
        envelope.number = state.last_record + 1;
        envelope.previous = state.chain;
        envelope.epoch = state.epoch + u64::from(envelope.kind == crate::record::KIND_TAKEOVER);
        if state.apply(&envelope, [5; 32], "a record").is_err() {
            return;
        }
    }
    look_at(&state);
}

/// A checkpoint.
pub fn checkpoint(plain: &[u8]) {
    if let Ok(state) = crate::state::decode(plain) {
        look_at(&state);
    }
}

fn look_at(state: &MachineState) {
    for point in &state.points {
        let _ = state.point(point.id);
        for covered in &point.info.disks {
            let _ = state.disk(covered.disk);
            let _ = crate::map::size_at(state, covered.disk, point.id);
        }
    }
    let _ = state.checkpoint_interval();
    let verdict = Rules::default().verdict(state, u64::MAX);
    let _ = crate::maintain::plan(state, verdict, std::time::Duration::ZERO, u64::MAX);
    let _ = (state.depth(), crate::maintain::depth_max(state), state.stored_bytes());
}

/// Any object as it lies in the store.
pub fn sealed(bytes: &[u8]) {
    let _ = seal::open(&Secret(Zeroizing::new([4; 32])), &store::manifest_path(machine(), 1), bytes);
    let _ = crate::vault::file::is_one(bytes);
}

/// A document of wrappings, for whichever vault and number it says it is.
pub fn keys_document(bytes: &[u8]) {
    let Some(head) = bytes.first_chunk::<32>() else { return };
    let vault = VaultId::from_bytes(head[8..24].try_into().unwrap_or_default());
    let number = u64::from_le_bytes(head[24..].try_into().unwrap_or_default());
    let Ok(read) = Document::decode(vault, number, bytes) else { return };
    // Whatever may be tried has bounds; and it can be written and read again.
    let document = read.document;
    let root = VaultKey::from_bytes(&[6; 32]);
    let Ok(again) = document.encode(&root) else { return };
    assert!(again.len() as u64 <= DOCUMENT_BYTES_MAX);
    let again = Document::decode(vault, number, &again).and_then(|read| read.verify(&root));
    assert!(again.is_ok_and(|again| again == document));
}

/// What lies encrypted in a vault: decoder and bytes.
pub async fn seeds(vault: &Vault, machine: MachineId) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut seeds = Vec::new();
    let (keys, host_name) = vault.machine_keys(machine).await?;
    let state = vault.load_state(machine, &keys, host_name, crate::vault::Begin::First).await?;
    seeds.push(("checkpoint", crate::state::encode(&state).unwrap_or_default()));
    for number in 1..=state.last_record {
        let path = store::manifest_path(machine, number);
        let sealed = store::read_object(&**vault.store(), &path, seal::DOCUMENT_BYTES_MAX).await?;
        seeds.push(("record", seal::open(&keys.manifest, &path, &sealed)?.to_vec()));
        seeds.push(("sealed", sealed.to_vec()));
    }
    let file = store::read_object(&**vault.store(), &store::vault_path(), 1 << 16).await?;
    seeds.push(("sealed", file.to_vec()));
    let document = store::read_object(&**vault.store(), &store::keys_path(1), DOCUMENT_BYTES_MAX).await?;
    seeds.push(("keys_document", document.to_vec()));
    seeds.push(("keys_document", crate::keys::sample()?));
    for reference in state.segments() {
        let reader = SegmentReader::new(vault.store().clone(), machine, &keys, Kind::Segment, reference)?;
        let pages = reader.footer().await?.pages;
        let mut number = 0;
        reader
            .walk(&crate::Pace::new(None), |frame| {
                match frame.kind {
                    FrameKind::Chunk => {}
                    FrameKind::Page => {
                        let end: u64 = pages.get(number).map_or(0, |page| page.end);
                        seeds.push(("page", [&end.to_le_bytes()[..], &frame.plain].concat()));
                        number += 1;
                    }
                    FrameKind::Leaf | FrameKind::Inner | FrameKind::Table => {}
                    FrameKind::Footer => seeds.push(("footer", frame.plain)),
                }
                Ok(())
            })
            .await?;
    }
    Ok(seeds)
}
