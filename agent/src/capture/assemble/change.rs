//! Changes that the stream tells: into whole blocks, or parts of them.

use super::{Assembler, BLOCK, Broken, in_flight::Met, partial::Partial};
use highwater_abi::stream::Header;
use highwater_delta::BLOCK_BYTES;

/// What is written into a block.
#[derive(Clone, Copy)]
enum Piece<'p> {
    Data(&'p [u8]),
    Zeros(usize),
}

impl Piece<'_> {
    fn len(self) -> usize {
        match self {
            Self::Data(bytes) => bytes.len(),
            Self::Zeros(count) => count,
        }
    }
    fn write(self, content: &mut [u8; BLOCK_BYTES], at: usize) {
        match self {
            Self::Data(bytes) => content[at..at + bytes.len()].copy_from_slice(bytes),
            Self::Zeros(count) => content[at..at + count].fill(0),
        }
    }
}

impl Assembler {
    /// Bytes up to `end` of the device are written, or (without payload) zeros.
    pub(super) fn change(&mut self, header: &Header, end: u64, payload: Option<&[u8]>, goes_on: bool) {
        for at in 0..self.disks.len() {
            let disk = &self.disks[at];
            if disk.is.dev != header.dev {
                continue;
            }
            let Some((from, to)) = disk.part(header.at, end) else { continue };
            let skipped = (disk.is.start + from - header.at) as usize;
            let payload = payload.map(|p| &p[skipped..skipped + (to - from) as usize]);
            if !disk.skips(from / BLOCK, to.div_ceil(BLOCK)) {
                self.change_disk(at, (header.bio, goes_on), from, to, payload);
            }
        }
    }

    fn change_disk(
        &mut self,
        at: usize,
        (bio, goes_on): (u64, bool),
        from: u64,
        to: u64,
        payload: Option<&[u8]>,
    ) {
        if !goes_on && let Some((from, to)) = self.disks[at].in_flight.ended_late(bio) {
            // Its end was not shown, or came just before; it is over by now, and what is read shows it. Most often it was over before it was
            // read the first time, so that no point waits for this.
            self.doubt(at, from / BLOCK, to.div_ceil(BLOCK));
        }
        let (first, end) = (from / BLOCK, to.div_ceil(BLOCK));
        let applied = self.applied;
        let disk = &mut self.disks[at];
        disk.use_ahead(first, end, applied);
        disk.captured.insert(first, end);
        let figures = &mut self.figures;
        let (doubtful, lacking, cache) = (&mut disk.doubtful, &mut disk.lacking, &mut disk.cache);
        let presumed = &disk.presumed;
        let (lacked_until, applied) = (&mut self.lacked_until, self.applied);
        disk.in_flight.submitted((bio, goes_on), (from, to), self.now, payload.is_none(), |block, met| {
            match met {
                Met::Same => {
                    figures.overlaps += 1;
                    doubtful.insert(block);
                    cache.remove(&block);
                }
                // A whole block over one that was in doubt: what it was before does not matter any more.
                Met::Nothing if from <= block * BLOCK && (block + 1) * BLOCK <= to => {
                    // (What is only taken to be over may come after it.)
                    if !presumed.contains(block) {
                        doubtful.remove(&block);
                    }
                    if lacking.remove(&block) {
                        *lacked_until = applied;
                    }
                }
                Met::Nothing | Met::Neighbours => {}
            }
        });
        // Decided before the first byte is taken in: a record is not to be torn by a clean position.
        if !self.opened && (disk.lacks_base(first, from, to) || disk.lacks_base(end - 1, from, to)) {
            self.opened = true;
        }
        if let Some(payload) = payload {
            for block in first..end {
                let (start, stop) = (from.max(block * BLOCK), to.min((block + 1) * BLOCK));
                let piece = &payload[(start - from) as usize..(stop - from) as usize];
                self.put(at, block, (start - block * BLOCK) as usize, Piece::Data(piece));
            }
            return;
        }
        let (whole_first, whole_end) = (from.div_ceil(BLOCK), self.disks[at].whole_end(to));
        let edges = [first, end - 1];
        let edges = if first == end - 1 { &edges[..1] } else { &edges[..] };
        for &block in edges.iter().filter(|b| **b < whole_first || **b >= whole_end) {
            let (start, stop) = (from.max(block * BLOCK), to.min((block + 1) * BLOCK));
            self.put(at, block, (start - block * BLOCK) as usize, Piece::Zeros((stop - start) as usize));
        }
        if whole_first < whole_end {
            let (opened, disk) = (self.opened, &mut self.disks[at]);
            disk.missing.remove_all(whole_first..whole_end);
            disk.cache.retain(|block, _| !(whole_first..whole_end).contains(block));
            disk.target(opened).zero(whole_first, whole_end);
        }
    }

    fn put(&mut self, at: usize, block: u64, offset: usize, piece: Piece<'_>) {
        let (opened, disk) = (self.opened, &mut self.disks[at]);
        let end = disk.end_of(block);
        if offset == 0 && piece.len() >= end {
            let Some(mut content) = self.pool.take() else {
                self.broken = Some(Broken::NoRoom);
                return;
            };
            piece.write(&mut content, 0);
            content[piece.len()..].fill(0);
            disk.missing.remove(block);
            disk.cache.remove(&block);
            disk.target(opened).put(block, content);
            return;
        }
        if let Some(partial) = disk.missing.get_mut(block) {
            match piece {
                Piece::Data(bytes) => partial.write(offset, bytes),
                Piece::Zeros(count) => partial.zero(offset, count),
            }
            if !partial.is_whole() {
                return self.want(at, block);
            }
            if let Some(partial) = disk.missing.remove(block) {
                disk.target(opened).put(block, partial.into_whole());
            }
            return;
        }
        disk.edges.insert(block);
        if let Some(mut content) = disk.known(block, opened, &self.pool) {
            piece.write(&mut content, offset);
            disk.target(opened).put(block, content);
            return;
        }
        let Some(content) = self.pool.take() else {
            self.broken = Some(Broken::NoRoom);
            return;
        };
        let mut partial = Partial::new(content, end);
        match piece {
            Piece::Data(bytes) => partial.write(offset, bytes),
            Piece::Zeros(count) => partial.zero(offset, count),
        }
        disk.missing.insert(block, partial);
        self.figures.completed_blocks += 1;
        self.want(at, block);
    }
}
