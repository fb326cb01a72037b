//! A small real vault, some bytes of which are changed: whatever is then read is right or an error.

use crate::runtime;
use futures::TryStreamExt;
use highwater_delta::{
    BLOCK_BYTES, Block, BlockRange, CommitId, CommitKind, Consistency, DeltaId, DiskId, Extent, Fill,
    MachineId, PointDisk, PointInfo, encode_chunk,
};
use highwater_vault::{DiskRecord, Vault, VaultKey, verify};
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory, path::Path};
use std::sync::{Arc, OnceLock};

const BLOCKS: u64 = 24;

/// The vault before anything is changed.
pub struct Sample {
    objects: Vec<(Path, Vec<u8>)>,
    key: VaultKey,
    /// What each point holds.
    contents: Vec<Vec<u8>>,
}

/// The machine of the sample.
pub fn machine() -> MachineId {
    MachineId::from_bytes([1; 16])
}
fn disk() -> DiskId {
    DiskId::from_bytes([2; 16])
}

/// A vault of one machine and three points, in memory.
pub async fn make(
    store: Arc<dyn ObjectStore>,
    key: &VaultKey,
) -> highwater_vault::Result<(Vault, Vec<Vec<u8>>)> {
    let vault = Vault::create(store, key).await?;
    vault.register_machine(machine(), "host").await?;
    vault.control_create("tokens/1", b"a document").await?;
    let hash = vault.hash_key(machine()).await?;
    let mut writer = vault.writer(machine()).await?;
    let size_bytes = BLOCKS * BLOCK_BYTES as u64;
    writer.set_disks(vec![DiskRecord { disk: disk(), name: "vda".to_owned(), size_bytes }])?;
    let (mut now, mut contents) = (vec![0; size_bytes as usize], Vec::new());
    for round in 0..3_u8 {
        writer.begin(DeltaId::new()).await?;
        let start = u64::from(round) * 5;
        let mut payload = vec![0; 8 * BLOCK_BYTES];
        for (at, byte) in payload.iter_mut().enumerate() {
            *byte = (at / 61) as u8 ^ round.wrapping_mul(37) | 1;
        }
        now[start as usize * BLOCK_BYTES..][..payload.len()].copy_from_slice(&payload);
        let extents = [
            Extent { start: Block(start), count: 8, fill: Fill::Data },
            Extent { start: Block(BLOCKS - 2), count: 2, fill: Fill::Zero },
        ];
        let mut chunk = Vec::new();
        encode_chunk(disk(), &extents, &payload, &hash, 1, &mut chunk)?;
        writer.push(chunk.into()).await?;
        let disks = vec![PointDisk { disk: disk(), size_bytes }];
        let info = PointInfo { consistency: Consistency::Filesystem, taken_at_ms: 1, freeze_us: 1, disks };
        writer.commit(CommitKind::Point(info)).await?;
        contents.push(now.clone());
    }
    Ok((vault, contents))
}

fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        runtime().block_on(async {
            let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let key = VaultKey::generate().expect("randomness");
            let (_, contents) = make(store.clone(), &key).await.expect("a vault can be made");
            let mut objects = Vec::new();
            let listed: Vec<_> = store.list(None).try_collect().await.expect("objects");
            for meta in listed {
                let read = store.get(&meta.location).await.expect("an object");
                objects.push((meta.location, read.bytes().await.expect("its bytes").to_vec()));
            }
            objects.sort();
            Sample { objects, key, contents }
        })
    })
}

/// Each four bytes of input change one place: object, offset (two bytes), and what to do.
pub fn damage(data: &[u8]) {
    let sample = sample();
    let mut objects = sample.objects.clone();
    for step in data.chunks_exact(4).take(16) {
        let which = usize::from(step[0]) % objects.len();
        let other = usize::from(step[2]) % objects.len();
        let at = usize::from(u16::from_le_bytes([step[1], step[2]]));
        let bytes = &mut objects[which].1;
        let at = if bytes.is_empty() { 0 } else { at % bytes.len() };
        match step[3] {
            0 => bytes.truncate(at),
            1 => bytes.clear(),
            2 => bytes.push(step[1]),
            3 => {
                let copy = objects[other].1.clone();
                objects[which].1 = copy;
            }
            4 => bytes.insert(at, step[1]),
            change => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= change;
                }
            }
        }
    }
    let changed = objects != sample.objects;
    runtime().block_on(async {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        for (path, bytes) in &objects {
            store.put(path, bytes.clone().into()).await.expect("memory takes it");
        }
        let Ok(vault) = Vault::open(store, &sample.key).await else { return };
        let report = verify::verify_vault(&vault).await.expect("damage is no failure of the store");
        assert_eq!(report.is_clean(), !changed, "verification must see what was changed, and nothing else");
        for (point, good) in (1..).zip(&sample.contents) {
            let Ok(map) = vault.block_map(machine(), disk(), CommitId(point)).await else { continue };
            let mut read = vec![0; good.len()];
            if map.read(BlockRange::new(0, BLOCKS), &mut read).await.is_ok() {
                assert!(read == *good, "wrong content was handed out");
            }
        }
        if let Ok(mut writer) = vault.writer(machine()).await {
            let _ = writer.begin(DeltaId::new()).await;
            let _ = writer.commit(CommitKind::Partial).await;
        }
    });
}
