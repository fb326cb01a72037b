//! What is known of a fixture: what was written, told by a model and not by the vault.

use highwater_delta::*;
use highwater_vault::{DiskRecord, Vault};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Expected {
    pub vault: VaultId,
    /// Control documents: name and content.
    pub control: BTreeMap<String, String>,
    /// Sorted by id.
    pub machines: Vec<Machine>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    pub machine: MachineId,
    pub host_name: String,
    pub last_record: u64,
    pub epoch: u64,
    /// Whether a segment lies there that no record names.
    pub interrupted: bool,
    pub disks: Vec<DiskRecord>,
    pub former_disks: Vec<DiskRecord>,
    /// All points, and some partial commits; the last commit is the last one.
    pub commits: Vec<Commit>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Commit {
    pub commit: CommitId,
    pub delta: DeltaId,
    /// Whether it is among the last 256 commits.
    pub remembered: bool,
    /// Of a partial commit none.
    pub info: Option<PointInfo>,
    pub disks: Vec<Content>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Content {
    pub disk: DiskId,
    pub size_bytes: u64,
    /// Of all its bytes.
    pub blake3: String,
    /// Of what is stored of each block: 0 absent, 1 zero, or 2 and the block's hash.
    pub blake3_of_hashes: String,
}

/// What a vault holds of a disk.
pub async fn digest_of(vault: &Vault, machine: MachineId, disk: DiskId, at: CommitId) -> Content {
    let map = vault.block_map(machine, disk, at).await.unwrap();
    let all = BlockRange::new(0, map.blocks());
    let mut bytes = vec![7; all.bytes() as usize];
    map.read(all, &mut bytes).await.unwrap();
    content(disk, map.size_bytes(), &bytes, &map.hashes(all).await.unwrap())
}

/// A disk's content, from whole blocks.
pub fn content(disk: DiskId, size_bytes: u64, blocks: &[u8], stored: &[StoredBlock]) -> Content {
    assert_eq!(blocks.len(), stored.len() * BLOCK_BYTES);
    let mut hashes = blake3::Hasher::new();
    for block in stored {
        match block {
            StoredBlock::Absent => hashes.update(&[0]),
            StoredBlock::Zero => hashes.update(&[1]),
            StoredBlock::Data(hash) => hashes.update(&[2]).update(&hash.0),
        };
    }
    Content {
        disk,
        size_bytes,
        blake3: blake3::hash(&blocks[..size_bytes as usize]).to_string(),
        blake3_of_hashes: hashes.finalize().to_string(),
    }
}
