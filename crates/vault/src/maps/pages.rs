//! What the frames of a map hold, besides leaves (which are index pages with wider entries). Pure.

use super::{INNER_REFS_MAX, TABLE_ROWS_MAX};
use crate::{
    Result, VaultError,
    record::SegmentRef,
    runs::Kind,
    segment::{FrameAt, PageRef, array},
};
use highwater_delta::{CommitId, DiskId, SegmentId};
use serde::{Deserialize, Serialize};

const HEADER_BYTES: usize = 24;
const REF_BYTES: usize = 32;

/// An inner page, decoded: what lies beneath it, sorted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Inner {
    pub(crate) refs: Vec<PageRef>,
}

impl Inner {
    /// The page over `refs`, of one disk and sorted; `level` is 1 over leaves.
    pub(crate) fn encode(disk: DiskId, level: u8, refs: &[PageRef]) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + refs.len() * REF_BYTES);
        out.extend_from_slice(disk.as_bytes());
        out.extend_from_slice(&[level, 0, 0, 0]);
        out.extend_from_slice(&(refs.len() as u32).to_le_bytes());
        for page in refs {
            out.extend_from_slice(&page.first.to_le_bytes());
            out.extend_from_slice(&page.end.to_le_bytes());
            out.extend_from_slice(&page.frame.to_le_bytes());
            out.extend_from_slice(&page.len.to_le_bytes());
            out.extend_from_slice(&page.offset.to_le_bytes());
        }
        out
    }

    /// Decodes and checks the page that `at` refers to; `what` is for errors.
    pub(crate) fn decode(bytes: &[u8], level: u8, at: &PageRef, what: &dyn ToString) -> Result<Self> {
        let corrupt = |cause: &str| VaultError::corrupt(what.to_string(), format!("inner page: {cause}"));
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(corrupt("too short"));
        };
        let count = u32::from_le_bytes(array(header, 20)) as usize;
        let fits = header[..16] == at.disk.as_bytes()[..] && header[16..20] == [level, 0, 0, 0];
        if !fits || count == 0 || count > INNER_REFS_MAX || rest.len() != count * REF_BYTES {
            return Err(corrupt("its header does not fit"));
        }
        let refs: Vec<PageRef> = rest
            .chunks_exact(REF_BYTES)
            .map(|raw| PageRef {
                disk: at.disk,
                first: u64::from_le_bytes(array(raw, 0)),
                end: u64::from_le_bytes(array(raw, 8)),
                frame: u32::from_le_bytes(array(raw, 16)),
                len: u32::from_le_bytes(array(raw, 20)),
                offset: u64::from_le_bytes(array(raw, 24)),
            })
            .collect();
        let sorted = refs.windows(2).all(|w| w[0].end <= w[1].first) && refs.iter().all(|r| r.first < r.end);
        if !sorted || refs[0].first != at.first || refs[count - 1].end != at.end {
            return Err(corrupt("references out of order"));
        }
        Ok(Self { refs })
    }

    /// Those that touch `from..to`.
    pub(crate) fn touching(&self, from: u64, to: u64) -> impl Iterator<Item = &PageRef> {
        let begin = self.refs.partition_point(|page| page.end <= from);
        self.refs[begin..].iter().take_while(move |page| page.first < to)
    }
    pub(crate) fn memory_bytes(&self) -> usize {
        self.refs.len() * size_of::<PageRef>() + 64
    }
}

/// A segment that a map's entries name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentRow {
    pub(crate) id: SegmentId,
    pub(crate) kind: Kind,
    pub(crate) salt: [u8; 16],
    pub(crate) bytes: u64,
    /// Data blocks in its own index.
    pub(crate) blocks: u64,
    /// Those of them that this map names.
    pub(crate) live: u64,
}

impl SegmentRow {
    /// Enough of a reference to read its chunks.
    pub(crate) fn reference(&self) -> SegmentRef {
        SegmentRef {
            id: self.id,
            commit: CommitId::NONE,
            bytes: self.bytes,
            salt: self.salt,
            footer_offset: 0,
            footer_len: 0,
            footer_frame: 0,
            spans: Vec::new(),
        }
    }
}

/// A map's footer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapFooter {
    /// Sorted by disk.
    pub(crate) disks: Vec<MapDisk>,
    pub(crate) tables: Vec<TableRef>,
}

/// What a map holds of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapDisk {
    /// The page over everything: 0 if it is a leaf, else its level.
    pub(crate) level: u8,
    pub(crate) root: PageRef,
    pub(crate) data_blocks: u64,
    pub(crate) zero_blocks: u64,
}

/// Where rows of the table lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TableRef {
    /// Number of the first.
    pub(crate) first: u32,
    pub(crate) rows: u32,
    pub(crate) frame: u32,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl TableRef {
    pub(crate) const fn at(&self) -> FrameAt {
        FrameAt { offset: self.offset, len: self.len, frame: self.frame }
    }
}

impl MapFooter {
    pub(crate) fn decode(plain: &[u8], what: &dyn ToString) -> Result<Self> {
        let corrupt = |cause: String| VaultError::corrupt(what.to_string(), format!("footer: {cause}"));
        let footer: Self = postcard::from_bytes(plain).map_err(|e| corrupt(e.to_string()))?;
        let sorted = footer.disks.windows(2).all(|w| w[0].root.disk < w[1].root.disk);
        let mut next = 0_u32;
        let tables_fit = footer.tables.iter().all(|table| {
            let fits = table.first == next && table.rows > 0 && table.rows as usize <= TABLE_ROWS_MAX;
            next = next.saturating_add(table.rows);
            fits
        });
        if !sorted || !tables_fit || footer.disks.iter().any(|disk| disk.root.first >= disk.root.end) {
            return Err(corrupt("out of order".to_owned()));
        }
        Ok(footer)
    }

    /// Where a segment's row stands: the table, and its place in it.
    pub(crate) fn table_of(&self, segment: u32) -> Option<(&TableRef, usize)> {
        let at = self.tables.partition_point(|table| table.first + table.rows <= segment);
        self.tables.get(at).map(|table| (table, (segment - table.first) as usize))
    }
    pub(crate) fn memory_bytes(&self) -> usize {
        self.disks.len() * size_of::<MapDisk>() + self.tables.len() * size_of::<TableRef>() + 64
    }
}

/// Decodes the rows that `at` refers to.
pub(crate) fn decode_table(plain: &[u8], at: &TableRef, what: &dyn ToString) -> Result<Vec<SegmentRow>> {
    let corrupt = |cause: String| VaultError::corrupt(what.to_string(), format!("table: {cause}"));
    let rows: Vec<SegmentRow> = postcard::from_bytes(plain).map_err(|e| corrupt(e.to_string()))?;
    if rows.len() != at.rows as usize {
        return Err(corrupt("its footer miscounts it".to_owned()));
    }
    Ok(rows)
}
