//! The index of a segment: where each block's content is, and its hash. Pure.

use super::FrameAt;
use crate::{Result, VaultError, record::DiskSpan};
use highwater_delta::{BlockHash, CHUNK_BLOCKS_MAX, ChunkView, DiskId, Fill, chunk::BLOCK_END_MAX};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A segment is finished when its index has this many entries …
const ENTRIES_MAX: usize = 12 << 10;
/// … or hashes (192 MiB of content); collecting and building the index takes less than 4 MiB of memory then, which
/// [`crate::Vault::delta_bytes_max`] counts on.
const HASHES_MAX: usize = 48 << 10;
/// A page is closed at this size.
pub(crate) const PAGE_BYTES_TARGET: usize = 64 << 10;
const PAGE_HEADER_BYTES: usize = 20;
const ENTRY_BYTES: usize = 32;
/// In a map, with the segment's number at its end.
const LEAF_ENTRY_BYTES: usize = 36;

/// Consecutive blocks, and where their content lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) start: u64,
    pub(crate) count: u32,
    pub(crate) fill: Fill,
    /// Which data block of the chunk is the first of these.
    pub(crate) payload_block: u8,
    pub(crate) frame: u32,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    /// In a map: number of the segment, in the map's table; in a segment 0.
    pub(crate) segment: u32,
    /// Where the hashes of these blocks begin, in the page or the builder; meaningless for zeros.
    pub(crate) hash_at: u32,
}

impl Entry {
    pub(crate) const fn end(&self) -> u64 {
        self.start + self.count as u64
    }
    /// The part of it within `from..to`, which must not be empty.
    pub(crate) fn part(&self, from: u64, to: u64) -> Self {
        let skipped = from - self.start;
        let mut part = Self { start: from, count: (to - from) as u32, ..*self };
        if self.fill == Fill::Data {
            // At most 31 for data, so that it fits.
            part.payload_block += skipped as u8;
            part.hash_at += skipped as u32;
        }
        part
    }
}

/// Whose page it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    /// A segment's.
    Segment,
    /// A map's: a leaf.
    Leaf,
}

impl PageKind {
    const fn entry_bytes(self) -> usize {
        match self {
            Self::Segment => ENTRY_BYTES,
            Self::Leaf => LEAF_ENTRY_BYTES,
        }
    }
}

/// One page, as the footer names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PageRef {
    pub(crate) disk: DiskId,
    pub(crate) first: u64,
    pub(crate) end: u64,
    pub(crate) frame: u32,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl PageRef {
    pub(crate) const fn at(&self) -> FrameAt {
        FrameAt { offset: self.offset, len: self.len, frame: self.frame }
    }
}

/// A page, decoded.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) disk: DiskId,
    pub(crate) entries: Vec<Entry>,
    pub(crate) hashes: Vec<BlockHash>,
}

impl Page {
    /// The entries that touch `from..to`, in order.
    pub(crate) fn touching(&self, from: u64, to: u64) -> impl Iterator<Item = &Entry> {
        let begin = self.entries.partition_point(|entry| entry.end() <= from);
        self.entries[begin..].iter().take_while(move |entry| entry.start < to)
    }
    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry>() + self.hashes.len() * 16 + 64
    }

    /// A page's disk, how many entries it has, and these.
    pub(crate) fn parts(bytes: &[u8]) -> Option<(DiskId, u32, &[u8])> {
        let (header, entries) = bytes.split_first_chunk::<PAGE_HEADER_BYTES>()?;
        Some((DiskId::from_bytes(array(header, 0)), u32::from_le_bytes(array(header, 16)), entries))
    }

    /// The first block of a page's first entry, and the end of its last, if it has them.
    pub(crate) fn bounds(bytes: &[u8], kind: PageKind) -> Option<(u64, u64)> {
        let stated = u32::from_le_bytes(array(bytes.first_chunk::<PAGE_HEADER_BYTES>()?, 16));
        let mut rest = &bytes[PAGE_HEADER_BYTES..];
        let (mut first, mut end) = (None, 0);
        for _ in 0..stated {
            let (raw, after) = rest.split_at_checked(kind.entry_bytes())?;
            let (start, count) = (u64::from_le_bytes(array(raw, 0)), u32::from_le_bytes(array(raw, 8)));
            first.get_or_insert(start);
            end = start.checked_add(u64::from(count))?;
            rest = after.get(if raw[12] == 0 { count as usize * 16 } else { 0 }..)?;
        }
        first.map(|first| (first, end))
    }

    /// Decodes and checks a page; `what` is for errors.
    pub(crate) fn decode(bytes: &[u8], kind: PageKind, at: &PageRef, what: &dyn ToString) -> Result<Self> {
        let corrupt = |cause: &str| VaultError::corrupt(what.to_string(), format!("index page: {cause}"));
        let Some((header, mut rest)) = bytes.split_first_chunk::<PAGE_HEADER_BYTES>() else {
            return Err(corrupt("too short"));
        };
        let disk = DiskId::from_bytes(array(header, 0));
        let stated = u32::from_le_bytes(array(header, 16)) as usize;
        if disk != at.disk || stated == 0 || stated > rest.len() / kind.entry_bytes() {
            return Err(corrupt("its header does not fit"));
        }
        let mut page = Self { disk, entries: Vec::with_capacity(stated), hashes: Vec::new() };
        let mut end_before = 0;
        for _ in 0..stated {
            let Some((raw, after)) = rest.split_at_checked(kind.entry_bytes()) else {
                return Err(corrupt("cut off"));
            };
            rest = after;
            let entry = Entry {
                start: u64::from_le_bytes(array(raw, 0)),
                count: u32::from_le_bytes(array(raw, 8)),
                fill: match raw[12] {
                    0 => Fill::Data,
                    1 => Fill::Zero,
                    _ => return Err(corrupt("unknown fill")),
                },
                payload_block: raw[13],
                frame: u32::from_le_bytes(array(raw, 16)),
                len: u32::from_le_bytes(array(raw, 20)),
                offset: u64::from_le_bytes(array(raw, 24)),
                segment: if kind == PageKind::Leaf { u32::from_le_bytes(array(raw, 32)) } else { 0 },
                hash_at: page.hashes.len() as u32,
            };
            if entry.count == 0
                || entry.start < end_before
                || entry.start >= BLOCK_END_MAX
                || entry.end() > BLOCK_END_MAX
            {
                return Err(corrupt("entries out of order"));
            }
            end_before = entry.end();
            if entry.fill == Fill::Data {
                if entry.payload_block as usize + entry.count as usize > CHUNK_BLOCKS_MAX {
                    return Err(corrupt("an entry reaches behind its chunk"));
                }
                let Some((hashes, after)) = rest.split_at_checked(entry.count as usize * 16) else {
                    return Err(corrupt("hashes cut off"));
                };
                rest = after;
                page.hashes.extend(hashes.as_chunks::<16>().0.iter().map(|hash| BlockHash(*hash)));
            }
            page.entries.push(entry);
        }
        if !rest.is_empty() || page.entries[0].start != at.first || end_before != at.end {
            return Err(corrupt("it does not hold what the footer says"));
        }
        Ok(page)
    }
}

/// Collects what chunks of a segment hold.
#[derive(Default)]
pub(crate) struct IndexBuilder {
    entries: Vec<(DiskId, Entry)>,
    hashes: Vec<BlockHash>,
}

/// Pages, encoded, each with its disk, first block and end; and totals.
pub(crate) struct Built {
    pub(crate) pages: Vec<(DiskId, u64, u64, Vec<u8>)>,
    pub(crate) spans: Vec<DiskSpan>,
    pub(crate) data_blocks: u64,
    pub(crate) zero_blocks: u64,
}

impl IndexBuilder {
    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() >= ENTRIES_MAX || self.hashes.len() >= HASHES_MAX
    }

    pub(crate) fn add(&mut self, view: &ChunkView<'_>, frame: u32, offset: u64, len: u32) {
        let mut payload_block = 0;
        let hash_base = self.hashes.len() as u32;
        for extent in view.extents() {
            let (start, count, fill) = (extent.start.0, extent.count, extent.fill);
            let at = if fill == Fill::Data { payload_block } else { 0 };
            let hash_at = hash_base + u32::from(at);
            let entry =
                Entry { start, count, fill, payload_block: at, frame, offset, len, segment: 0, hash_at };
            self.entries.push((view.disk(), entry));
            if fill == Fill::Data {
                payload_block += count as u8;
            }
        }
        self.hashes.extend(view.hashes());
    }

    /// Sorts, lets the later of overlapping entries win, and encodes.
    pub(crate) fn build(self) -> Built {
        let mut disks: BTreeMap<DiskId, BTreeMap<u64, Entry>> = BTreeMap::new();
        for (disk, entry) in self.entries {
            overlay(disks.entry(disk).or_default(), entry);
        }
        let mut built = Built { pages: Vec::new(), spans: Vec::new(), data_blocks: 0, zero_blocks: 0 };
        for (disk, entries) in disks {
            let (mut body, mut count, mut first, mut end) = (Vec::new(), 0_u32, 0, 0);
            let span_first = entries.keys().next().copied().unwrap_or(0);
            let mut close = |body: &mut Vec<u8>, count: &mut u32, first: u64, end: u64| {
                let mut page = disk.as_bytes().to_vec();
                page.extend_from_slice(&count.to_le_bytes());
                page.append(body);
                *count = 0;
                built.pages.push((disk, first, end, page));
            };
            for entry in entries.values() {
                if count == 0 {
                    first = entry.start;
                }
                end = entry.end();
                count += 1;
                encode_entry(entry, PageKind::Segment, &self.hashes, &mut body);
                match entry.fill {
                    Fill::Data => built.data_blocks += u64::from(entry.count),
                    Fill::Zero => built.zero_blocks += u64::from(entry.count),
                }
                if body.len() >= PAGE_BYTES_TARGET {
                    close(&mut body, &mut count, first, end);
                }
            }
            if count > 0 {
                close(&mut body, &mut count, first, end);
            }
            built.spans.push(DiskSpan { disk, first: span_first, end });
        }
        built
    }
}

/// Puts `new` into a map of entries that do not overlap, cutting what it covers.
fn overlay(map: &mut BTreeMap<u64, Entry>, new: Entry) {
    let (from, to) = (new.start, new.end());
    let mut touched: Vec<Entry> = map.range(from..to).map(|(_, entry)| *entry).collect();
    if let Some((_, before)) = map.range(..from).next_back()
        && before.end() > from
    {
        touched.push(*before);
    }
    for old in touched {
        map.remove(&old.start);
        if old.start < from {
            map.insert(old.start, old.part(old.start, from));
        }
        if old.end() > to {
            map.insert(to, old.part(to, old.end()));
        }
    }
    map.insert(from, new);
}

/// Appends an entry to a page's body. `hashes`: where its `hash_at` points to.
pub(crate) fn encode_entry(entry: &Entry, kind: PageKind, hashes: &[BlockHash], out: &mut Vec<u8>) {
    out.extend_from_slice(&entry.start.to_le_bytes());
    out.extend_from_slice(&entry.count.to_le_bytes());
    out.extend_from_slice(&[u8::from(entry.fill == Fill::Zero), entry.payload_block, 0, 0]);
    out.extend_from_slice(&entry.frame.to_le_bytes());
    out.extend_from_slice(&entry.len.to_le_bytes());
    out.extend_from_slice(&entry.offset.to_le_bytes());
    if kind == PageKind::Leaf {
        out.extend_from_slice(&entry.segment.to_le_bytes());
    }
    if entry.fill == Fill::Data {
        for hash in &hashes[entry.hash_at as usize..][..entry.count as usize] {
            out.extend_from_slice(&hash.0);
        }
    }
}

pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}
