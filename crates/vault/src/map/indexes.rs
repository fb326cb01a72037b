//! What the objects of a map say of blocks: footers and pages, through the vault's cache.
//!
//! A footer that is not at hand is read together with what lies before it: of small objects all pages, of larger ones the page over all
//! others. A far store is waited for once less, or twice.

use super::{BlockMap, Source};
use crate::{
    Result, VaultError,
    maps::{Inner, MapFooter, SegmentRow, TableRef, decode_table},
    pages::Cached,
    runs::Kind,
    segment::{Footer, FrameKind, Page, PageKind, PageRef, Tail},
};
use std::sync::Arc;

/// Bytes read with a footer, before it.
const TAIL_BYTES: u64 = 64 << 10;

/// Where an object says that blocks of a range are, or why it cannot be read what it says of some.
pub(super) struct Found {
    pub(super) first: u64,
    pub(super) end: u64,
    pub(super) page: Result<Arc<Page>>,
}

impl Found {
    /// # Errors
    /// The store failed: that says nothing of what is stored.
    fn of(reference: &PageRef, page: Result<Arc<Page>>) -> Result<Self> {
        match page {
            Err(error @ VaultError::Store(_)) => Err(error),
            page => Ok(Self { first: reference.first, end: reference.end, page }),
        }
    }
}

impl BlockMap {
    /// The pages of an object that touch a range.
    pub(super) async fn pages(&self, source: &Source, from: u64, to: u64) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        let whole = |error| Found { first: source.first, end: source.end, page: Err(error) };
        if source.kind != Kind::Map {
            let (footer, tail) = match self.footer(source).await {
                Ok(read) => read,
                Err(error @ VaultError::Store(_)) => return Err(error),
                Err(error) => return Ok(vec![whole(error)]),
            };
            let own = footer.pages.partition_point(|page| page.disk < self.inner.disk);
            let own = footer.pages[own..].iter().take_while(|page| page.disk == self.inner.disk);
            for reference in own.skip_while(|page| page.end <= from).take_while(|page| page.first < to) {
                let page = self.page(source, PageKind::Segment, reference, &tail).await;
                found.push(Found::of(reference, page)?);
            }
            return Ok(found);
        }
        let (footer, tail) = match self.map_footer(source).await {
            Ok(read) => read,
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(error) => return Ok(vec![whole(error)]),
        };
        let own = footer.disks.iter().find(|disk| disk.root.disk == self.inner.disk);
        let mut stack: Vec<(PageRef, u8)> =
            own.map(|disk| (disk.root.clone(), disk.level)).into_iter().collect();
        while let Some((reference, level)) = stack.pop() {
            if level == 0 {
                let page = self.page(source, PageKind::Leaf, &reference, &tail).await;
                found.push(Found::of(&reference, page)?);
                continue;
            }
            let inner = match self.inner_page(source, level, &reference, &tail).await {
                Ok(inner) => inner,
                Err(error) => {
                    found.push(Found::of(&reference, Err(error))?);
                    continue;
                }
            };
            let begin = stack.len();
            stack.extend(inner.touching(from, to).map(|page| (page.clone(), level - 1)));
            stack[begin..].reverse();
        }
        Ok(found)
    }

    async fn page(
        &self,
        source: &Source,
        kind: PageKind,
        reference: &PageRef,
        tail: &Tail,
    ) -> Result<Arc<Page>> {
        let key = (source.reader.reference.id, reference.frame);
        if let Some(Cached::Page(page)) = self.inner.cache.get(key) {
            return Ok(page);
        }
        let page = Arc::new(source.reader.page(reference, kind, tail).await?);
        self.inner.cache.put(key, Cached::Page(page.clone()));
        Ok(page)
    }

    async fn inner_page(
        &self,
        source: &Source,
        level: u8,
        reference: &PageRef,
        tail: &Tail,
    ) -> Result<Arc<Inner>> {
        let key = (source.reader.reference.id, reference.frame);
        if let Some(Cached::Inner(inner)) = self.inner.cache.get(key) {
            return Ok(inner);
        }
        let plain = source.reader.one_of(tail, reference.at(), FrameKind::Inner).await?;
        let inner = Arc::new(Inner::decode(&plain, level, reference, &source.reader.path)?);
        self.inner.cache.put(key, Cached::Inner(inner.clone()));
        Ok(inner)
    }

    /// With what was read besides, if it was read now.
    async fn footer(&self, source: &Source) -> Result<(Arc<Footer>, Tail)> {
        let key = (source.reader.reference.id, source.reader.reference.footer_frame);
        if let Some(Cached::Footer(footer)) = self.inner.cache.get(key) {
            return Ok((footer, Tail::default()));
        }
        let (plain, tail) = source.reader.footer_frame_and_tail(TAIL_BYTES).await?;
        let footer = Arc::new(source.reader.parse_footer(&plain)?);
        self.inner.cache.put(key, Cached::Footer(footer.clone()));
        Ok((footer, tail))
    }

    /// The same. Tables that were read besides are kept: whoever finds a block wants to know its segment next.
    async fn map_footer(&self, source: &Source) -> Result<(Arc<MapFooter>, Tail)> {
        let key = (source.reader.reference.id, source.reader.reference.footer_frame);
        if let Some(Cached::MapFooter(footer)) = self.inner.cache.get(key) {
            return Ok((footer, Tail::default()));
        }
        let (plain, tail) = source.reader.footer_frame_and_tail(TAIL_BYTES).await?;
        let footer = Arc::new(MapFooter::decode(&plain, &source.reader.path)?);
        self.inner.cache.put(key, Cached::MapFooter(footer.clone()));
        for table in footer.tables.iter().filter(|table| tail.has(table.at())) {
            // One that is damaged matters only to whoever needs it.
            let _ = self.table(source, table, &tail).await;
        }
        Ok((footer, tail))
    }

    /// The segment that a map names by this number.
    pub(super) async fn row(&self, source: &Source, number: u32) -> Result<SegmentRow> {
        let (footer, tail) = self.map_footer(source).await?;
        let lacking = || VaultError::corrupt(&source.reader.path, "an entry names a segment that it lacks");
        let (table, at) = footer.table_of(number).ok_or_else(lacking)?;
        let rows = self.table(source, table, &tail).await?;
        rows.get(at).cloned().ok_or_else(lacking)
    }

    async fn table(&self, source: &Source, table: &TableRef, tail: &Tail) -> Result<Arc<Vec<SegmentRow>>> {
        let key = (source.reader.reference.id, table.frame);
        if let Some(Cached::Table(rows)) = self.inner.cache.get(key) {
            return Ok(rows);
        }
        let plain = source.reader.one_of(tail, table.at(), FrameKind::Table).await?;
        let rows = Arc::new(decode_table(&plain, table, &source.reader.path)?);
        self.inner.cache.put(key, Cached::Table(rows.clone()));
        Ok(rows)
    }
}
