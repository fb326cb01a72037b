//! One map: every frame authentic, pages where they are said to be, sorted, and counted as the tables say.
//! Memory: the map's tables, one reference a page, and 8 MiB of it.

use super::Place;
use crate::{
    Result, SegmentRef, VaultError,
    maps::{Inner, MapDisk, MapFooter, SegmentRow, decode_table},
    record::DiskSpan,
    runs::Kind,
    segment::{FrameAt, FrameKind, Page, PageKind, PageRef, SegmentReader},
};
use highwater_delta::{DiskId, Fill};
use std::collections::HashMap;

/// The pages that were met and are not referred to yet, with their levels.
type Loose = HashMap<FrameAt, (PageRef, u8)>;

/// Checks a map; answers the segments that it names.
pub(super) async fn check(place: &Place<'_>, reference: &SegmentRef) -> Result<Vec<SegmentRow>> {
    let store = place.vault.store().clone();
    let reader = SegmentReader::new(store, place.machine, place.keys, Kind::Map, reference)?;
    let what = reader.path.clone();
    let corrupt = |cause: &str| VaultError::corrupt(&what, cause);
    let footer = MapFooter::decode(&reader.footer_frame().await?, &what)?;
    let mut rows = Vec::new();
    for table in &footer.tables {
        rows.extend(decode_table(&reader.one(table.at(), FrameKind::Table).await?, table, &what)?);
    }
    let mut live = vec![0_u64; rows.len()];
    let mut blocks: HashMap<DiskId, (u64, u64)> = HashMap::new();
    let mut loose = Loose::new();
    let mut tables = 0;
    reader
        .walk(place.pace, |frame| {
            match frame.kind {
                FrameKind::Leaf => {
                    let at = leaf_ref(&frame.plain, frame.at).ok_or_else(|| corrupt("a leaf cut off"))?;
                    let page = Page::decode(&frame.plain, PageKind::Leaf, &at, &what)?;
                    let (data, zeros) = blocks.entry(page.disk).or_default();
                    for entry in &page.entries {
                        match entry.fill {
                            Fill::Zero => *zeros += u64::from(entry.count),
                            Fill::Data => {
                                *data += u64::from(entry.count);
                                *live.get_mut(entry.segment as usize).ok_or_else(|| {
                                    corrupt("an entry names a segment that its table lacks")
                                })? += u64::from(entry.count);
                            }
                        }
                    }
                    loose.insert(frame.at, (at, 0));
                }
                FrameKind::Inner => {
                    let (at, level) = inner_ref(&frame.plain, frame.at, &loose)
                        .ok_or_else(|| corrupt("an inner page over pages that are not there"))?;
                    for under in Inner::decode(&frame.plain, level, &at, &what)?.refs {
                        if loose.remove(&under.at()) != Some((under, level - 1)) {
                            return Err(corrupt("an inner page does not fit a page beneath it"));
                        }
                    }
                    loose.insert(frame.at, (at, level));
                }
                FrameKind::Table => tables += 1,
                FrameKind::Footer => {}
                FrameKind::Chunk | FrameKind::Page => return Err(corrupt("a frame of a segment")),
            }
            Ok(())
        })
        .await?;
    for disk in &footer.disks {
        let counted = blocks.remove(&disk.root.disk);
        if loose.remove(&disk.root.at()) != Some((disk.root.clone(), disk.level))
            || counted != Some((disk.data_blocks, disk.zero_blocks))
        {
            return Err(corrupt("its footer does not fit its pages"));
        }
    }
    let counted = rows.iter().map(|row| row.live).eq(live);
    if !loose.is_empty() || !blocks.is_empty() || tables != footer.tables.len() || !counted {
        return Err(corrupt("its footer does not count what is there"));
    }
    let spans = footer.disks.iter().map(|MapDisk { root, .. }| DiskSpan {
        disk: root.disk,
        first: root.first,
        end: root.end,
    });
    // Readers pass an object over by these.
    if !spans.eq(reference.spans.iter().cloned()) {
        return Err(corrupt("it holds other blocks than its record says"));
    }
    Ok(rows)
}

/// What would refer to a leaf.
fn leaf_ref(plain: &[u8], at: FrameAt) -> Option<PageRef> {
    let disk = DiskId::from_bytes(*plain.first_chunk()?);
    let (first, end) = Page::bounds(plain, PageKind::Leaf)?;
    Some(PageRef { disk, first, end, frame: at.frame, offset: at.offset, len: at.len })
}

/// What would refer to an inner page, and its level. What it refers to itself was met before.
fn inner_ref(plain: &[u8], at: FrameAt, loose: &Loose) -> Option<(PageRef, u8)> {
    let disk = DiskId::from_bytes(*plain.first_chunk()?);
    let (level, refs) = (*plain.get(16)?, plain.get(24..)?);
    let number = |raw: &[u8], at: usize| {
        raw.get(at..at + 8).map(|b| b.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    let first = number(refs, 0)?;
    let end = number(refs.rchunks_exact(32).next()?, 8)?;
    (level > 0 && !loose.is_empty())
        .then_some((PageRef { disk, first, end, frame: at.frame, offset: at.offset, len: at.len }, level))
}
