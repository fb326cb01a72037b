//! Entries of maps against the indexes of the segments that they name: a map is what readers believe, and a wrong place or hash in it
//! is found here without anybody having to read the block.
//!
//! Memory: 32 MiB of index pages, and the footers of [`FOOTERS_MAX`] segments.

use super::{Place, Report};
use crate::{
    Result, SegmentRef, VaultError,
    maps::{MapDisk, MapFooter, Merge, Piece, SegmentRow, Source},
    pages::{Cached, PageCache},
    runs::{Kind, ObjectName},
    segment::{Footer, Page, PageKind, SegmentReader, Tail},
    store,
};
use highwater_delta::{DiskId, Fill, SegmentId};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

const PAGES_BYTES_MAX: usize = 32 << 20;
/// Footers have some 100 bytes a page.
const FOOTERS_MAX: usize = 4096;

/// The indexes of segments, as far as they were needed.
pub(super) struct Indexes {
    pages: PageCache,
    /// None: it cannot be read.
    known: HashMap<SegmentId, Option<Arc<Index>>>,
}

struct Index {
    reader: SegmentReader,
    footer: Footer,
}

impl Default for Indexes {
    fn default() -> Self {
        Self { pages: PageCache::new(PAGES_BYTES_MAX), known: HashMap::new() }
    }
}

/// What came of comparing a map.
pub(super) struct Compared {
    pub(super) entries: u64,
    /// All were compared, and none is missing of those that its footer, its tables and its record count.
    pub(super) all: bool,
}

/// Compares every entry of a map with the segment that it names, but for those in `lacking`. Segments whose index cannot be read are reported,
/// once each.
pub(super) async fn check(
    place: &Place<'_>,
    map: &SegmentRef,
    lacking: &HashSet<ObjectName>,
    indexes: &mut Indexes,
    report: &mut Report,
) -> Result<Compared> {
    let store = place.vault.store();
    let source = Source::new(Kind::Map, map.clone());
    let mut stream = Merge::new(store, place.machine, place.keys, place.pace, vec![source]);
    let (mut entries, mut all, mut counted) = (0, true, Counted::default());
    while let Some(piece) = stream.next().await? {
        entries += 1;
        counted.add(&piece);
        if piece.entry.fill == Fill::Zero {
            continue;
        }
        let row = stream.rows()[piece.entry.segment as usize].clone();
        if lacking.contains(&ObjectName { kind: row.kind, id: row.id }) {
            all = false;
            continue;
        }
        let fits = indexes.fits(place, &row, &piece).await;
        let Some(fits) = report.keep(Some(place.machine), fits)? else {
            all = false;
            continue;
        };
        if fits == Fits::Unknown {
            all = false;
        }
        if fits == Fits::No {
            let what = store::object_path(place.machine, Kind::Map, map.id);
            let cause =
                format!("what it says of block {} is not what segment {} holds", piece.entry.start, row.id);
            return Err(VaultError::corrupt(what, cause));
        }
    }
    let all = all && counted.fit(place, map, stream.rows()).await?;
    Ok(Compared { entries, all })
}

/// Blocks of a map's entries.
#[derive(Default)]
struct Counted {
    /// With content and without, by disk.
    disks: HashMap<DiskId, (u64, u64)>,
    /// With content, by segment.
    live: HashMap<u32, u64>,
}

impl Counted {
    fn add(&mut self, piece: &Piece) {
        let (data, zeros) = self.disks.entry(piece.disk).or_default();
        let blocks = u64::from(piece.entry.count);
        match piece.entry.fill {
            Fill::Zero => *zeros += blocks,
            Fill::Data => {
                *data += blocks;
                *self.live.entry(piece.entry.segment).or_default() += blocks;
            }
        }
    }

    /// Whether these are as many as the map's footer and tables say, and where its record says.
    async fn fit(&self, place: &Place<'_>, map: &SegmentRef, rows: &[SegmentRow]) -> Result<bool> {
        let store = place.vault.store().clone();
        let reader = SegmentReader::new(store, place.machine, place.keys, Kind::Map, map)?;
        let footer = MapFooter::decode(&reader.footer_frame().await?, &reader.path)?;
        let spans = footer.disks.iter().map(|disk| (disk.root.disk, disk.root.first, disk.root.end));
        let blocks =
            |disk: &MapDisk| self.disks.get(&disk.root.disk) == Some(&(disk.data_blocks, disk.zero_blocks));
        let live =
            |(number, row): (u32, &SegmentRow)| self.live.get(&number).copied().unwrap_or(0) == row.live;
        Ok(spans.eq(map.spans.iter().map(|span| (span.disk, span.first, span.end)))
            && footer.disks.len() == self.disks.len()
            && footer.disks.iter().all(blocks)
            && (0..).zip(rows).all(live))
    }
}

/// Whether an index says what a map says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fits {
    Yes,
    No,
    /// It cannot be read, and that was said.
    Unknown,
}

impl Indexes {
    /// Whether a segment's own index says what a piece of a map says. One that cannot be read fails once, and is not asked again.
    async fn fits(&mut self, place: &Place<'_>, row: &SegmentRow, piece: &Piece) -> Result<Fits> {
        let Some(index) = self.index(place, row).await? else { return Ok(Fits::Unknown) };
        let (mut block, mut hashes) = (piece.entry.start, piece.hashes().iter());
        while block < piece.entry.end() {
            let page = match self.page(&index, piece.disk, block).await {
                Ok(page) => page,
                Err(error) => {
                    self.known.insert(row.id, None);
                    return Err(error);
                }
            };
            let Some(page) = page else { return Ok(Fits::No) };
            let Some(entry) = page.touching(block, block + 1).next() else { return Ok(Fits::No) };
            let end = entry.end().min(piece.entry.end());
            let payload_block = u64::from(piece.entry.payload_block) + (block - piece.entry.start);
            let fits = entry.fill == Fill::Data
                && (entry.frame, entry.offset, entry.len)
                    == (piece.entry.frame, piece.entry.offset, piece.entry.len)
                && u64::from(entry.payload_block) + (block - entry.start) == payload_block;
            if !fits {
                return Ok(Fits::No);
            }
            let from = entry.hash_at as usize + (block - entry.start) as usize;
            let stated = &page.hashes[from..][..(end - block) as usize];
            if !hashes.by_ref().take(stated.len()).eq(stated) {
                return Ok(Fits::No);
            }
            block = end;
        }
        Ok(Fits::Yes)
    }

    async fn index(&mut self, place: &Place<'_>, row: &SegmentRow) -> Result<Option<Arc<Index>>> {
        if let Some(known) = self.known.get(&row.id) {
            return Ok(known.clone());
        }
        if self.known.len() >= FOOTERS_MAX {
            self.known.clear();
        }
        let index = Index::read(place, row).await;
        // What is said once of it is enough.
        self.known.insert(row.id, None);
        let index = Arc::new(index?);
        self.known.insert(row.id, Some(index.clone()));
        Ok(Some(index))
    }

    /// The page that holds a block, if there is one.
    async fn page(&self, index: &Index, disk: DiskId, block: u64) -> Result<Option<Arc<Page>>> {
        let pages = &index.footer.pages;
        let at = pages.partition_point(|page| (page.disk, page.end) <= (disk, block));
        let Some(reference) = pages.get(at).filter(|page| page.disk == disk && page.first <= block) else {
            return Ok(None);
        };
        let key = (index.reader.reference.id, reference.frame);
        if let Some(Cached::Page(page)) = self.pages.get(key) {
            return Ok(Some(page));
        }
        let page = Arc::new(index.reader.page(reference, PageKind::Segment, &Tail::default()).await?);
        self.pages.put(key, Cached::Page(page.clone()));
        Ok(Some(page))
    }
}

impl Index {
    async fn read(place: &Place<'_>, row: &SegmentRow) -> Result<Self> {
        let open = |reference: &SegmentRef| {
            let store = place.vault.store().clone();
            SegmentReader::new(store, place.machine, place.keys, row.kind, reference)
        };
        let reference = open(&row.reference())?.reference_of_trailer().await?;
        let reader = open(&reference)?;
        let footer = reader.footer().await?;
        if footer.data_blocks != row.blocks {
            return Err(VaultError::corrupt(
                &reader.path,
                "it holds another number of blocks than a map says",
            ));
        }
        Ok(Self { reader, footer })
    }
}
