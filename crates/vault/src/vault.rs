//! A vault: what it is made of, its machines, and its control documents.

pub(crate) mod file;
mod history;
mod index;

pub(crate) use history::{Begin, open_record};
pub use index::Index;

use crate::{
    BlockMap, Clock, KeyRing, KeySource, MachineState, MachineWriter, Result, VaultError, VaultKey, groups,
    key::{MachineKeys, Secret, random},
    map,
    pages::{self, PageCache},
    record::check_name,
    seal::{self, DOCUMENT_BYTES_MAX},
    store::{self, Store},
};
use futures::TryStreamExt;
use highwater_delta::{CommitId, DiskId, HashKey, MachineId, VaultId};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use zeroize::Zeroizing;

/// Most bytes of a machine's key object.
const KEY_BYTES_MAX: u64 = 4096;
const CONTROL_BYTES_MAX: usize = 16 << 20;
/// Most bytes of memory of a machine's state ([`MachineState::memory_bytes`]), so that each of its checkpoints can be read.
pub const STATE_BYTES_MAX: u64 = DOCUMENT_BYTES_MAX - seal::OVERHEAD_BYTES;

/// The plaintext of a machine's key object.
#[derive(Serialize, Deserialize)]
struct MachineFile {
    key: Zeroizing<[u8; 32]>,
    host_name: String,
}

/// An open vault. Cheap to clone.
#[derive(Clone)]
pub struct Vault {
    inner: Arc<Inner>,
    pub(crate) pages: Arc<PageCache>,
    pub(crate) chunks: Arc<PageCache>,
    clock: Clock,
    index: Option<Arc<Index>>,
    /// Of the machine that was read last: who reads its state wants its blocks next.
    last_keys: Arc<Mutex<Option<(MachineId, MachineKeys)>>>,
    pub(crate) groups: Arc<groups::Cache>,
}
struct Inner {
    store: Store,
    id: VaultId,
    control: Secret,
    wrapping: Secret,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vault({})", self.inner.id)
    }
}

impl Vault {
    /// Makes a new vault that is opened with this root key itself. Refuses a store that holds one, and a store that cannot create
    /// if absent. For one whose root key is kept wrapped: [`KeyRing::create`].
    pub async fn create(store: impl Into<Store>, key: &VaultKey) -> Result<Self> {
        KeyRing::create(store, &KeySource::Root(key.clone()), "").await?.vault()
    }

    /// Opens a vault with its root key itself.
    pub async fn open(store: impl Into<Store>, key: &VaultKey) -> Result<Self> {
        Self::unlock(store, &KeySource::Root(key.clone())).await
    }

    /// Opens a vault with whatever opens it.
    pub async fn unlock(store: impl Into<Store>, source: &KeySource) -> Result<Self> {
        KeyRing::open(store, source).await?.vault()
    }

    pub(crate) fn with(store: Store, id: VaultId, key: &VaultKey) -> Result<Self> {
        let (control, wrapping) = (key.control_key(id)?, key.wrapping_key(id)?);
        let pages = Arc::new(PageCache::new(pages::BYTES_MAX));
        let chunks = Arc::new(PageCache::new(pages::CHUNK_BYTES_MAX));
        let inner = Inner { store, id, control, wrapping };
        Ok(Self {
            inner: Arc::new(inner),
            pages,
            chunks,
            clock: Clock::default(),
            index: None,
            last_keys: Arc::default(),
            groups: Arc::default(),
        })
    }

    /// Sees that the store still refuses to create what exists, as all safety of commits wants it: it is asked to create
    /// `vault.json` as it is. To be called before the vault is written to; a store may have been moved behind the same address.
    ///
    /// # Errors
    /// [`VaultError::NoCreateIfAbsent`]; nothing has changed then. [`VaultError::NoObjectLock`]: it is to lock objects, and cannot.
    pub async fn probe(&self) -> Result<()> {
        let (store, path) = (self.store(), store::vault_path());
        let bytes = store::read_object(&**store, &path, file::BYTES_MAX).await?;
        if store::create_object(&**store, &path, bytes.to_vec()).await? {
            return Err(VaultError::NoCreateIfAbsent(store.to_string()));
        }
        match self.object_lock() {
            Some(lock) => lock.check().await,
            None => Ok(()),
        }
    }

    /// Whether another collector keeps it.
    pub(crate) fn is_at_relay(&self) -> bool {
        self.inner.store.is_relay()
    }

    /// What locks objects of the store, if that is wanted.
    pub(crate) fn object_lock(&self) -> Option<&Arc<dyn store::ObjectLock>> {
        self.inner.store.lock()
    }

    /// The same vault, whose block maps keep so many bytes of index pages in all, instead of 64 MiB.
    #[must_use]
    pub fn with_page_cache(self, bytes_max: usize) -> Self {
        Self { pages: Arc::new(PageCache::new(bytes_max)), ..self }
    }
    /// The same vault, whose block maps keep so many bytes of chunks that small reads fetched, instead of 16 MiB.
    #[must_use]
    pub fn with_chunk_cache(self, bytes_max: usize) -> Self {
        Self { chunks: Arc::new(PageCache::new(bytes_max)), ..self }
    }
    /// The same vault, by another clock.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }
    /// The same vault, which keeps what it has read of machines in a local directory, so that it need not be read again.
    #[must_use]
    pub fn with_index(self, index: Index) -> Self {
        Self { index: Some(Arc::new(index)), ..self }
    }
    pub(crate) const fn clock(&self) -> &Clock {
        &self.clock
    }
    /// Now, in milliseconds since 1970, by the local clock.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }
    /// Bytes of index pages that its block maps keep now.
    #[must_use]
    pub fn page_cache_bytes(&self) -> usize {
        self.pages.bytes()
    }
    /// Bytes of memory that [`Vault::block_map_of`] will need at most, besides the page cache.
    #[must_use]
    pub fn block_map_bytes(&self, state: &MachineState, disk: DiskId, at: CommitId) -> u64 {
        map::memory_bytes(state, disk, at)
    }

    /// The store that it lies in, with whatever else does.
    #[must_use]
    pub fn objects(&self) -> &Arc<dyn ObjectStore> {
        self.store()
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> VaultId {
        self.inner.id
    }
    pub(crate) fn store(&self) -> &Arc<dyn ObjectStore> {
        self.inner.store.objects()
    }
    /// Bytes of memory that an open delta of a writer needs at most: four upload parts (of the segment being written one filled
    /// and one under way, of the one before, while it is completed, two as well) and the index of a segment, which is small while the
    /// one before is completed, since what takes memory is its building, at a segment's end. What is stored of the machine
    /// ([`MachineState::memory_bytes`]) comes on top.
    #[must_use]
    pub fn delta_bytes_max(&self) -> u64 {
        4 * self.part_bytes() as u64 + (2 << 20)
    }
    pub(crate) fn part_bytes(&self) -> usize {
        self.inner.store.part_bytes()
    }

    /// The machines that are registered, sorted; without those that were erased.
    pub async fn machines(&self) -> Result<Vec<MachineId>> {
        let listed = self.store().list_with_delimiter(Some(&store::machines_path())).await?;
        let mut machines: Vec<MachineId> =
            listed.common_prefixes.iter().filter_map(|prefix| prefix.filename()?.parse().ok()).collect();
        // A directory keeps empty ones, and an interrupted erasure more than that.
        let erased = self.erased_machines().await?;
        machines.retain(|machine| erased.binary_search(machine).is_err());
        machines.sort_unstable();
        Ok(machines)
    }

    /// Makes a machine known, with a key of its own. Does nothing if it is known already.
    ///
    /// # Errors
    /// [`VaultError::Erased`]: it was erased, and cannot come back under this id.
    pub async fn register_machine(&self, machine: MachineId, host_name: &str) -> Result<()> {
        check_name(host_name)?;
        let mut key = Zeroizing::new([0; 32]);
        random(key.as_mut())?;
        let file = MachineFile { key, host_name: host_name.to_owned() };
        let plain = postcard::to_stdvec(&file).map_err(|_| VaultError::Limit("bytes of a key object"))?;
        let plain = Zeroizing::new(plain);
        let path = store::key_path(machine);
        let sealed = seal::seal(&self.inner.wrapping, &path, &plain)?;
        self.refuse_erased(machine).await?;
        let made = store::create_own(&**self.store(), &path, sealed).await?;
        // Erased meanwhile? Whoever erases creates the tombstone first, and deletes keys then: one of both sees the other.
        if self.is_erased(machine).await? {
            if made {
                store::delete_if_there(&**self.store(), &path).await?;
            }
            return Err(VaultError::Erased(machine));
        }
        Ok(())
    }

    /// A machine's host name, without a replay.
    pub async fn host_name(&self, machine: MachineId) -> Result<String> {
        Ok(self.machine_keys(machine).await?.1)
    }

    /// What the vault holds of a machine: the replay of its records.
    pub async fn machine(&self, machine: MachineId) -> Result<MachineState> {
        self.machine_within(machine, u64::MAX).await
    }

    /// The key of a machine's block hashes.
    pub async fn hash_key(&self, machine: MachineId) -> Result<HashKey> {
        Ok(self.machine_keys(machine).await?.0.hash)
    }

    /// The same, if its state takes no more than so many bytes of memory ([`MachineState::memory_bytes`]).
    pub async fn machine_within(&self, machine: MachineId, state_bytes_max: u64) -> Result<MachineState> {
        Ok(self.load_machine(machine, state_bytes_max).await?.1)
    }

    /// A writer for a machine. The last one opened wins: see [`MachineWriter`].
    pub async fn writer(&self, machine: MachineId) -> Result<MachineWriter> {
        self.writer_within(machine, STATE_BYTES_MAX).await
    }

    /// The same, for a state of so many bytes at most: a larger one is refused, and so are commits that would make it larger.
    pub async fn writer_within(&self, machine: MachineId, state_bytes_max: u64) -> Result<MachineWriter> {
        MachineWriter::open(self.clone(), machine, state_bytes_max.min(STATE_BYTES_MAX)).await
    }

    /// Where each block of a disk lies, after the commit `at`.
    pub async fn block_map(&self, machine: MachineId, disk: DiskId, at: CommitId) -> Result<BlockMap> {
        let (keys, state) = self.load_machine(machine, u64::MAX).await?;
        let size_bytes = map::size_at(&state, disk, at)?;
        BlockMap::load(self, &keys, &state, disk, size_bytes, at)
    }

    /// The same from a state that is at hand.
    pub async fn block_map_of(&self, state: &MachineState, disk: DiskId, at: CommitId) -> Result<BlockMap> {
        let keys = match self.kept_keys(state.machine) {
            Some(keys) => keys,
            None => self.machine_keys(state.machine).await?.0,
        };
        let size_bytes = map::size_at(state, disk, at)?;
        BlockMap::load(self, &keys, state, disk, size_bytes, at)
    }

    fn keep_keys(&self, machine: MachineId, keys: &MachineKeys) {
        *self.last_keys.lock().unwrap_or_else(PoisonError::into_inner) = Some((machine, keys.clone()));
    }
    fn kept_keys(&self, machine: MachineId) -> Option<MachineKeys> {
        let last = self.last_keys.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|(of, _)| *of == machine).map(|(_, keys)| keys.clone())
    }

    pub(crate) async fn machine_keys(&self, machine: MachineId) -> Result<(MachineKeys, String)> {
        let path = store::key_path(machine);
        let sealed = match store::read_object(&**self.store(), &path, KEY_BYTES_MAX).await {
            Err(VaultError::Missing { .. }) => {
                self.refuse_erased(machine).await?;
                return Err(VaultError::UnknownMachine(machine));
            }
            other => other?,
        };
        let plain = seal::open(&self.inner.wrapping, &path, &sealed)?;
        let file: MachineFile =
            postcard::from_bytes(&plain).map_err(|e| VaultError::corrupt(&path, e.to_string()))?;
        Ok((MachineKeys::new(Secret(file.key))?, file.host_name))
    }

    /// Creates a control document; false if there is one of this name. Documents are never changed: a new version
    /// is a new name.
    pub async fn control_create(&self, name: &str, plain: &[u8]) -> Result<bool> {
        let path = control_path(name)?;
        if plain.len() > CONTROL_BYTES_MAX {
            return Err(VaultError::Limit("bytes of a control document"));
        }
        let sealed = seal::seal(&self.inner.control, &path, plain)?;
        store::create_own(&**self.store(), &path, sealed).await
    }

    /// Takes back a control document that was created just now, and on which nothing was built.
    pub(crate) async fn control_delete(&self, name: &str) -> Result<()> {
        store::delete_if_there(&**self.store(), &control_path(name)?).await
    }

    /// Deletes a control document that nobody needs any more; answers whether it is gone. Where a store keeps everything for a while it stays,
    /// and does no harm.
    pub(crate) async fn control_forget(&self, name: &str) -> Result<bool> {
        store::delete(&**self.store(), &control_path(name)?).await
    }

    /// Reads a control document.
    pub async fn control_get(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let path = control_path(name)?;
        match store::read_object(&**self.store(), &path, CONTROL_BYTES_MAX as u64 + 64).await {
            Ok(sealed) => seal::open(&self.inner.control, &path, &sealed).map(Some),
            Err(VaultError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// When a control document was created, by the store's clock, in milliseconds since 1970.
    pub(crate) async fn control_modified_ms(&self, name: &str) -> Result<u64> {
        let meta = self.store().head(&control_path(name)?).await?;
        Ok(u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0))
    }

    /// The names of control documents in a folder (`""`: all of them), sorted.
    pub async fn control_list(&self, prefix: &str) -> Result<Vec<String>> {
        let root = Path::from("control");
        let dir = if prefix.is_empty() { root.clone() } else { control_path(prefix.trim_end_matches('/'))? };
        let mut names: Vec<String> = self
            .store()
            .list(Some(&dir))
            .try_filter_map(async |meta| {
                Ok(meta.location.as_ref().strip_prefix("control/").map(str::to_owned))
            })
            .try_collect()
            .await?;
        names.sort_unstable();
        Ok(names)
    }
}

fn control_path(name: &str) -> Result<Path> {
    let good = !name.is_empty()
        && name.len() <= 255
        && name.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
        });
    if good { Ok(Path::from(format!("control/{name}"))) } else { Err(VaultError::Name(name.to_owned())) }
}
