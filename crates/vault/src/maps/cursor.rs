//! Going through an object's entries in order: a segment's or a map's.

use super::{
    Source,
    pages::{Inner, MapFooter, SegmentRow, decode_table},
};
use crate::{
    Result,
    key::MachineKeys,
    record::SegmentRef,
    runs::Kind,
    segment::{Entry, FrameKind, Page, PageKind, PageRef, SegmentReader, Window},
};
use highwater_delta::{DiskId, Fill, MachineId};
use object_store::ObjectStore;
use std::{collections::VecDeque, sync::Arc};

/// Pages of an index lie beside each other: so much is fetched at once.
const AHEAD_BYTES: u64 = 512 << 10;

/// See the module. Memory: [`AHEAD_BYTES`], a page, and the references of a page of each level.
pub(crate) struct Cursor {
    reader: SegmentReader,
    pages: PageKind,
    window: Window,
    /// Pages to come, the next one last, with their levels.
    stack: Vec<(PageRef, u8)>,
    /// Pages at hand, the next one first.
    ready: VecDeque<Arc<Page>>,
    page: Option<Arc<Page>>,
    next: usize,
    head: Option<Entry>,
}

impl Cursor {
    /// At the first entry. Answers also the segments that its entries name, by their numbers.
    pub(crate) async fn open(
        store: &Arc<dyn ObjectStore>,
        machine: MachineId,
        keys: &MachineKeys,
        source: Source,
    ) -> Result<(Self, Vec<SegmentRow>)> {
        let Source { kind, object: reference, pages: given } = source;
        let reader = SegmentReader::new(store.clone(), machine, keys, kind, &reference)?;
        let mut window = Window::new(AHEAD_BYTES);
        let ready: VecDeque<Arc<Page>> = given.iter().flatten().cloned().collect();
        let (pages, stack, rows) = if given.is_some() {
            let entries = ready.iter().flat_map(|page| &page.entries);
            let data = entries.filter(|entry| entry.fill == Fill::Data);
            let blocks = data.map(|entry| u64::from(entry.count)).sum();
            let SegmentRef { id, salt, bytes, .. } = reference;
            (PageKind::Segment, Vec::new(), vec![SegmentRow { id, kind, salt, bytes, blocks, live: blocks }])
        } else if kind == Kind::Map {
            let footer = MapFooter::decode(&reader.footer_frame().await?, &reader.path)?;
            let rows = table(&reader, &mut window, &footer).await?;
            let roots = footer.disks.into_iter().rev().map(|disk| (disk.root, disk.level)).collect();
            (PageKind::Leaf, roots, rows)
        } else {
            let footer = reader.footer().await?;
            let row = SegmentRow {
                id: reference.id,
                kind,
                salt: reference.salt,
                bytes: reference.bytes,
                blocks: footer.data_blocks,
                live: footer.data_blocks,
            };
            let leaves = footer.pages.into_iter().rev().map(|page| (page, 0)).collect();
            (PageKind::Segment, leaves, vec![row])
        };
        let mut cursor = Self { reader, pages, window, stack, ready, page: None, next: 0, head: None };
        cursor.advance().await?;
        Ok((cursor, rows))
    }

    /// The entry that it is at, with the page that has its hashes.
    pub(crate) fn head(&self) -> Option<(&Entry, &Arc<Page>)> {
        self.head.as_ref().zip(self.page.as_ref())
    }
    /// Disk and first block of that.
    pub(crate) fn position(&self) -> Option<(DiskId, u64)> {
        self.head().map(|(entry, page)| (page.disk, entry.start))
    }

    /// Goes on to the first entry, or part of one, that is not before a block of the disk that it is at.
    pub(crate) async fn skip_to(&mut self, block: u64) -> Result<()> {
        let disk = self.position().map(|(disk, _)| disk);
        loop {
            match &mut self.head {
                Some(entry) if self.page.as_ref().map(|page| page.disk) == disk && entry.start < block => {
                    if entry.end() > block {
                        *entry = entry.part(block, entry.end());
                        return Ok(());
                    }
                }
                _ => return Ok(()),
            }
            self.advance().await?;
        }
    }

    async fn advance(&mut self) -> Result<()> {
        loop {
            if let Some(entry) = self.page.as_ref().and_then(|page| page.entries.get(self.next)) {
                self.head = Some(*entry);
                self.next += 1;
                return Ok(());
            }
            if let Some(page) = self.ready.pop_front() {
                self.page = Some(page);
                self.next = 0;
                continue;
            }
            let Some((reference, level)) = self.stack.pop() else {
                self.head = None;
                self.page = None;
                return Ok(());
            };
            if level > 0 {
                let plain = self.window.frame(&self.reader, reference.at(), FrameKind::Inner).await?;
                let inner = Inner::decode(&plain, level, &reference, &self.reader.path)?;
                self.stack.extend(inner.refs.into_iter().rev().map(|page| (page, level - 1)));
                continue;
            }
            let kind = if self.pages == PageKind::Leaf { FrameKind::Leaf } else { FrameKind::Page };
            let plain = self.window.frame(&self.reader, reference.at(), kind).await?;
            self.page = Some(Arc::new(Page::decode(&plain, self.pages, &reference, &self.reader.path)?));
            self.next = 0;
        }
    }

    /// Bytes fetched since this was asked last.
    pub(crate) fn take_fetched(&mut self) -> u64 {
        self.window.take_fetched()
    }
}

/// All rows of a map.
async fn table(reader: &SegmentReader, window: &mut Window, footer: &MapFooter) -> Result<Vec<SegmentRow>> {
    let mut rows = Vec::new();
    for table in &footer.tables {
        let plain = window.frame(reader, table.at(), FrameKind::Table).await?;
        rows.extend(decode_table(&plain, table, &reader.path)?);
    }
    Ok(rows)
}

/// The segments that a map names.
pub(crate) async fn rows(reader: &SegmentReader) -> Result<Vec<SegmentRow>> {
    let footer = MapFooter::decode(&reader.footer_frame().await?, &reader.path)?;
    table(reader, &mut Window::new(AHEAD_BYTES), &footer).await
}
