//! What the tests share: chunks made from block numbers, and points.

use crate::{DiskRecord, MachineWriter, Result, Vault, VaultKey};
use bytes::Bytes;
use highwater_delta::*;
pub use highwater_faults::{Faulty, SLOW, When};
use object_store::ObjectStore;
use std::sync::Arc;

/// How many cases a property is tried with; `PROPTEST_CASES` says otherwise.
pub fn cases(default: u32) -> proptest::test_runner::Config {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    proptest::test_runner::Config::with_cases(asked.unwrap_or(default))
}

pub const B: usize = BLOCK_BYTES;

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
pub fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(object_store::memory::InMemory::new())
}
pub fn machine() -> MachineId {
    MachineId::from_bytes([1; 16])
}
pub fn disk(n: u8) -> DiskId {
    DiskId::from_bytes([n; 16])
}
pub fn key() -> VaultKey {
    VaultKey::generate().unwrap()
}
pub fn records(blocks: u64) -> Vec<DiskRecord> {
    [10, 11]
        .map(|n| DiskRecord { disk: disk(n), name: format!("vd{n}"), size_bytes: blocks * B as u64 })
        .to_vec()
}
pub fn point(blocks: u64) -> CommitKind {
    let size_bytes = blocks * B as u64;
    CommitKind::Point(PointInfo {
        consistency: Consistency::Filesystem,
        taken_at_ms: 5,
        freeze_us: 7,
        disks: [10, 11].map(|n| PointDisk { disk: disk(n), size_bytes }).to_vec(),
    })
}
/// The content of a block that was written as version `version`; 0 is zeros.
pub fn content(version: u32) -> [u8; B] {
    let mut block = [0; B];
    for (i, b) in block.iter_mut().enumerate().skip(usize::from(version == 0) * B) {
        *b = (version as usize * 31 + i / 100) as u8 | 1;
    }
    block[..4].copy_from_slice(&version.to_le_bytes());
    block
}
/// A chunk of one run.
pub fn chunk(disk: DiskId, start: u64, versions: &[u32], key: &HashKey) -> Bytes {
    let payload: Vec<u8> = versions.iter().flat_map(|v| content(*v)).collect();
    let extent = Extent { start: Block(start), count: versions.len() as u32, fill: Fill::Data };
    let mut out = Vec::new();
    encode_chunk(disk, &[extent], &payload, key, 1, &mut out).unwrap();
    out.into()
}
pub async fn vault_on(store: Arc<dyn ObjectStore>) -> (Vault, VaultKey) {
    let key = key();
    let vault = Vault::create(store, &key).await.unwrap();
    vault.register_machine(machine(), "web-1").await.unwrap();
    (vault, key)
}
/// One delta with one run on disk 10, committed as a point.
pub async fn deliver(writer: &mut MachineWriter, start: u64, versions: &[u32]) -> Result<CommitId> {
    let key = writer.hash_key();
    writer.set_disks(records(64))?;
    writer.begin(DeltaId::new()).await?;
    writer.push(chunk(disk(10), start, versions, &key)).await?;
    writer.commit(point(64)).await
}
/// A disk's content at a commit.
pub async fn read_all(vault: &Vault, disk: DiskId, at: CommitId) -> Result<Vec<u8>> {
    let map = vault.block_map(machine(), disk, at).await?;
    let mut out = vec![7; map.blocks() as usize * B];
    map.read(BlockRange::new(0, map.blocks()), &mut out).await?;
    Ok(out)
}
