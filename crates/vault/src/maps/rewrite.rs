//! What a merge writes: maps, and the content of segments of which too little is still needed, in new segments.
//!
//! Content is checked against its hashes where it is read, and encoded anew, in the order of the disk. Memory: a map's leaf,
//! a segment's index and part of an upload, [`WINDOWS_MAX`] pieces of segments that are read, and entries that wait for the chunk
//! before them ([`WAITING_MAX`]).
//!
//! **Cancellation, failure.** What was finished stays in the store, named by nobody; the machine's next maintainer deletes it.

use super::{Fill as Full, MapWriter, Piece, SegmentRow};
use crate::{
    Result, Vault, VaultError,
    key::MachineKeys,
    pace::Pace,
    record::SegmentRef,
    runs::Kind,
    segment::{Entry, FrameAt, FrameKind, SegmentReader, SegmentWriter, Window},
};
use highwater_delta::{
    BLOCK_BYTES, Block, BlockHash, CHUNK_BLOCKS_MAX, ChunkEncoder, ChunkView, DiskId, Extent, Fill,
    MachineId, SegmentId,
};
use std::collections::{HashMap, HashSet};

/// Segments whose content is at hand in pieces.
const WINDOWS_MAX: usize = 256;
/// What they hold together, about: few large ones or many small ones. Too few, and each piece would be fetched again for every
/// chunk of it, since what is near on the disk lies in many segments.
const WINDOWS_BYTES: u64 = 16 << 20;
const WINDOW_BYTES_MAX: u64 = 1 << 20;
/// Entries that may wait for a chunk to be full.
const WAITING_MAX: usize = 4096;
/// Extents of a chunk that is encoded anew.
const EXTENTS_MAX: usize = 256;
/// As the agents do by default.
const COMPRESSION_LEVEL: i32 = 1;

/// See the module.
pub(crate) struct Output<'a> {
    vault: &'a Vault,
    machine: MachineId,
    keys: &'a MachineKeys,
    pace: &'a Pace,
    /// Segments whose content is written anew.
    doomed: HashSet<SegmentId>,
    full: Full,
    map: Option<MapWriter>,
    /// Of the map being written.
    rows: Vec<SegmentRow>,
    numbers: HashMap<SegmentId, u32>,
    finished: Vec<SegmentRef>,
    /// Of all maps, added up.
    held: HashMap<SegmentId, SegmentRow>,
    rewriter: Option<Rewriter>,
}

/// What a merge wrote.
pub(crate) struct Written {
    /// Durable.
    pub(crate) maps: Vec<SegmentRef>,
    /// All segments that they name.
    pub(crate) held: HashMap<SegmentId, SegmentRow>,
}

struct Rewriter {
    window_bytes: u64,
    encoder: ChunkEncoder,
    segment: Option<(SegmentWriter, u32)>,
    disk: Option<DiskId>,
    extents: Vec<Extent>,
    payload: Vec<u8>,
    /// Behind the first of the extents.
    waiting: Vec<(Entry, Vec<BlockHash>)>,
    reading: Vec<(SegmentId, SegmentReader, Window)>,
    chunk: Option<((SegmentId, u32), Vec<u8>)>,
    raw: Vec<u8>,
}

impl<'a> Output<'a> {
    pub(crate) fn new(
        vault: &'a Vault,
        machine: MachineId,
        keys: &'a MachineKeys,
        pace: &'a Pace,
        doomed: HashSet<SegmentId>,
        full: Full,
    ) -> Self {
        Self {
            vault,
            machine,
            keys,
            pace,
            doomed,
            full,
            map: None,
            rows: Vec::new(),
            numbers: HashMap::new(),
            finished: Vec::new(),
            held: HashMap::new(),
            rewriter: None,
        }
    }

    /// Takes the next piece of a merge; `rows` are that merge's.
    pub(crate) async fn push(&mut self, piece: &Piece, rows: &[SegmentRow]) -> Result<()> {
        if self.map.as_ref().is_some_and(|map| map.bytes() >= self.full.map_bytes) {
            self.close_map().await?;
        }
        if self.map.is_none() {
            self.map = Some(MapWriter::new(self.vault, self.machine, self.keys, self.full)?);
        }
        if self.rewriter.as_ref().is_some_and(|rewriter| rewriter.is_due(piece)) {
            self.flush().await?;
        }
        let mut entry = piece.entry;
        if entry.fill == Fill::Data {
            let row = &rows[entry.segment as usize];
            if self.doomed.contains(&row.id) {
                return self.rewrite(piece, row).await;
            }
            entry.segment = self.number(row)?;
        }
        match &mut self.rewriter {
            Some(rewriter) if !rewriter.extents.is_empty() => {
                rewriter.waiting.push((entry, piece.hashes().to_vec()));
                Ok(())
            }
            _ => self.write(piece.disk, entry, piece.hashes()).await,
        }
    }

    /// A segment's number in the map being written.
    fn number(&mut self, row: &SegmentRow) -> Result<u32> {
        if let Some(number) = self.numbers.get(&row.id) {
            return Ok(*number);
        }
        let number = u32::try_from(self.rows.len()).map_err(|_| VaultError::Limit("segments of a map"))?;
        self.rows.push(SegmentRow { live: 0, ..row.clone() });
        self.numbers.insert(row.id, number);
        Ok(number)
    }

    async fn write(&mut self, disk: DiskId, entry: Entry, hashes: &[BlockHash]) -> Result<()> {
        let Some(map) = &mut self.map else { return Ok(()) };
        let before = map.bytes();
        map.push(disk, entry, hashes).await?;
        let written = map.bytes() - before;
        if entry.fill == Fill::Data
            && let Some(row) = self.rows.get_mut(entry.segment as usize)
        {
            row.live += u64::from(entry.count);
        }
        self.pace.spend(written).await;
        Ok(())
    }

    /// Takes a piece's content into the chunk that is to be encoded.
    async fn rewrite(&mut self, piece: &Piece, row: &SegmentRow) -> Result<()> {
        if self.rewriter.is_none() {
            self.rewriter = Some(Rewriter::new(self.doomed.len())?);
        }
        let Some(rewriter) = &mut self.rewriter else { return Ok(()) };
        let store = self.vault.store();
        let reader =
            || SegmentReader::new(store.clone(), self.machine, self.keys, row.kind, &row.reference());
        let moved = rewriter.take(piece, row, reader, self.keys).await?;
        self.pace.spend(moved).await;
        Ok(())
    }

    /// Encodes the chunk that waits, and writes its entries and those behind it.
    async fn flush(&mut self) -> Result<()> {
        let Some(rewriter) = &mut self.rewriter else { return Ok(()) };
        let Some(disk) = rewriter.disk.take() else { return Ok(()) };
        let mut chunk = Vec::new();
        rewriter.encoder.encode(disk, &rewriter.extents, &rewriter.payload, &self.keys.hash, &mut chunk)?;
        rewriter.extents.clear();
        rewriter.payload.clear();
        let mut waiting = std::mem::take(&mut rewriter.waiting);
        let segment = rewriter.segment.take();
        let view = ChunkView::parse(&chunk)?;
        let (mut segment, number) = match segment {
            Some(open) => open,
            None => {
                let segment = SegmentWriter::new(self.vault, self.machine, self.keys, Kind::Rewritten)?;
                let (id, salt) = (segment.id(), segment.salt());
                // Its length and its blocks are known when it is finished.
                let row = SegmentRow { id, kind: Kind::Rewritten, salt, bytes: 0, blocks: 0, live: 0 };
                (segment, self.number(&row)?)
            }
        };
        let FrameAt { offset, len, frame } = segment.append(&chunk, &view).await?;
        self.pace.spend(u64::from(len)).await;
        let mut hashes = view.hashes();
        let mut payload_block = 0;
        for extent in view.extents() {
            let (start, count, fill) = (extent.start.0, extent.count, extent.fill);
            let entry =
                Entry { start, count, fill, payload_block, frame, offset, len, segment: number, hash_at: 0 };
            let own =
                if fill == Fill::Data { hashes.by_ref().take(count as usize).collect() } else { vec![] };
            if fill == Fill::Data {
                payload_block += count as u8;
            }
            waiting.push((entry, own));
        }
        waiting.sort_by_key(|(entry, _)| entry.start);
        for (entry, hashes) in waiting {
            self.write(disk, entry, &hashes).await?;
        }
        if segment.is_full() { self.close_segment(segment, number).await } else { self.keep(segment, number) }
    }

    fn keep(&mut self, segment: SegmentWriter, number: u32) -> Result<()> {
        if let Some(rewriter) = &mut self.rewriter {
            rewriter.segment = Some((segment, number));
        }
        Ok(())
    }

    async fn close_segment(&mut self, segment: SegmentWriter, number: u32) -> Result<()> {
        let (object, upload) = segment.close().await?;
        upload.complete().await?;
        if let Some(row) = self.rows.get_mut(number as usize) {
            // All that was written was needed, each block once.
            (row.bytes, row.blocks) = (object.bytes, row.live);
        }
        Ok(())
    }

    /// Finishes the map being written.
    async fn close_map(&mut self) -> Result<()> {
        self.flush().await?;
        if let Some((segment, number)) = self.rewriter.as_mut().and_then(|rewriter| rewriter.segment.take()) {
            self.close_segment(segment, number).await?;
        }
        let Some(map) = self.map.take() else { return Ok(()) };
        let (object, upload) = map.close(&self.rows).await?;
        upload.complete().await?;
        self.pace.spend(0).await;
        self.finished.push(object);
        self.numbers.clear();
        for row in self.rows.drain(..) {
            self.held.entry(row.id).and_modify(|known| known.live += row.live).or_insert(row);
        }
        Ok(())
    }

    /// Finishes everything.
    pub(crate) async fn finish(mut self) -> Result<Written> {
        self.close_map().await?;
        Ok(Written { maps: self.finished, held: self.held })
    }

    /// Gives up what is under way.
    pub(crate) async fn abort(self) {
        if let Some(map) = self.map {
            let _ = map.abort().await;
        }
        if let Some((segment, _)) = self.rewriter.and_then(|rewriter| rewriter.segment) {
            let _ = segment.abort().await;
        }
    }
}

impl Rewriter {
    /// For content of so many segments.
    fn new(segments: usize) -> Result<Self> {
        let windows = segments.clamp(1, WINDOWS_MAX) as u64;
        Ok(Self {
            window_bytes: (WINDOWS_BYTES / windows).min(WINDOW_BYTES_MAX),
            encoder: ChunkEncoder::new(COMPRESSION_LEVEL)?,
            segment: None,
            disk: None,
            extents: Vec::new(),
            payload: Vec::new(),
            waiting: Vec::new(),
            reading: Vec::new(),
            chunk: None,
            raw: Vec::new(),
        })
    }

    /// Whether the chunk must be encoded before this piece is taken.
    fn is_due(&self, piece: &Piece) -> bool {
        let blocks = self.payload.len() / BLOCK_BYTES + piece.entry.count as usize;
        self.disk.is_some_and(|disk| disk != piece.disk)
            || self.waiting.len() >= WAITING_MAX
            || self.extents.len() >= EXTENTS_MAX
            || (piece.entry.fill == Fill::Data && blocks > CHUNK_BLOCKS_MAX)
    }

    /// Takes a piece's content in; answers how many bytes were fetched.
    async fn take(
        &mut self,
        piece: &Piece,
        row: &SegmentRow,
        reader: impl Fn() -> Result<SegmentReader>,
        keys: &MachineKeys,
    ) -> Result<u64> {
        let Entry { start, count, frame, offset, len, payload_block, .. } = piece.entry;
        let mut fetched = 0;
        if self.chunk.as_ref().is_none_or(|(known, _)| *known != (row.id, frame)) {
            let at = match self.reading.iter().position(|(id, ..)| *id == row.id) {
                Some(at) => at,
                None => {
                    if self.reading.len() == WINDOWS_MAX {
                        self.reading.remove(0);
                    }
                    self.reading.push((row.id, reader()?, Window::new(self.window_bytes)));
                    self.reading.len() - 1
                }
            };
            // The one used last goes last.
            self.reading[at..].rotate_left(1);
            let Some((_, reader, window)) = self.reading.last_mut() else { return Ok(0) };
            let plain = window.frame(reader, FrameAt { offset, len, frame }, FrameKind::Chunk).await?;
            fetched = window.take_fetched();
            self.chunk = Some(((row.id, frame), plain));
            if let Some((_, chunk)) = &self.chunk {
                ChunkView::parse(chunk)?.decompress_into(&mut self.raw)?;
            }
        }
        let Some((_, chunk)) = &self.chunk else { return Ok(fetched) };
        let view = ChunkView::parse(chunk)?;
        let what = || format!("segment {}", row.id);
        let numbers = view.data_block_numbers().skip(usize::from(payload_block));
        let blocks = self.raw.as_chunks::<BLOCK_BYTES>().0.iter().skip(usize::from(payload_block));
        let mut taken = 0;
        for ((number, content), (wanted, hash)) in
            numbers.zip(blocks).zip((start..start + u64::from(count)).zip(piece.hashes()))
        {
            if number != Block(wanted) || view.disk() != piece.disk {
                return Err(VaultError::corrupt(what(), "an index does not fit its chunk"));
            }
            if keys.hash.hash(content) != *hash {
                return Err(VaultError::corrupt(what(), format!("block {wanted} has another hash")));
            }
            self.payload.extend_from_slice(content);
            taken += 1;
        }
        if taken != count {
            return Err(VaultError::corrupt(what(), "an index reaches behind its chunk"));
        }
        self.disk = Some(piece.disk);
        match self.extents.last_mut() {
            Some(last) if last.end() == start => last.count += count,
            _ => self.extents.push(Extent { start: Block(start), count, fill: Fill::Data }),
        }
        Ok(fetched)
    }
}
