//! A machine with one disk, made for measuring: deltas of invented content, stored by the vault's own writer at invented times.

use anyhow::{Context, Result};
use highwater_delta::{
    Block, CHUNK_BLOCKS_MAX, ChunkEncoder, CommitId, CommitKind, Consistency, DeltaId, DiskId, Extent, Fill,
    HashKey, MachineId, PointDisk, PointInfo,
};
use highwater_tests::Random;
use highwater_vault::maintain::{Maintainer, Report, Settings};
use highwater_vault::policy::{Policy, Rules};
use highwater_vault::{Clock, DiskRecord, MachineWriter, Store, Vault, VaultKey};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use super::BLOCK;

/// Some midnight.
const BEGIN_MS: u64 = 1_700_006_400_000;
const TEXT: &[u8] = b"The high watermark is the point up to which everything is safe elsewhere. ";

/// Consecutive blocks: the first, and how many.
pub type Blocks = (u64, u64);

/// See the module.
pub struct Made {
    pub vault: Vault,
    pub key: VaultKey,
    pub machine: MachineId,
    pub disk: DiskId,
    pub disk_bytes: u64,
    pub random: Random,
    pub writer: MachineWriter,
    clock: Arc<AtomicU64>,
    chunks: Chunks,
}

/// Makes chunks of invented content.
pub struct Chunks {
    disk: DiskId,
    hash: HashKey,
    encoder: ChunkEncoder,
    random: Random,
    /// Bytes of noise in each block.
    noise: usize,
    content: Vec<u8>,
    /// Bytes of all chunks made.
    pub bytes: u64,
}

impl Made {
    /// In a new vault; of each block so many bytes are noise.
    pub async fn new(store: Store, disk_bytes: u64, noise: usize) -> Result<Self> {
        let key = VaultKey::generate()?;
        let clock = Arc::new(AtomicU64::new(BEGIN_MS));
        let told = clock.clone();
        let vault = Vault::create(store, &key).await?.with_clock(Clock::new(move || told.load(SeqCst)));
        let (machine, disk) = (MachineId::new(), DiskId::new());
        vault.register_machine(machine, "bench").await?;
        let mut writer = vault.writer(machine).await?;
        writer.set_disks(vec![DiskRecord { disk, name: "sda".into(), size_bytes: disk_bytes }])?;
        let chunks = Chunks::new(disk, writer.hash_key(), noise)?;
        let random = Random::new(1);
        Ok(Self { vault, key, machine, disk, disk_bytes, random, writer, clock, chunks })
    }

    /// The same vault over another store, by the same clock.
    pub async fn vault_on(&self, store: Store) -> Result<Vault> {
        let told = self.clock.clone();
        Ok(Vault::open(store, &self.key).await?.with_clock(Clock::new(move || told.load(SeqCst))))
    }

    pub fn now_ms(&self) -> u64 {
        self.clock.load(SeqCst)
    }
    pub fn pass_ms(&self, ms: u64) {
        self.clock.fetch_add(ms, SeqCst);
    }
    /// Bytes of all chunks so far.
    pub fn chunk_bytes(&self) -> u64 {
        self.chunks.bytes
    }
    pub fn disk_blocks(&self) -> u64 {
        self.disk_bytes / BLOCK
    }

    /// Stores a delta of these runs of blocks, sorted and apart from each other, as a recovery point.
    pub async fn point(&mut self, runs: &[Blocks]) -> Result<CommitId> {
        self.writer.begin(DeltaId::new()).await?;
        for extents in packed(runs) {
            let chunk = self.chunks.of(&extents)?;
            self.writer.push(chunk.into()).await?;
        }
        Ok(self.writer.commit(self.kind()).await?)
    }

    /// A point of the one disk, now.
    pub fn kind(&self) -> CommitKind {
        CommitKind::Point(PointInfo {
            consistency: Consistency::Filesystem,
            taken_at_ms: self.now_ms(),
            freeze_us: 1000,
            disks: vec![PointDisk { disk: self.disk, size_bytes: self.disk_bytes }],
        })
    }

    /// Runs of `1..=longest` blocks at random places, so many blocks in all; `hot`: four of five within the first tenth of the disk.
    pub fn places(&mut self, blocks: u64, longest: u64, hot: bool) -> Vec<Blocks> {
        let all = self.disk_blocks();
        let (mut runs, mut left) = (Vec::new(), blocks);
        while left > 0 {
            let count = (1 + self.random.below(longest)).min(left);
            let within = if hot && self.random.below(5) > 0 { (all / 10).max(longest + 1) } else { all };
            let start = self.random.below(within - longest);
            runs.push((start, count));
            left -= count;
        }
        apart(runs)
    }

    /// A round of maintenance, as the collector does it.
    pub async fn maintain(&self, policy: &Policy) -> Result<Report> {
        maintain_on(&self.vault, self.machine, policy, self.now_ms()).await
    }
}

/// A round of maintenance at this moment.
pub async fn maintain_on(vault: &Vault, machine: MachineId, policy: &Policy, now_ms: u64) -> Result<Report> {
    // The clock here is not the store's on purpose; by the store's, records would never be old.
    let settings = Settings { skew_max: None, records_for: Duration::ZERO, ..Settings::default() };
    let rules = Rules { policy: policy.clone(), ..Rules::default() };
    let mut maintainer = Maintainer::open(vault, machine, settings).await?;
    Ok(maintainer.run(&rules, now_ms, &()).await?)
}

impl Chunks {
    pub fn new(disk: DiskId, hash: HashKey, noise: usize) -> Result<Self> {
        let encoder = ChunkEncoder::new(1)?;
        let text = TEXT.iter().copied().cycle().take(CHUNK_BLOCKS_MAX * BLOCK as usize);
        Ok(Self { disk, hash, encoder, random: Random::new(2), noise, content: text.collect(), bytes: 0 })
    }

    /// One chunk of new content.
    pub fn of(&mut self, extents: &[Extent]) -> Result<Vec<u8>> {
        let blocks: u64 = extents.iter().map(|extent| u64::from(extent.count)).sum();
        let content = self.content.get_mut(..(blocks * BLOCK) as usize).context("too much for a chunk")?;
        for block in content.chunks_mut(BLOCK as usize) {
            self.random.fill(&mut block[..self.noise]);
        }
        let mut chunk = Vec::new();
        self.encoder.encode(self.disk, extents, content, &self.hash, &mut chunk)?;
        self.bytes += chunk.len() as u64;
        Ok(chunk)
    }
}

/// The extents of each chunk.
pub fn packed(runs: &[Blocks]) -> impl Iterator<Item = Vec<Extent>> {
    let mut runs = runs.iter().copied();
    let mut rest: Option<Blocks> = None;
    std::iter::from_fn(move || {
        let (mut extents, mut room) = (Vec::new(), CHUNK_BLOCKS_MAX as u64);
        while room > 0 {
            let Some((start, count)) = rest.take().or_else(|| runs.next()) else { break };
            let here = count.min(room);
            extents.push(Extent { start: Block(start), count: here as u32, fill: Fill::Data });
            room -= here;
            rest = (count > here).then_some((start + here, count - here));
        }
        (!extents.is_empty()).then_some(extents)
    })
}

/// Sorted, and without what overlaps.
fn apart(mut runs: Vec<Blocks>) -> Vec<Blocks> {
    runs.sort_unstable();
    let mut end = 0_u64;
    runs.retain_mut(|(start, count)| {
        let skip = end.saturating_sub(*start).min(*count);
        (*start, *count) = (*start + skip, *count - skip);
        end = end.max(*start + *count);
        *count > 0
    });
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_put_apart_and_packed_without_a_loss() {
        let runs = apart(vec![(40, 10), (0, 70), (45, 40), (90, 1)]);
        assert_eq!(runs, [(0, 70), (70, 15), (90, 1)]);
        let chunks: Vec<_> = packed(&runs).collect();
        assert!(chunks.iter().all(|extents| extents.iter().map(|e| e.count).sum::<u32>() <= 32));
        let blocks: Vec<u64> = chunks.iter().flatten().flat_map(|e| e.start.0..e.end()).collect();
        let wanted: Vec<u64> = (0..85).chain(90..91).collect();
        assert_eq!(blocks, wanted);
    }
}
