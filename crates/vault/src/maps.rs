//! Maps: where the blocks of a stretch of history lie, over many segments.
//!
//! ```text
//! header (64) │ leaves, and inner pages over them │ tables of segments │ footer │ trailer (64)
//! ```
//!
//! A map is an object of frames, as a segment is, but holds no content. Its leaves are sorted by disk and block; each entry names a
//! segment by its number in the map's tables, a chunk in it, and the hashes of its blocks. Over the leaves of each disk stand inner
//! pages of at most [`INNER_REFS_MAX`] references each, in as many levels as it takes: a block is found by reading a page of
//! each level, however large the disk is. Maps that belong together do not overlap.

mod cursor;
mod merge;
mod pages;
mod rewrite;
mod write;

pub(crate) use cursor::{Cursor, rows};
pub(crate) use merge::{Merge, Piece, Source};
pub(crate) use pages::{Inner, MapDisk, MapFooter, SegmentRow, TableRef, decode_table};
pub(crate) use rewrite::{Output, Written};
pub(crate) use write::MapWriter;

/// Most references of an inner page.
pub(crate) const INNER_REFS_MAX: usize = 1024;
/// Most rows of a table's frame.
pub(crate) const TABLE_ROWS_MAX: usize = 1024;

/// When parts of a map are full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    /// Bytes of a leaf.
    pub(crate) leaf_bytes: usize,
    /// References of an inner page.
    pub(crate) inner_refs: usize,
    /// Rows of a table's frame.
    pub(crate) table_rows: usize,
    /// Bytes of a map; what comes then goes into another one.
    pub(crate) map_bytes: u64,
}

impl Fill {
    pub(crate) const DEFAULT: Self = Self {
        leaf_bytes: crate::segment::PAGE_BYTES_TARGET,
        inner_refs: INNER_REFS_MAX,
        table_rows: TABLE_ROWS_MAX,
        map_bytes: 256 << 20,
    };
    /// So little that a few blocks make several levels and maps.
    #[cfg(test)]
    pub(crate) const TINY: Self = Self { leaf_bytes: 256, inner_refs: 3, table_rows: 2, map_bytes: 3000 };
}
