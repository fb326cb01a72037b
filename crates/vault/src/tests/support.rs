//! What the tests share: chunks made from block numbers, points, and an object store that fails on demand.

use crate::{DiskRecord, MachineWriter, Result, Vault, VaultKey};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use highwater_delta::*;
use object_store::{path::Path, *};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::Duration;

pub const B: usize = BLOCK_BYTES;

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
pub fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(object_store::memory::InMemory::new())
}
pub fn machine() -> MachineId {
    MachineId::from_bytes([1; 16])
}
pub fn disk(n: u8) -> DiskId {
    DiskId::from_bytes([n; 16])
}
pub fn key() -> VaultKey {
    VaultKey::generate().unwrap()
}
pub fn records(blocks: u64) -> Vec<DiskRecord> {
    [10, 11]
        .map(|n| DiskRecord { disk: disk(n), name: format!("vd{n}"), size_bytes: blocks * B as u64 })
        .to_vec()
}
pub fn point(blocks: u64) -> CommitKind {
    let size_bytes = blocks * B as u64;
    CommitKind::Point(PointInfo {
        consistency: Consistency::Filesystem,
        taken_at_ms: 5,
        freeze_us: 7,
        disks: [10, 11].map(|n| PointDisk { disk: disk(n), size_bytes }).to_vec(),
    })
}
/// The content of a block that was written as version `version`; 0 is zeros.
pub fn content(version: u32) -> [u8; B] {
    let mut block = [0; B];
    for (i, b) in block.iter_mut().enumerate().skip(usize::from(version == 0) * B) {
        *b = (version as usize * 31 + i / 100) as u8 | 1;
    }
    block[..4].copy_from_slice(&version.to_le_bytes());
    block
}
/// A chunk of one run.
pub fn chunk(disk: DiskId, start: u64, versions: &[u32], key: &HashKey) -> Bytes {
    let payload: Vec<u8> = versions.iter().flat_map(|v| content(*v)).collect();
    let extent = Extent { start: Block(start), count: versions.len() as u32, fill: Fill::Data };
    let mut out = Vec::new();
    encode_chunk(disk, &[extent], &payload, key, 1, &mut out).unwrap();
    out.into()
}
pub async fn vault_on(store: Arc<dyn ObjectStore>) -> (Vault, VaultKey) {
    let key = key();
    let vault = Vault::create(store, &key).await.unwrap();
    vault.register_machine(machine(), "web-1").await.unwrap();
    (vault, key)
}
/// One delta with one run on disk 10, committed as a point.
pub async fn deliver(writer: &mut MachineWriter, start: u64, versions: &[u32]) -> Result<CommitId> {
    let key = writer.hash_key();
    writer.set_disks(records(64))?;
    writer.begin(DeltaId::new()).await?;
    writer.push(chunk(disk(10), start, versions, &key)).await?;
    writer.commit(point(64)).await
}
/// A disk's content at a commit.
pub async fn read_all(vault: &Vault, disk: DiskId, at: CommitId) -> Result<Vec<u8>> {
    let map = vault.block_map(machine(), disk, at).await?;
    let mut out = vec![7; map.blocks() as usize * B];
    map.read(BlockRange::new(0, map.blocks()), &mut out).await?;
    Ok(out)
}

/// An object store whose n-th call fails: before it had any effect, or after it had all of it.
#[derive(Debug)]
pub struct Faulty {
    pub inner: Arc<dyn ObjectStore>,
    pub calls: AtomicU64,
    /// Number of the call that fails, from 1, and whether it has its effect all the same.
    pub fail: Mutex<Option<(u64, bool)>>,
    /// Puts take a while, and are not stopped by whoever no longer waits for them, as with a directory.
    pub slow: AtomicBool,
}
/// How long a slow put takes.
pub const SLOW: Duration = Duration::from_millis(200);

impl Faulty {
    pub fn new(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            calls: AtomicU64::new(0),
            fail: Mutex::new(None),
            slow: AtomicBool::new(false),
        })
    }
    /// The n-th call from now fails.
    pub fn arm(&self, fail: Option<(u64, bool)>) {
        self.calls.store(0, Ordering::SeqCst);
        *self.fail.lock().unwrap() = fail;
    }
    /// Whether this call fails, and if it shall have its effect.
    fn strike(&self) -> Option<bool> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.fail.lock().unwrap().filter(|(n, _)| *n == call).map(|(_, late)| late)
    }
}
fn failure() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "injected".into() }
}
impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        match self.strike() {
            None if self.slow.load(Ordering::SeqCst) => {
                let (inner, path) = (self.inner.clone(), path.clone());
                let put = async move {
                    tokio::time::sleep(SLOW).await;
                    inner.put_opts(&path, payload, options).await
                };
                tokio::spawn(put).await?
            }
            None => self.inner.put_opts(path, payload, options).await,
            Some(late) => {
                if late {
                    self.inner.put_opts(path, payload, options).await?;
                }
                Err(failure())
            }
        }
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        match self.strike() {
            None => self.inner.put_multipart_opts(path, options).await,
            Some(_) => Err(failure()),
        }
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        match self.strike() {
            None => self.inner.get_opts(path, options).await,
            Some(_) => Err(failure()),
        }
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        match self.strike() {
            None => self.inner.delete_stream(paths),
            Some(_) => Box::pin(futures::stream::iter([Err(failure())])),
        }
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.strike() {
            None => self.inner.list(prefix),
            Some(_) => Box::pin(futures::stream::iter([Err(failure())])),
        }
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        match self.strike() {
            None => self.inner.list_with_delimiter(prefix).await,
            Some(_) => Err(failure()),
        }
    }
    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        Err(failure())
    }
}
