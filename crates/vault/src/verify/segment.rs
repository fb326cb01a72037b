//! One segment: every frame authentic, every block as its hash says, the index exactly what the chunks hold.
//! Memory: the segment's index, and 8 MiB of it.

use super::Report;
use crate::{
    Result, SegmentRef, Vault, VaultError,
    key::MachineKeys,
    runs::Kind,
    segment::{Entry, Footer, FrameKind, Page, PageKind, SegmentReader, Walked},
};
use highwater_delta::ChunkView;
use highwater_delta::{BlockHash, DiskId, Fill, MachineId};
use std::collections::BTreeMap;

type Places = BTreeMap<(DiskId, u64), (u32, Option<BlockHash>)>;

pub(super) async fn check(
    vault: &Vault,
    machine: MachineId,
    keys: &MachineKeys,
    kind: Kind,
    reference: &SegmentRef,
    report: &mut Report,
) -> Result<()> {
    let reader = SegmentReader::new(vault.store().clone(), machine, keys, kind, reference)?;
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
                FrameKind::Leaf | FrameKind::Inner | FrameKind::Table => {
                    return Err(corrupt("a frame of a map"));
                }
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
        let page = Page::decode(&frame.plain, PageKind::Segment, reference, &what)?;
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
