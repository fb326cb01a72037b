//! Writing for one machine: one delta at a time, one writer at a time.
//!
//! Any number of writers may be opened; the records decide. A commit takes the next record number; whoever finds it
//! taken by another writer has been fenced, while records of maintainers, which change nothing that a writer relies on, are taken in
//! and the next number is tried. A writer that finds segments of an interrupted or still running delta
//! first takes over (a record of its own, which fences whoever wrote them) and then deletes them, so that no space
//! is lost to crashes.
//!
//! A writer whose record failed to be put is dead ([`crate::journal`]) and deletes nothing; the next one reads what is true.

use crate::{
    BlockMap, DiskRecord, MachineState, Result, Vault, VaultError,
    journal::Journal,
    record::{CommitBody, KIND_COMMIT, KIND_TAKEOVER, check_disks, check_point},
    runs::Kind,
    segment::{Finishing, SegmentWriter},
    store,
};
use bytes::Bytes;
use futures::TryStreamExt;
use highwater_delta::{Block, ChunkView, CommitId, CommitKind, DeltaId, DiskId, HashKey, MachineId};
use object_store::path::Path;
use std::collections::HashSet;

/// Takeovers tried before another writer is taken to be alive and winning.
const TAKEOVER_TRIES: usize = 8;
/// Disks that a machine may ever have had: each is kept in every state of the machine, since older points cover it.
pub const DISKS_EVER_MAX: usize = 4096;

/// Writes deltas of one machine.
pub struct MachineWriter {
    journal: Journal,
    disks: Option<Vec<DiskRecord>>,
    open: Option<Open>,
    fenced: bool,
}

struct Open {
    delta: DeltaId,
    /// The delta was committed before: what is pushed is checked and dropped.
    known: Option<CommitId>,
    /// A push failed: only abort remains.
    failed: bool,
    current: Option<SegmentWriter>,
    /// Full segments, stored already or on their way.
    finishing: Finishing,
    /// Every object that may exist because of this delta.
    paths: Vec<Path>,
}

impl std::fmt::Debug for MachineWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MachineWriter({} at {})", self.journal.machine, self.journal.state.last_record)
    }
}

impl MachineWriter {
    pub(crate) async fn open(vault: Vault, machine: MachineId, state_bytes_max: u64) -> Result<Self> {
        // Now rather than when a commit waits for it.
        vault.stamp_ms().await?;
        let journal = Journal::open(vault, machine, state_bytes_max).await?;
        let mut writer = Self { journal, disks: None, open: None, fenced: false };
        for _ in 0..TAKEOVER_TRIES {
            let orphans = writer.orphans().await?;
            if orphans.is_empty() {
                return Ok(writer);
            }
            let epoch = writer.journal.state.epoch + 1;
            if writer.journal.put(KIND_TAKEOVER, epoch, Vec::new()).await? {
                // Nobody can name them any more: what cannot be deleted now is in nobody's way.
                for path in orphans {
                    if store::delete(&**writer.journal.vault.store(), &path).await.is_err() {
                        break;
                    }
                }
                return Ok(writer);
            }
            // Somebody committed in between: the segments may be theirs and in use now.
            writer.journal.reload().await?;
        }
        Err(VaultError::Fenced(machine))
    }

    /// Segments after the last committed one that no record names. Older strays are left to `verify`.
    async fn orphans(&self) -> Result<Vec<Path>> {
        let Journal { vault, machine, state, .. } = &self.journal;
        let dir = store::object_dir(*machine, Kind::Segment);
        let newest = state.newest_segment;
        let listed = match newest {
            Some(id) => {
                vault.store().list_with_offset(Some(&dir), &store::object_path(*machine, Kind::Segment, id))
            }
            None => vault.store().list(Some(&dir)),
        };
        let unnamed = listed.try_filter_map(async |meta| {
            let orphan = store::segment_of(&meta.location).is_some_and(|id| Some(id) > newest);
            Ok(orphan.then_some(meta.location))
        });
        Ok(unnamed.try_collect().await?)
    }

    /// What is stored.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.journal.state
    }
    /// The machine.
    #[must_use]
    pub fn machine(&self) -> MachineId {
        self.journal.machine
    }
    /// The key of the machine's block hashes.
    #[must_use]
    pub fn hash_key(&self) -> HashKey {
        self.journal.keys.hash.clone()
    }
    /// Where each block of a disk lies after the last commit; a disk not committed yet has none. Loads the footers of
    /// the disk's segments: keep it until the next commit.
    pub async fn block_map(&self, disk: DiskId) -> Result<BlockMap> {
        let record = self.disks().iter().find(|record| record.disk == disk);
        let size_bytes = record.ok_or(VaultError::UnknownDisk(disk))?.size_bytes;
        let Journal { vault, keys, state, .. } = &self.journal;
        BlockMap::load(vault, keys, state, disk, size_bytes, state.last_commit)
    }
    /// The machine's disks as they will be recorded with the next commit.
    #[must_use]
    pub fn disks(&self) -> &[DiskRecord] {
        self.disks.as_deref().unwrap_or(&self.journal.state.disks)
    }

    /// Sets the machine's disks; recorded with the next commit.
    pub fn set_disks(&mut self, disks: Vec<DiskRecord>) -> Result<()> {
        self.check_alive()?;
        check_disks(&disks)?;
        let known: HashSet<DiskId> = self
            .journal
            .state
            .disks
            .iter()
            .chain(&self.journal.state.former_disks)
            .map(|record| record.disk)
            .collect();
        let new = disks.iter().filter(|record| !known.contains(&record.disk)).count();
        if new > 0 && known.len() + new > DISKS_EVER_MAX {
            return Err(VaultError::Limit("disks that the machine ever had"));
        }
        self.disks = (disks != self.journal.state.disks).then_some(disks);
        Ok(())
    }

    /// Opens a delta. One that was committed before may be sent again: it changes nothing.
    pub async fn begin(&mut self, delta: DeltaId) -> Result<()> {
        self.check_alive()?;
        if self.open.is_some() {
            return Err(VaultError::Order("a delta is open already"));
        }
        let known = self.journal.state.commit_of(delta);
        let (finishing, paths) = (Finishing::default(), Vec::new());
        self.open = Some(Open { delta, known, failed: false, current: None, finishing, paths });
        Ok(())
    }

    /// Adds an encoded chunk to the open delta. After an error of the store, which may be one of storing an earlier chunk, the
    /// delta can only be aborted; after a refused chunk it is as before.
    pub async fn push(&mut self, chunk: Bytes) -> Result<()> {
        self.check_alive()?;
        let open = self.open.as_mut().ok_or(VaultError::Order("no delta is open"))?;
        if open.failed {
            return Err(VaultError::Order("the delta failed and must be aborted"));
        }
        let view = ChunkView::parse(&chunk)?;
        let Journal { vault, machine, keys, state, .. } = &self.journal;
        let disks = self.disks.as_ref().unwrap_or(&state.disks);
        let record = disks.iter().find(|record| record.disk == view.disk());
        let record = record.ok_or_else(|| VaultError::UnknownDisk(view.disk()))?;
        let blocks = Block::count_for(record.size_bytes);
        // Extents are sorted, so the last one reaches farthest.
        if let Some(last) = view.extents().last()
            && last.end() > blocks
        {
            return Err(VaultError::BeyondDisk { disk: view.disk(), block: last.end() - 1, blocks });
        }
        if open.known.is_some() {
            return Ok(());
        }
        // Stays set if this future is dropped half-way.
        open.failed = true;
        let segment = match &mut open.current {
            Some(segment) => segment,
            None => {
                let segment = SegmentWriter::new(vault, *machine, keys, Kind::Segment)?;
                open.paths.push(segment.path().clone());
                open.current.insert(segment)
            }
        };
        segment.append(&chunk, &view).await?;
        if segment.is_full()
            && let Some(segment) = open.current.take()
        {
            open.finishing.add(segment).await?;
        }
        open.failed = false;
        Ok(())
    }

    /// Makes the open delta durable, all of it at once, and closes it. After an error of the store before the record
    /// was put, the delta is still open and can be aborted; after a later one the writer is dead. A commit that would make the
    /// state too large is refused ([`VaultError::StateFull`]) before anything of it is recorded.
    pub async fn commit(&mut self, kind: CommitKind) -> Result<CommitId> {
        self.check_alive()?;
        check_point(&kind, self.disks())?;
        let open = self.open.as_mut().ok_or(VaultError::Order("no delta is open"))?;
        if open.failed {
            return Err(VaultError::Order("the delta failed and must be aborted"));
        }
        if let Some(commit) = open.known {
            self.open = None;
            return Ok(commit);
        }
        open.failed = true;
        if let Some(segment) = open.current.take() {
            open.finishing.add(segment).await?;
        }
        let segments = open.finishing.all().await?.to_vec();
        open.failed = false;
        let delta = open.delta;
        let mut body = CommitBody { delta, kind, disks: self.disks().to_vec(), segments };
        loop {
            let Journal { machine, state, .. } = &self.journal;
            let (machine, epoch, commit) = (*machine, state.epoch, CommitId(state.last_record + 1));
            body.segments.iter_mut().for_each(|segment| segment.commit = commit);
            let (bytes, bytes_max) = (state.memory_bytes_with(&body), self.journal.state_bytes_max());
            if bytes > bytes_max {
                return Err(VaultError::StateFull { machine, bytes, bytes_max });
            }
            let encoded = postcard::to_stdvec(&body).map_err(|_| VaultError::Limit("bytes of a record"))?;
            let put = match self.journal.put(KIND_COMMIT, epoch, encoded).await {
                // So long ago that the records since were deleted. Its record may have been among them, and its segments be named: nothing is
                // thrown away.
                Err(VaultError::Fenced(_)) => {
                    self.fenced = true;
                    return Err(VaultError::Fenced(machine));
                }
                other => other?,
            };
            if put {
                self.open = None;
                self.disks = None;
                self.journal.checkpoint().await;
                return Ok(commit);
            }
            let others = self.journal.catch_up().await?;
            if others.is_empty() || others.iter().any(|kind| matches!(*kind, KIND_COMMIT | KIND_TAKEOVER)) {
                return Err(self.fenced().await);
            }
        }
    }

    async fn fenced(&mut self) -> VaultError {
        self.fenced = true;
        // Nobody names these; whoever fenced this writer may have deleted them already.
        let _ = self.discard().await;
        VaultError::Fenced(self.journal.machine)
    }

    /// Throws the open delta away, and deletes what was uploaded of it.
    pub async fn abort(&mut self) -> Result<()> {
        if self.journal.is_dead() {
            return Err(VaultError::Dead);
        }
        self.discard().await
    }

    async fn discard(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.failed = true;
        if let Some(segment) = open.current.take() {
            let _ = segment.abort().await;
        }
        // Or one could appear after it was deleted.
        open.finishing.settle().await;
        while let Some(path) = open.paths.last() {
            store::delete(&**self.journal.vault.store(), path).await?;
            open.paths.pop();
        }
        self.open = None;
        Ok(())
    }

    /// Leaves the open delta as a crash between its last segment and its record would.
    #[cfg(test)]
    pub(crate) async fn finish_segment_for_test(&mut self) {
        let open = self.open.as_mut().expect("a delta is open");
        let segment = open.current.take().expect("a chunk was pushed");
        open.finishing.add(segment).await.expect("the store works");
        open.finishing.all().await.expect("the store works");
    }

    fn check_alive(&self) -> Result<()> {
        if self.fenced {
            return Err(VaultError::Fenced(self.journal.machine));
        }
        if self.journal.is_dead() { Err(VaultError::Dead) } else { Ok(()) }
    }
}
