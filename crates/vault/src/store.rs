//! Where objects lie: paths, a local directory as a store, and bounded reads.

mod exact;
mod left_over;
mod object_lock;
mod ownership;
mod profile;
mod relay;
mod remote;
mod write_behind;

use crate::{
    Location, Result, VaultError,
    runs::{Kind, ObjectName},
};
use bytes::Bytes;
use exact::Exact;
use highwater_delta::{MachineId, SegmentId};
pub use left_over::{left_over, remove_left_over};
pub(crate) use object_lock::ObjectLock;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, local::LocalFileSystem, path::Path};
use ownership::Ownership;
use std::{fs, os::unix::fs::DirBuilderExt, sync::Arc};
use write_behind::WriteBehind;

/// Bytes of an upload's part into a directory: little waits in memory.
const PART_BYTES_LOCAL: usize = 1 << 20;
/// Into a bucket: the least that Amazon takes.
const PART_BYTES_REMOTE: usize = 5 << 20;

/// Records that are deleted together: 1 to this number, and so on.
pub(crate) const PRUNED_TOGETHER: u64 = if cfg!(test) { 8 } else { 1024 };

/// Directories within each other: those of a vault, beneath what a relay's relay calls its own.
const LEVELS_MAX: usize = 12;

/// An object store, and how large the parts of an upload into it are.
#[derive(Clone, Debug)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    part_bytes: usize,
    lock: Option<Arc<dyn ObjectLock>>,
    is_relay: bool,
}

impl Store {
    /// Opens the store at a location: a directory is made if it is missing (see [`local_store`]); of a bucket nothing is asked
    /// yet.
    ///
    /// # Errors
    /// The directory cannot be used; the address or the credentials make no sense ([`VaultError::Location`]).
    pub fn open(location: &Location) -> Result<Self> {
        match location {
            Location::Directory(dir) => Ok(Self {
                objects: local_store(dir)?,
                part_bytes: PART_BYTES_LOCAL,
                lock: None,
                is_relay: false,
            }),
            Location::Bucket(bucket) => {
                let (objects, lock) = remote::open(bucket)?;
                Ok(Self { lock, ..Self::exact(objects, PART_BYTES_REMOTE) })
            }
            // Which may keep it in a bucket.
            Location::Relay(relay) => {
                Ok(Self { is_relay: true, ..Self::exact(relay::open(relay)?, PART_BYTES_REMOTE) })
            }
        }
    }

    /// The same with a layer over it, which takes parts as the store does.
    #[must_use]
    pub fn layered<S: ObjectStore>(self, layer: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<S>) -> Self {
        Self { objects: Arc::new(Exact(layer(self.objects))), ..self }
    }

    fn exact(objects: Arc<dyn ObjectStore>, part_bytes: usize) -> Self {
        Self { objects: Arc::new(Exact(objects)), part_bytes, lock: None, is_relay: false }
    }

    /// All that lies there, a vault or not.
    #[must_use]
    pub const fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.objects
    }
    /// What keeps objects from being deleted, where that is wanted.
    pub(crate) const fn lock(&self) -> Option<&Arc<dyn ObjectLock>> {
        self.lock.as_ref()
    }
    /// Whether another collector keeps it, which lists what lies at its root by going through everything.
    pub(crate) const fn is_relay(&self) -> bool {
        self.is_relay
    }
    #[cfg(test)]
    pub(crate) fn with_lock(self, lock: Arc<dyn ObjectLock>) -> Self {
        Self { lock: Some(lock), ..self }
    }
    pub(crate) const fn part_bytes(&self) -> usize {
        self.part_bytes
    }
}

/// One that takes parts of any size.
impl From<Arc<dyn ObjectStore>> for Store {
    fn from(objects: Arc<dyn ObjectStore>) -> Self {
        Self::exact(objects, PART_BYTES_LOCAL)
    }
}

impl<S: ObjectStore> From<Arc<S>> for Store {
    fn from(objects: Arc<S>) -> Self {
        let objects: Arc<dyn ObjectStore> = objects;
        objects.into()
    }
}

/// A directory as an object store. Every put is synced before it returns, the file and each directory whose entries
/// changed; a put that must create is a hard link, which refuses an existing name. Directories that an interrupted
/// process may have made without syncing are synced here. What is put has owner and mode of the directory, whoever puts it
/// (module `ownership`).
pub fn local_store(dir: &std::path::Path) -> Result<Arc<dyn ObjectStore>> {
    let io = |path: &std::path::Path, e| VaultError::io(path, e);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| io(dir, e))?;
    let root = fs::canonicalize(dir).map_err(|e| io(dir, e))?;
    sync_directories(&root, LEVELS_MAX)?;
    if let Some(parent) = root.parent() {
        // Whoever may use the vault need not be able to read the directory above it.
        let _ = fs::File::open(parent).and_then(|parent| parent.sync_all());
    }
    let ownership = Ownership::of(&root).map_err(|e| io(&root, e))?;
    Ok(Arc::new(WriteBehind(LocalFileSystem::new_with_prefix(&root)?.with_fsync(true), ownership)))
}

fn sync_directories(dir: &std::path::Path, levels: usize) -> Result<()> {
    let io = |e| VaultError::io(dir, e);
    // Manifest and segment directories hold files only and may be long; the depth of the layout bounds the walk.
    let leaf = levels == 0
        || matches!(
            dir.file_name().and_then(|n| n.to_str()),
            Some("segments" | "rewritten" | "maps" | "manifest" | "checkpoint" | "pruned")
        );
    if !leaf {
        for entry in fs::read_dir(dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_type().map_err(io)?.is_dir() {
                sync_directories(&entry.path(), levels - 1)?;
            }
        }
    }
    match fs::File::open(dir).and_then(|dir| dir.sync_all()) {
        // A vault mounted read-only can still be recovered from.
        Err(e) if e.raw_os_error() == Some(libc::EROFS) => Ok(()),
        other => other.map_err(io),
    }
}

pub(crate) fn vault_path() -> Path {
    Path::from("vault.json")
}
pub(crate) fn keys_dir() -> Path {
    Path::from("keys")
}
pub(crate) fn control_dir(within: &str) -> Path {
    Path::from(format!("control/{within}"))
}
pub(crate) fn keys_path(number: u64) -> Path {
    Path::from(format!("keys/{number:020}"))
}
pub(crate) fn machines_path() -> Path {
    Path::from("machines")
}
pub(crate) fn machine_dir(machine: MachineId) -> Path {
    Path::from(format!("machines/{machine}"))
}
pub(crate) fn key_path(machine: MachineId) -> Path {
    Path::from(format!("machines/{machine}/key"))
}
pub(crate) fn manifest_dir(machine: MachineId) -> Path {
    Path::from(format!("machines/{machine}/manifest"))
}
pub(crate) fn manifest_path(machine: MachineId, number: u64) -> Path {
    Path::from(format!("machines/{machine}/manifest/{number:020}"))
}
pub(crate) fn checkpoint_dir(machine: MachineId) -> Path {
    Path::from(format!("machines/{machine}/checkpoint"))
}
pub(crate) fn checkpoint_path(machine: MachineId, number: u64) -> Path {
    Path::from(format!("machines/{machine}/checkpoint/{number:020}"))
}
/// What says that a record and its neighbours were deleted, since a checkpoint makes them needless: it is named by the last of them.
pub(crate) fn pruned_path(machine: MachineId, number: u64) -> Path {
    let last = number.div_ceil(PRUNED_TOGETHER) * PRUNED_TOGETHER;
    Path::from(format!("{}/{last:020}", pruned_dir(machine)))
}
pub(crate) fn pruned_dir(machine: MachineId) -> Path {
    Path::from(format!("machines/{machine}/pruned"))
}
pub(crate) fn object_dir(machine: MachineId, kind: Kind) -> Path {
    let dir = match kind {
        Kind::Segment => "segments",
        Kind::Rewritten => "rewritten",
        Kind::Map => "maps",
    };
    Path::from(format!("machines/{machine}/{dir}"))
}
pub(crate) fn object_path(machine: MachineId, kind: Kind, id: SegmentId) -> Path {
    let suffix = if kind == Kind::Map { "map" } else { "seg" };
    Path::from(format!("{}/{id}.{suffix}", object_dir(machine, kind)))
}
/// The segment or map named by a path, if it names one.
pub(crate) fn segment_of(path: &Path) -> Option<SegmentId> {
    let name = path.filename()?;
    name.strip_suffix(".seg").or_else(|| name.strip_suffix(".map"))?.parse().ok()
}
/// What an object of a machine is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The key, a record, a checkpoint, or a mark that records were deleted.
    Document,
    /// A segment or map.
    Object(ObjectName),
    /// Something else: of a later release, or nobody's.
    Stranger,
}
pub(crate) fn what_is(machine: MachineId, path: &Path) -> What {
    if *path == key_path(machine) {
        return What::Document;
    }
    if let Some(number) = number_of(path) {
        let named =
            [manifest_path(machine, number), checkpoint_path(machine, number), pruned_path(machine, number)];
        return if named.contains(path) { What::Document } else { What::Stranger };
    }
    let Some(id) = segment_of(path) else { return What::Stranger };
    let kinds = [Kind::Segment, Kind::Rewritten, Kind::Map];
    let kind = kinds.into_iter().find(|kind| object_path(machine, *kind, id) == *path);
    kind.map_or(What::Stranger, |kind| What::Object(ObjectName { kind, id }))
}
/// The number of a manifest record or checkpoint.
pub(crate) fn number_of(path: &Path) -> Option<u64> {
    path.filename().filter(|name| name.len() == 20)?.parse().ok()
}

/// Reads a whole object of at most `max` bytes.
pub(crate) async fn read_object(store: &dyn ObjectStore, path: &Path, max: u64) -> Result<Bytes> {
    let got = store.get(path).await.map_err(|error| of_object(path, error))?;
    if got.meta.size > max {
        return Err(VaultError::corrupt(path, "larger than any such object"));
    }
    Ok(got.bytes().await?)
}

/// An object that is not there is called by its name in the vault: a directory would tell its own path.
pub(crate) fn of_object(path: &Path, error: object_store::Error) -> VaultError {
    match error {
        object_store::Error::NotFound { .. } => VaultError::Missing { object: path.to_string() },
        other => other.into(),
    }
}

/// Creates an object; false if one is there already.
pub(crate) async fn create_object(store: &dyn ObjectStore, path: &Path, content: Vec<u8>) -> Result<bool> {
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(path, content.into(), options).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// The same for content that nobody else can have made, since there is something random in it: what is there already may be it. A
/// client of a remote store puts twice when it lost the first answer.
pub(crate) async fn create_own(store: &dyn ObjectStore, path: &Path, content: Vec<u8>) -> Result<bool> {
    if create_object(store, path, content.clone()).await? {
        return Ok(true);
    }
    match read_object(store, path, content.len() as u64).await {
        Ok(there) => Ok(there == content),
        // Larger, so another's.
        Err(VaultError::Corrupt { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether there is such an object.
pub(crate) async fn exists(store: &dyn ObjectStore, path: &Path) -> Result<bool> {
    match store.head(path).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Deletes an object, which need not be there; answers whether it is gone now. It is not if the store refuses, because something there
/// protects it: that may hold for years, and says nothing of the store's state.
pub(crate) async fn delete(store: &dyn ObjectStore, path: &Path) -> Result<bool> {
    match store.delete(path).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(true),
        Err(error) if is_refusal(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_refusal(error: &object_store::Error) -> bool {
    use object_store::Error::{AlreadyExists, Generic, PermissionDenied, Precondition};
    match error {
        // A conflict is with whatever holds it.
        PermissionDenied { .. } | Precondition { .. } | AlreadyExists { .. } => true,
        // Azure is asked in batches, of which the library tells the answers in words.
        Generic { source, .. } => {
            let told = source.to_string();
            ["(code: 403)", "(code: 409)", "(code: 412)"].iter().any(|code| told.contains(code))
        }
        _ => false,
    }
}

/// Deletes an object, which need not be there.
pub(crate) async fn delete_if_there(store: &dyn ObjectStore, path: &Path) -> Result<()> {
    match store.delete(path).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
