//! Writing a map as a stream of entries, sorted by disk and block.

use super::{
    Fill as Full,
    pages::{Inner, MapDisk, MapFooter, SegmentRow, TableRef},
};
use crate::{
    Result, Vault, VaultError,
    key::MachineKeys,
    record::{DiskSpan, SegmentRef},
    runs::Kind,
    segment::{Entry, FrameAt, FrameKind, FrameWriter, PageKind, PageRef, Upload, encode_entry},
};
use highwater_delta::{BlockHash, DiskId, Fill, MachineId};

/// A map being written; see [`FrameWriter`]. Memory: a leaf, and an inner page's references of each level.
pub(crate) struct MapWriter {
    full: Full,
    frames: FrameWriter,
    open: Option<Open>,
    disks: Vec<MapDisk>,
    spans: Vec<DiskSpan>,
}

/// The disk being written.
struct Open {
    disk: DiskId,
    first: u64,
    /// Not in the leaf yet: the next one may continue it.
    last: Option<(Entry, Vec<BlockHash>)>,
    leaf: Leaf,
    /// References of leaves, of pages over leaves, and so on.
    levels: Vec<Vec<PageRef>>,
    data_blocks: u64,
    zero_blocks: u64,
}

#[derive(Default)]
struct Leaf {
    body: Vec<u8>,
    entries: u32,
    first: u64,
    end: u64,
}

impl MapWriter {
    pub(crate) fn new(vault: &Vault, machine: MachineId, keys: &MachineKeys, full: Full) -> Result<Self> {
        let frames = FrameWriter::new(vault, machine, keys, Kind::Map)?;
        Ok(Self { full, frames, open: None, disks: Vec::new(), spans: Vec::new() })
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.frames.bytes()
    }

    /// Adds an entry behind all before it, with the hashes of its blocks if it has data.
    pub(crate) async fn push(&mut self, disk: DiskId, entry: Entry, hashes: &[BlockHash]) -> Result<()> {
        if self.open.as_ref().is_some_and(|open| open.disk != disk) {
            self.close_disk().await?;
        }
        let open = self.open.get_or_insert_with(|| Open {
            disk,
            first: entry.start,
            last: None,
            leaf: Leaf::default(),
            levels: vec![Vec::new()],
            data_blocks: 0,
            zero_blocks: 0,
        });
        match entry.fill {
            Fill::Data => open.data_blocks += u64::from(entry.count),
            Fill::Zero => open.zero_blocks += u64::from(entry.count),
        }
        if let Some((last, known)) = &mut open.last {
            if continues(last, &entry) {
                last.count += entry.count;
                known.extend_from_slice(hashes);
                return Ok(());
            }
            if entry.start < last.end() {
                return Err(VaultError::Order("entries of a map out of order"));
            }
        }
        let before = open.last.replace((entry, hashes.to_vec()));
        self.keep(before).await
    }

    /// Takes a whole entry into the leaf, which is closed when it is full.
    async fn keep(&mut self, entry: Option<(Entry, Vec<BlockHash>)>) -> Result<()> {
        let (Some((mut entry, hashes)), Some(open)) = (entry, &mut self.open) else { return Ok(()) };
        entry.hash_at = 0;
        let leaf = &mut open.leaf;
        if leaf.entries == 0 {
            leaf.first = entry.start;
        }
        leaf.end = entry.end();
        leaf.entries += 1;
        encode_entry(&entry, PageKind::Leaf, &hashes, &mut leaf.body);
        if leaf.body.len() >= self.full.leaf_bytes { self.close_leaf().await } else { Ok(()) }
    }

    async fn close_leaf(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let Leaf { body, entries, first, end } = std::mem::take(&mut open.leaf);
        if entries == 0 {
            return Ok(());
        }
        let mut plain = open.disk.as_bytes().to_vec();
        plain.extend_from_slice(&entries.to_le_bytes());
        plain.extend_from_slice(&body);
        let FrameAt { offset, len, frame } = self.frames.append(FrameKind::Leaf, &plain).await?;
        open.levels[0].push(PageRef { disk: open.disk, first, end, frame, offset, len });
        let mut level = 0;
        while self.open.as_ref().is_some_and(|open| open.levels[level].len() >= self.full.inner_refs) {
            self.close_inner(level).await?;
            level += 1;
        }
        Ok(())
    }

    /// Puts a page over the references of a level, and a reference to it into the next one.
    async fn close_inner(&mut self, level: usize) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let refs = std::mem::take(&mut open.levels[level]);
        let (Some(begin), Some(last)) = (refs.first(), refs.last()) else { return Ok(()) };
        let (disk, first, end) = (open.disk, begin.first, last.end);
        let over = u8::try_from(level + 1).map_err(|_| VaultError::Limit("levels of a map"))?;
        let plain = Inner::encode(disk, over, &refs);
        let FrameAt { offset, len, frame } = self.frames.append(FrameKind::Inner, &plain).await?;
        if open.levels.len() == level + 1 {
            open.levels.push(Vec::new());
        }
        open.levels[level + 1].push(PageRef { disk, first, end, frame, offset, len });
        Ok(())
    }

    async fn close_disk(&mut self) -> Result<()> {
        let last = self.open.as_mut().and_then(|open| open.last.take());
        self.keep(last).await?;
        self.close_leaf().await?;
        let mut level = 0;
        loop {
            let Some(open) = &self.open else { return Ok(()) };
            let is_top = open.levels.len() == level + 1;
            if is_top && open.levels[level].len() == 1 {
                break;
            }
            self.close_inner(level).await?;
            level += 1;
        }
        let Some(mut open) = self.open.take() else { return Ok(()) };
        if let Some(root) = open.levels.pop().and_then(|mut top| top.pop()) {
            self.spans.push(DiskSpan { disk: open.disk, first: open.first, end: root.end });
            let Open { data_blocks, zero_blocks, .. } = open;
            self.disks.push(MapDisk { level: level as u8, root, data_blocks, zero_blocks });
        }
        Ok(())
    }

    /// Writes the tables and the footer. `rows`: the segments, by the numbers that the entries name.
    pub(crate) async fn close(mut self, rows: &[SegmentRow]) -> Result<(SegmentRef, Upload)> {
        self.close_disk().await?;
        let Self { full, mut frames, disks, spans, .. } = self;
        let (mut tables, mut first) = (Vec::new(), 0);
        for rows in rows.chunks(full.table_rows) {
            let plain = postcard::to_stdvec(rows).map_err(|_| VaultError::Limit("bytes of a table"))?;
            let FrameAt { offset, len, frame } = frames.append(FrameKind::Table, &plain).await?;
            let count = rows.len() as u32;
            tables.push(TableRef { first, rows: count, frame, offset, len });
            first += count;
        }
        let plain = postcard::to_stdvec(&MapFooter { disks, tables })
            .map_err(|_| VaultError::Limit("bytes of a footer"))?;
        frames.close(&plain, spans)
    }

    /// Gives it up; nothing stays in the store.
    pub(crate) async fn abort(self) -> Result<()> {
        self.frames.abort().await
    }
}

/// Whether an entry is the continuation of another, so that both can be one.
fn continues(last: &Entry, next: &Entry) -> bool {
    if last.end() != next.start || last.fill != next.fill || last.count.checked_add(next.count).is_none() {
        return false;
    }
    match last.fill {
        Fill::Zero => true,
        Fill::Data => {
            (last.segment, last.frame, last.offset) == (next.segment, next.frame, next.offset)
                && u32::from(last.payload_block) + last.count == u32::from(next.payload_block)
        }
    }
}
