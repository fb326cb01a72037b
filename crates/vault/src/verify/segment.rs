//! One segment: every frame authentic, every block as its hash says, the index exactly what the chunks hold.
//! Memory: the segment's index twice, and 8 MiB of it.

use super::{Place, Report};
use crate::{
    Result, SegmentRef, VaultError,
    runs::Kind,
    segment::{Footer, FrameKind, IndexBuilder, Page, PageKind, SegmentReader, Walked},
};
use highwater_delta::{ChunkView, CommitId, DiskId};

/// Checks a segment. `reference`: as a record has it, or with nothing but what is known of it without one. What was read before
/// damage was found is counted too.
pub(super) async fn check(
    place: &Place<'_>,
    kind: Kind,
    reference: &SegmentRef,
    report: &mut Report,
) -> Result<()> {
    let reader = SegmentReader::new(place.vault.store().clone(), place.machine, place.keys, kind, reference)?;
    let what = reader.path.clone();
    let corrupt = |cause: &str| VaultError::corrupt(&what, cause);
    let mut content = Vec::new();
    // What an index over the chunks has to say.
    let mut index = IndexBuilder::default();
    let mut pages: Vec<Walked> = Vec::new();
    let mut footer: Option<Footer> = None;
    let mut chunks: u32 = 0;
    let walked = reader
        .walk(place.pace, |frame| {
            if footer.is_some() {
                return Err(corrupt("a frame behind its footer"));
            }
            match frame.kind {
                FrameKind::Chunk if pages.is_empty() => {
                    let refuse = |e: highwater_delta::ChunkError| {
                        VaultError::corrupt(&what, format!("frame {}: {e}", frame.at.frame))
                    };
                    let view = ChunkView::parse(&frame.plain).map_err(refuse)?;
                    view.open(&place.keys.hash, &mut content).map_err(refuse)?;
                    chunks += 1;
                    report.chunks += 1;
                    report.blocks += view.data_blocks() as u64;
                    index.add(&view, frame.at.frame, frame.at.offset, frame.at.len);
                }
                FrameKind::Chunk => return Err(corrupt("a chunk behind its index")),
                FrameKind::Page => pages.push(frame),
                FrameKind::Leaf | FrameKind::Inner | FrameKind::Table => {
                    return Err(corrupt("a frame of a map"));
                }
                FrameKind::Footer => footer = Some(reader.parse_footer(&frame.plain)?),
            }
            Ok(())
        })
        .await;
    walked?;
    let Some(footer) = footer else { return Err(corrupt("no footer")) };
    if footer.chunks != chunks || footer.pages.len() != pages.len() {
        return Err(corrupt("its footer does not count what is there"));
    }
    for (page, frame) in footer.pages.iter().zip(&pages) {
        if page.at() != frame.at {
            return Err(corrupt("its footer names a page that is elsewhere"));
        }
        Page::decode(&frame.plain, PageKind::Segment, page, &what)?;
    }
    let built = index.build();
    if (built.data_blocks, built.zero_blocks) != (footer.data_blocks, footer.zero_blocks) {
        return Err(corrupt("its footer miscounts blocks"));
    }
    let stated = pages.iter().map(|frame| &frame.plain[..]);
    if by_disk(stated) != by_disk(built.pages.iter().map(|(.., plain)| &plain[..])) {
        return Err(corrupt("its index does not fit its chunks"));
    }
    // Readers pass an object over by these.
    if reference.commit != CommitId::NONE && built.spans != reference.spans {
        return Err(corrupt("it holds other blocks than its record says"));
    }
    Ok(())
}

/// The entries of pages, as bytes, with their number, for each disk: where a page ends does not matter.
fn by_disk<'a>(pages: impl Iterator<Item = &'a [u8]>) -> Vec<(DiskId, u64, Vec<u8>)> {
    let mut disks: Vec<(DiskId, u64, Vec<u8>)> = Vec::new();
    for page in pages {
        let Some((disk, count, entries)) = Page::parts(page) else { continue };
        match disks.last_mut().filter(|(last, ..)| *last == disk) {
            Some((_, sum, all)) => {
                *sum += u64::from(count);
                all.extend_from_slice(entries);
            }
            None => disks.push((disk, u64::from(count), entries.to_vec())),
        }
    }
    disks
}
