//! The entries of several objects as one stream, sorted by disk and block, in which of overlapping entries the newer has won.
//!
//! Objects are opened when the stream gets to where they begin: of a first copy's thousands of segments, one after the other.

use super::{Cursor, SegmentRow};
use crate::{
    Result, VaultError,
    key::MachineKeys,
    pace::Pace,
    record::SegmentRef,
    runs::Kind,
    segment::{Entry, Page},
};
use highwater_delta::{BlockHash, DiskId, Fill, MachineId};
use object_store::ObjectStore;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// An object to merge. Of two that hold a block, the one that comes later in the list counts.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) kind: Kind,
    pub(crate) object: SegmentRef,
    /// A segment's index, if it is not to be read.
    pub(crate) pages: Option<Vec<Arc<Page>>>,
}

impl Source {
    pub(crate) const fn new(kind: Kind, object: SegmentRef) -> Self {
        Self { kind, object, pages: None }
    }
}

/// An entry of the stream: its segment is a number in [`Merge::rows`].
pub(crate) struct Piece {
    pub(crate) disk: DiskId,
    pub(crate) entry: Entry,
    page: Arc<Page>,
}

impl Piece {
    /// Of its blocks; none if they are zeros.
    pub(crate) fn hashes(&self) -> &[BlockHash] {
        match self.entry.fill {
            Fill::Zero => &[],
            Fill::Data => &self.page.hashes[self.entry.hash_at as usize..][..self.entry.count as usize],
        }
    }
}

/// See the module.
pub(crate) struct Merge<'a> {
    store: &'a Arc<dyn ObjectStore>,
    machine: MachineId,
    keys: &'a MachineKeys,
    pace: &'a Pace,
    /// With where each begins, the next one last; and how new it is.
    waiting: Vec<((DiskId, u64), usize, Source)>,
    /// By how new they are: the newer, the greater.
    active: BTreeMap<usize, Active>,
    /// Where each of these is, and which: of hundreds, a step looks at the few that lie at its place.
    heads: BTreeSet<(DiskId, u64, usize)>,
    rows: Vec<SegmentRow>,
    /// Where the last entry ended.
    done: Option<(DiskId, u64)>,
}

struct Active {
    cursor: Cursor,
    /// Where its segments begin in the rows.
    rows_at: u32,
}

impl<'a> Merge<'a> {
    pub(crate) fn new(
        store: &'a Arc<dyn ObjectStore>,
        machine: MachineId,
        keys: &'a MachineKeys,
        pace: &'a Pace,
        sources: Vec<Source>,
    ) -> Self {
        let mut waiting: Vec<_> = sources
            .into_iter()
            .enumerate()
            .filter_map(|(age, source)| {
                let first = source.object.spans.iter().map(|span| (span.disk, span.first)).min()?;
                Some((first, age, source))
            })
            .collect();
        waiting.sort_by_key(|(first, age, _)| std::cmp::Reverse((*first, *age)));
        let (active, heads) = Default::default();
        Self { store, machine, keys, pace, waiting, active, heads, rows: Vec::new(), done: None }
    }

    /// All segments met so far; each object brings its own.
    pub(crate) fn rows(&self) -> &[SegmentRow] {
        &self.rows
    }

    /// The next entry, or part of one.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>> {
        let (disk, start) = loop {
            let least = self.heads.first().map(|(disk, at, _)| (*disk, *at));
            match (self.waiting.last(), least) {
                (Some((first, ..)), least) if least.is_none_or(|least| *first <= least) => {
                    self.open().await?
                }
                (_, Some(least)) => break least,
                (_, None) => return Ok(None),
            }
        };
        // All heads begin where the stream is, or later.
        let newest = self.heads.range((disk, start, 0)..=(disk, start, usize::MAX)).next_back();
        let Some((age, winner)) = newest.and_then(|(.., age)| Some((*age, self.active.get(age)?))) else {
            return Ok(None);
        };
        let Some((entry, page)) = winner.cursor.head() else { return Ok(None) };
        let behind = (disk, start.saturating_add(1), 0)..(disk, entry.end(), 0);
        let newer = self.heads.range(behind).find(|(.., other)| *other > age).map(|(_, at, _)| *at);
        let later = self.waiting.iter().rev().take_while(|(first, ..)| *first < (disk, entry.end()));
        let later = later.filter(|((of, at), other, _)| *other > age && *of == disk && *at > start);
        let cut = newer.into_iter().chain(later.map(|((_, at), ..)| *at)).min();
        let end = cut.map_or(entry.end(), |cut| cut.min(entry.end()));
        let mut part = entry.part(start, end);
        if part.fill == Fill::Data {
            part.segment = winner
                .rows_at
                .checked_add(part.segment)
                .filter(|segment| (*segment as usize) < self.rows.len())
                .ok_or_else(|| {
                    VaultError::corrupt("a map", "an entry names a segment that its table lacks")
                })?;
        }
        let piece = Piece { disk, entry: part, page: page.clone() };
        let mut fetched = 0;
        while let Some(head) = self.heads.first().copied().filter(|(of, at, _)| *of == disk && *at < end) {
            self.heads.remove(&head);
            let Some(active) = self.active.get_mut(&head.2) else { continue };
            active.cursor.skip_to(end).await?;
            fetched += active.cursor.take_fetched();
            if let Some((of, at)) = active.cursor.position() {
                self.heads.insert((of, at, head.2));
            } else {
                self.active.remove(&head.2);
            }
        }
        self.done = Some((disk, end));
        self.pace.spend(fetched).await;
        Ok(Some(piece))
    }

    async fn open(&mut self) -> Result<()> {
        let Some((_, age, source)) = self.waiting.pop() else { return Ok(()) };
        let (mut cursor, rows) = Cursor::open(self.store, self.machine, self.keys, source).await?;
        let rows_at = u32::try_from(self.rows.len()).map_err(|_| VaultError::Limit("segments of a merge"))?;
        self.rows.extend(rows);
        // What a newer object held beyond where this one begins is past.
        if let Some((disk, end)) = self.done
            && cursor.position().is_some_and(|(of, _)| of == disk)
        {
            cursor.skip_to(end).await?;
        }
        if let Some((of, at)) = cursor.position() {
            self.heads.insert((of, at, age));
            self.active.insert(age, Active { cursor, rows_at });
        }
        Ok(())
    }
}
