//! Reading everything back: authenticity, hashes, whether every commit is reachable, and what nobody names.
//!
//! Nothing is taken from a checkpoint: all records are replayed from the first, and checkpoints are compared with the
//! outcome. Memory: one segment's index, and 8 MiB of a segment.

use crate::{
    MachineState, Result, SegmentRef, Vault, VaultError,
    key::MachineKeys,
    seal::DOCUMENT_BYTES_MAX,
    segment::{Entry, Footer, FrameKind, Page, SegmentReader, Walked},
    store,
    vault::open_record,
};
use futures::TryStreamExt;
use highwater_delta::{BlockHash, ChunkView, DiskId, Fill, MachineId};
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Machines.
    pub machines: u64,
    /// Manifest records.
    pub records: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Recovery points.
    pub points: u64,
    /// Segments that records name.
    pub segments: u64,
    /// Chunks.
    pub chunks: u64,
    /// Blocks with content, each checked against its hash.
    pub blocks: u64,
    /// Bytes of segments.
    pub bytes: u64,
    /// Control documents.
    pub control_documents: u64,
    /// Segments that no record names: of a delta under way, or left by an interruption. No damage; the machine's next
    /// writer removes those of an interruption.
    pub orphans: Vec<String>,
    /// Damage.
    pub problems: Vec<Problem>,
}

/// Something damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Problem {
    /// Stable number.
    pub code: u16,
    /// Whose; empty for what belongs to the vault.
    pub machine: Option<MachineId>,
    /// What.
    pub cause: String,
    /// What to do about it.
    pub action: &'static str,
}

impl Report {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }
    fn problem(&mut self, machine: Option<MachineId>, error: &VaultError) {
        let (code, action) = (error.code(), error.action());
        self.problems.push(Problem { code, machine, cause: error.to_string(), action });
    }
    /// Keeps damage; failures of the store itself end the verification, since they say nothing about the data.
    fn keep<T>(&mut self, machine: Option<MachineId>, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error @ VaultError::Store(_)) => Err(error),
            Err(error) => {
                self.problem(machine, &error);
                Ok(None)
            }
        }
    }
}

/// Verifies all machines and the control documents.
pub async fn verify_vault(vault: &Vault) -> Result<Report> {
    let mut report = Report::default();
    for name in vault.control_list("").await? {
        report.control_documents += 1;
        let read = vault.control_get(&name).await;
        report.keep(None, read)?;
    }
    for machine in vault.machines().await? {
        one_machine(vault, machine, &mut report).await?;
    }
    Ok(report)
}

/// Verifies one machine.
pub async fn verify_machine(vault: &Vault, machine: MachineId) -> Result<Report> {
    let mut report = Report::default();
    one_machine(vault, machine, &mut report).await?;
    Ok(report)
}

async fn one_machine(vault: &Vault, machine: MachineId, report: &mut Report) -> Result<()> {
    report.machines += 1;
    let keys = vault.machine_keys(machine).await;
    let Some((keys, host_name)) = report.keep(Some(machine), keys)? else { return Ok(()) };
    let state = replay(vault, machine, &keys, host_name, report).await?;
    report.points += state.points.len() as u64;
    for point in &state.points {
        for covered in &point.info.disks {
            if let Err(error) = state.disk(covered.disk) {
                report.problem(Some(machine), &error);
            }
        }
    }
    for reference in &state.segments {
        report.segments += 1;
        report.bytes += reference.bytes;
        let checked = segment(vault, machine, &keys, reference, report).await;
        report.keep(Some(machine), checked)?;
    }
    orphans(vault, machine, &state, report).await
}

/// Replays every record, and compares each checkpoint where it belongs.
async fn replay(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    host_name: String,
    report: &mut Report,
) -> Result<MachineState> {
    let mut state = MachineState::empty(machine, host_name);
    let mut checkpoints: HashSet<u64> = vault.checkpoint_numbers(machine).await?.into_iter().collect();
    let mut numbers: Vec<u64> = vault
        .store()
        .list(Some(&store::manifest_dir(machine)))
        .try_filter_map(async |meta| Ok(store::number_of(&meta.location)))
        .try_collect()
        .await?;
    numbers.sort_unstable();
    for number in 1..=numbers.last().copied().unwrap_or(0) {
        let path = store::manifest_path(machine, number);
        report.records += 1;
        let read = store::read_object(&**vault.store(), &path, DOCUMENT_BYTES_MAX).await;
        let applied = read.and_then(|sealed| {
            let envelope = open_record(keys, &path, &sealed)?;
            state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), path.as_ref())
        });
        if report.keep(Some(machine), applied)?.is_none() {
            // Every later record continues the damaged one.
            break;
        }
        if checkpoints.remove(&number) {
            report.checkpoints += 1;
            let read = vault.read_checkpoint(machine, keys, number).await;
            if let Some(found) = report.keep(Some(machine), read)?
                && found != state
            {
                let path = store::checkpoint_path(machine, number);
                report.problem(Some(machine), &VaultError::corrupt(path, "it differs from the records"));
            }
        }
    }
    for number in checkpoints {
        let path = store::checkpoint_path(machine, number);
        report.problem(Some(machine), &VaultError::corrupt(path, "the records before it are not there"));
    }
    Ok(state)
}

type Places = BTreeMap<(DiskId, u64), (u32, Option<BlockHash>)>;

async fn segment(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    reference: &SegmentRef,
    report: &mut Report,
) -> Result<()> {
    let reader = SegmentReader::new(vault.store().clone(), machine, keys, reference)?;
    let what = reader.path.clone();
    let corrupt = |cause: &str| VaultError::corrupt(&what, cause);
    let mut content = Vec::new();
    // Where content lies once every chunk has been applied.
    let mut chunks: u32 = 0;
    let mut data: Places = BTreeMap::new();
    let mut pages: Vec<Walked> = Vec::new();
    let mut footer: Option<(Footer, u32)> = None;
    let (mut chunk_count, mut block_count) = (0, 0);
    let walked = reader
        .walk(|frame| {
            if footer.is_some() {
                return Err(corrupt("a frame behind its footer"));
            }
            match frame.kind {
                FrameKind::Chunk if pages.is_empty() => {
                    chunks += 1;
                    chunk_count += 1;
                    let refuse = |e: highwater_delta::ChunkError| {
                        VaultError::corrupt(&what, format!("frame {}: {e}", frame.at.frame))
                    };
                    let view = ChunkView::parse(&frame.plain).map_err(refuse)?;
                    view.open(&keys.hash, &mut content).map_err(refuse)?;
                    block_count += view.data_blocks() as u64;
                    let mut hashes = view.hashes();
                    for extent in view.extents() {
                        let (from, to) = ((view.disk(), extent.start.0), (view.disk(), extent.end()));
                        if extent.fill == Fill::Zero {
                            let covered: Vec<_> = data.range(from..to).map(|(place, _)| *place).collect();
                            for place in covered {
                                data.remove(&place);
                            }
                            continue;
                        }
                        for block in extent.start.0..extent.end() {
                            data.insert((view.disk(), block), (frame.at.frame, hashes.next()));
                        }
                    }
                }
                FrameKind::Chunk => return Err(corrupt("a chunk behind its index")),
                FrameKind::Page => pages.push(frame),
                FrameKind::Footer => footer = Some((reader.parse_footer(&frame.plain)?, frame.at.frame)),
            }
            Ok(())
        })
        .await;
    report.chunks += chunk_count;
    report.blocks += block_count;
    walked?;
    let Some((footer, _)) = footer else { return Err(corrupt("no footer")) };
    if footer.chunks != chunks || footer.pages.len() != pages.len() {
        return Err(corrupt("its footer does not count what is there"));
    }
    let (mut indexed, mut zeros) = (0, 0);
    for (reference, frame) in footer.pages.iter().zip(&pages) {
        if (reference.frame, reference.offset, reference.len)
            != (frame.at.frame, frame.at.offset, frame.at.len)
        {
            return Err(corrupt("its footer names a page that is elsewhere"));
        }
        let page = Page::decode(&frame.plain, reference, &what)?;
        for entry in &page.entries {
            match entry.fill {
                Fill::Zero => zeros += u64::from(entry.count),
                Fill::Data => {
                    indexed += u64::from(entry.count);
                    check_entry(&page, entry, &data)
                        .ok_or_else(|| corrupt("its index does not fit a chunk"))?;
                }
            }
        }
    }
    if indexed != footer.data_blocks || zeros != footer.zero_blocks {
        return Err(corrupt("its footer miscounts blocks"));
    }
    if indexed != data.len() as u64 {
        return Err(corrupt("its index lacks blocks that its chunks hold"));
    }
    Ok(())
}

/// Whether an entry names blocks that the named chunk was the last to hold, with these hashes.
fn check_entry(page: &Page, entry: &Entry, data: &Places) -> Option<()> {
    for (index, block) in (entry.start..entry.end()).enumerate() {
        let (frame, hash) = data.get(&(page.disk, block))?;
        let stated = page.hashes.get(entry.hash_at as usize + index)?;
        if *frame != entry.frame || *hash != Some(*stated) {
            return None;
        }
    }
    Some(())
}

async fn orphans(vault: &Vault, machine: MachineId, state: &MachineState, report: &mut Report) -> Result<()> {
    let named: HashSet<_> = state.segments.iter().map(|segment| segment.id).collect();
    let mut listed = vault.store().list(Some(&store::segment_dir(machine)));
    while let Some(meta) = listed.try_next().await? {
        if store::segment_of(&meta.location).is_none_or(|id| !named.contains(&id)) {
            report.orphans.push(meta.location.to_string());
        }
    }
    Ok(())
}
