//! Writing for one machine: one delta at a time, one writer at a time.
//!
//! Any number of writers may be opened; the records decide. A commit takes the next record number; whoever finds it
//! taken by somebody else has been fenced. A writer that finds segments of an interrupted or still running delta
//! first takes over (a record of its own, which fences whoever wrote them) and then deletes them, so that no space
//! is lost to crashes.
//!
//! Whether a record that failed to be put has been stored after all cannot be known for certain; such a writer is
//! dead, deletes nothing, and the next one reads what is true.

use crate::{
    BlockMap, DiskRecord, MachineState, Result, Vault, VaultError,
    key::{MachineKeys, random},
    record::{CommitBody, Envelope, KIND_COMMIT, KIND_TAKEOVER, check_disks, check_point},
    seal,
    segment::{Finishing, SegmentWriter},
    store,
    vault::STATE_BYTES_MAX,
};
use bytes::Bytes;
use futures::TryStreamExt;
use highwater_delta::{Block, ChunkView, CommitId, CommitKind, DeltaId, DiskId, HashKey, MachineId};
use object_store::{ObjectStoreExt, path::Path};
use std::{
    collections::HashSet,
    time::{SystemTime, UNIX_EPOCH},
};

/// Takeovers tried before another writer is taken to be alive and winning.
const TAKEOVER_TRIES: usize = 8;
/// Disks that a machine may ever have had: each is kept in every state of the machine, since older points cover it.
pub const DISKS_EVER_MAX: usize = 4096;

/// Writes deltas of one machine.
pub struct MachineWriter {
    vault: Vault,
    machine: MachineId,
    keys: MachineKeys,
    state: MachineState,
    /// Tells this writer's records from those of others.
    identity: [u8; 16],
    disks: Option<Vec<DiskRecord>>,
    open: Option<Open>,
    life: Life,
    last_checkpoint: u64,
    /// See [`Vault::writer_within`].
    state_bytes_max: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Alive,
    Fenced,
    Dead,
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
        write!(f, "MachineWriter({} at {})", self.machine, self.state.last_record)
    }
}

impl MachineWriter {
    pub(crate) async fn open(vault: Vault, machine: MachineId, state_bytes_max: u64) -> Result<Self> {
        let (keys, host_name) = vault.machine_keys(machine).await?;
        let mut identity = [0; 16];
        random(&mut identity)?;
        let last_checkpoint = vault.checkpoint_numbers(machine).await?.pop().unwrap_or(0);
        let state = vault.load_state_within(machine, &keys, host_name.clone(), true, state_bytes_max).await?;
        let mut writer = Self {
            vault,
            machine,
            keys,
            state,
            identity,
            disks: None,
            open: None,
            life: Life::Alive,
            last_checkpoint,
            state_bytes_max,
        };
        for _ in 0..TAKEOVER_TRIES {
            let orphans = writer.orphans().await?;
            if orphans.is_empty() {
                return Ok(writer);
            }
            let epoch = writer.state.epoch + 1;
            if writer.put_record(KIND_TAKEOVER, epoch, Vec::new()).await? {
                for path in orphans {
                    delete_if_there(&writer.vault, &path).await?;
                }
                return Ok(writer);
            }
            // Somebody committed in between: the segments may be theirs and in use now.
            let keys = &writer.keys;
            writer.state = writer
                .vault
                .load_state_within(machine, keys, host_name.clone(), true, state_bytes_max)
                .await?;
        }
        Err(VaultError::Fenced(machine))
    }

    /// Segments after the last committed one that no record names. Older strays are left to `verify`.
    async fn orphans(&self) -> Result<Vec<Path>> {
        let dir = store::segment_dir(self.machine);
        let newest = self.state.segments.iter().map(|segment| segment.id).max();
        let listed = match newest {
            Some(id) => {
                self.vault.store().list_with_offset(Some(&dir), &store::segment_path(self.machine, id))
            }
            None => self.vault.store().list(Some(&dir)),
        };
        let named: HashSet<_> = self.state.segments.iter().map(|segment| segment.id).collect();
        let unnamed = listed.try_filter_map(async |meta| {
            let orphan = store::segment_of(&meta.location).is_some_and(|id| !named.contains(&id));
            Ok(orphan.then_some(meta.location))
        });
        Ok(unnamed.try_collect().await?)
    }

    /// What is stored.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.state
    }
    /// The machine.
    #[must_use]
    pub fn machine(&self) -> MachineId {
        self.machine
    }
    /// The key of the machine's block hashes.
    #[must_use]
    pub fn hash_key(&self) -> HashKey {
        self.keys.hash.clone()
    }
    /// Where each block of a disk lies after the last commit; a disk not committed yet has none. Loads the footers of
    /// the disk's segments: keep it until the next commit.
    pub async fn block_map(&self, disk: DiskId) -> Result<BlockMap> {
        let record = self.disks().iter().find(|record| record.disk == disk);
        let size_bytes = record.ok_or(VaultError::UnknownDisk(disk))?.size_bytes;
        let (store, at) = (self.vault.store().clone(), self.state.last_commit);
        BlockMap::load(store, self.vault.pages.clone(), &self.keys, &self.state, disk, size_bytes, at).await
    }
    /// The machine's disks as they will be recorded with the next commit.
    #[must_use]
    pub fn disks(&self) -> &[DiskRecord] {
        self.disks.as_deref().unwrap_or(&self.state.disks)
    }

    /// Sets the machine's disks; recorded with the next commit.
    pub fn set_disks(&mut self, disks: Vec<DiskRecord>) -> Result<()> {
        self.check_alive()?;
        check_disks(&disks)?;
        let known: HashSet<DiskId> =
            self.state.disks.iter().chain(&self.state.former_disks).map(|record| record.disk).collect();
        let new = disks.iter().filter(|record| !known.contains(&record.disk)).count();
        if new > 0 && known.len() + new > DISKS_EVER_MAX {
            return Err(VaultError::Limit("disks that the machine ever had"));
        }
        self.disks = (disks != self.state.disks).then_some(disks);
        Ok(())
    }

    /// Opens a delta. One that was committed before may be sent again: it changes nothing.
    pub async fn begin(&mut self, delta: DeltaId) -> Result<()> {
        self.check_alive()?;
        if self.open.is_some() {
            return Err(VaultError::Order("a delta is open already"));
        }
        let known = self.state.commit_of(delta);
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
        let disks = self.disks.as_ref().unwrap_or(&self.state.disks);
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
        let next = CommitId(self.state.last_record + 1);
        let segment = match &mut open.current {
            Some(segment) => segment,
            None => {
                let segment = SegmentWriter::new(&self.vault, self.machine, &self.keys)?;
                open.paths.push(segment.path().clone());
                open.current.insert(segment)
            }
        };
        segment.append(&chunk, &view).await?;
        if segment.is_full()
            && let Some(segment) = open.current.take()
        {
            open.finishing.add(segment, next).await?;
        }
        open.failed = false;
        Ok(())
    }

    /// Makes the open delta durable, all of it at once, and closes it. After an error of the store before the record
    /// was put, the delta is still open and can be aborted; after a later one the writer is dead. A commit that would make the
    /// state too large is refused ([`VaultError::StateFull`]) before anything of it is recorded.
    pub async fn commit(&mut self, kind: CommitKind) -> Result<CommitId> {
        self.check_alive()?;
        check_point(&kind, self.disks.as_ref().unwrap_or(&self.state.disks))?;
        let open = self.open.as_mut().ok_or(VaultError::Order("no delta is open"))?;
        if open.failed {
            return Err(VaultError::Order("the delta failed and must be aborted"));
        }
        if let Some(commit) = open.known {
            self.open = None;
            return Ok(commit);
        }
        let next = CommitId(self.state.last_record + 1);
        open.failed = true;
        if let Some(segment) = open.current.take() {
            open.finishing.add(segment, next).await?;
        }
        let segments = open.finishing.all().await?.to_vec();
        open.failed = false;
        let body = CommitBody {
            delta: open.delta,
            kind,
            disks: self.disks.clone().unwrap_or_else(|| self.state.disks.clone()),
            segments,
        };
        let (bytes, bytes_max) = (self.state.memory_bytes_with(&body), self.state_bytes_max);
        if bytes > bytes_max {
            return Err(VaultError::StateFull { machine: self.machine, bytes, bytes_max });
        }
        let body = postcard::to_stdvec(&body).map_err(|_| VaultError::Limit("bytes of a record"))?;
        if !self.put_record(KIND_COMMIT, self.state.epoch, body).await? {
            self.life = Life::Fenced;
            // Nobody names these; whoever fenced this writer may have deleted them already.
            let _ = self.discard().await;
            return Err(VaultError::Fenced(self.machine));
        }
        self.open = None;
        self.disks = None;
        self.checkpoint().await;
        Ok(next)
    }

    /// Throws the open delta away, and deletes what was uploaded of it.
    pub async fn abort(&mut self) -> Result<()> {
        if self.life == Life::Dead {
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
            delete_if_there(&self.vault, path).await?;
            open.paths.pop();
        }
        self.open = None;
        Ok(())
    }

    /// Puts the next record; false if its number is somebody else's. The writer is dead from the begin of the put
    /// until it is known to have succeeded, so that a dropped future cannot leave it believing anything.
    async fn put_record(&mut self, kind: u16, epoch: u64, body: Vec<u8>) -> Result<bool> {
        let number = self.state.last_record + 1;
        let envelope = Envelope {
            number,
            previous: self.state.chain,
            writer: self.identity,
            epoch,
            stored_at_ms: now_ms(),
            kind,
            body,
        };
        let path = store::manifest_path(self.machine, number);
        let plain = postcard::to_stdvec(&envelope).map_err(|_| VaultError::Limit("bytes of a record"))?;
        if plain.len() as u64 > STATE_BYTES_MAX {
            return Err(VaultError::Limit("bytes of a record"));
        }
        let sealed = seal::seal(&self.keys.manifest, &path, &plain)?;
        let hash = *blake3::hash(&sealed).as_bytes();
        self.life = Life::Dead;
        let store = self.vault.store();
        if !store::create_object(&**store, &path, sealed.clone()).await? {
            // A client of a remote store may have put it twice, having lost the first answer.
            let there = store::read_object(&**store, &path, seal::DOCUMENT_BYTES_MAX).await?;
            if there != sealed {
                self.life = Life::Alive;
                return Ok(false);
            }
        }
        self.state.apply(&envelope, hash, path.as_ref())?;
        self.life = Life::Alive;
        Ok(true)
    }

    /// Stores a checkpoint if one is due. Its failure harms nothing: the next commit tries again.
    async fn checkpoint(&mut self) {
        let number = self.state.last_record;
        if number < self.last_checkpoint + self.state.checkpoint_interval() {
            return;
        }
        let path = store::checkpoint_path(self.machine, number);
        let Ok(plain) = postcard::to_stdvec(&self.state) else { return };
        // Nobody could read it. A state within its limit never gets here.
        if plain.len() as u64 > STATE_BYTES_MAX {
            return;
        }
        let Ok(sealed) = seal::seal(&self.keys.manifest, &path, &plain) else { return };
        if store::create_object(&**self.vault.store(), &path, sealed).await.is_ok() {
            self.last_checkpoint = number;
        }
    }

    /// Leaves the open delta as a crash between its last segment and its record would.
    #[cfg(test)]
    pub(crate) async fn finish_segment_for_test(&mut self) {
        let next = CommitId(self.state.last_record + 1);
        let open = self.open.as_mut().expect("a delta is open");
        let segment = open.current.take().expect("a chunk was pushed");
        open.finishing.add(segment, next).await.expect("the store works");
        open.finishing.all().await.expect("the store works");
    }

    fn check_alive(&self) -> Result<()> {
        match self.life {
            Life::Alive => Ok(()),
            Life::Fenced => Err(VaultError::Fenced(self.machine)),
            Life::Dead => Err(VaultError::Dead),
        }
    }
}

async fn delete_if_there(vault: &Vault, path: &Path) -> Result<()> {
    match vault.store().delete(path).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
