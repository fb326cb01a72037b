//! A local directory as a store that writes large objects out while they grow, and does not keep them in memory.
//!
//! Left alone, the kernel keeps a segment in memory until it is synced, and a commit then waits for all of it. And every segment
//! takes fresh memory from whatever else the machine could use it for, although what was stored is hardly ever read
//! again soon; in a virtual machine fresh memory is slow too, since the host has to find it first. Here each part's writing
//! out begins as soon as the part is there, and what lies [`KEEP_BYTES`] before it is waited for and given back.
//!
//! **These are hints only:** what makes an object durable is the sync at its completion, as ever. Where a hint finds no file, or
//! cannot be given, nothing is lost but time. An error of the disk while writing out is told to that sync too, though the hint
//! saw it first: each open file has its own place in a file's errors (`lib/errseq.c`), and the store opened its own before.

use super::ownership::{Ownership, failed};
use crate::hint;
use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
    local::LocalFileSystem, path::Path,
};
use std::{fs::File, ops::Range, path::PathBuf, sync::Arc};

/// So much of an upload may be on its way to the disk, so that one with a long way is kept busy.
const KEEP_BYTES: u64 = 8 << 20;
/// So much is given back at once.
const GIVE_BACK_BYTES: u64 = 4 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct WriteBehind(pub(super) LocalFileSystem, pub(super) Ownership);

impl std::fmt::Display for WriteBehind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for WriteBehind {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let (object, ownership) = (self.0.path_to_filesystem(path)?, self.1.clone());
        let put = move || ownership.put(&object, &payload, &options.mode);
        tokio::task::spawn_blocking(put).await?
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let (object, ownership) = (self.0.path_to_filesystem(path)?, self.1.clone());
        tokio::task::spawn_blocking(move || ownership.make_parents(&object)).await??;
        let upload = self.0.put_multipart_opts(path, options).await?;
        let staged: Arc<std::path::Path> = staged(&self.0, path)?.into();
        let (file, ownership) = (staged.clone(), self.1.clone());
        let adopt = move || {
            File::open(&file).and_then(|opened| ownership.adopt(&opened)).map_err(|e| failed(&file, e))
        };
        tokio::task::spawn_blocking(adopt).await??;
        Ok(Box::new(Upload { upload, staged, end: 0, given_back: 0 }))
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(path, options).await
    }
    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.0.get_ranges(path, ranges).await
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.0.clone();
        let synced = move |path: Path| {
            let file = store.path_to_filesystem(&path);
            async move {
                if is_key(&path) {
                    tokio::task::spawn_blocking(move || sync_dir_of(&file?)).await??;
                }
                Ok(path)
            }
        };
        self.0.delete_stream(paths).and_then(synced).boxed()
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list_with_offset(prefix, offset)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.0.rename_opts(from, to, options).await
    }
}

/// Whether this is deleted so that it can never be read again: after a power cut it must not be there once more.
fn is_key(path: &Path) -> bool {
    path.prefix_matches(&Path::from("keys")) || path.filename() == Some("key")
}

fn sync_dir_of(file: &std::path::Path) -> Result<()> {
    let dir = file.parent().unwrap_or(file);
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed(dir, e))
}

/// Where the store keeps an object while it is uploaded: the first free name of this form, and the names of segments are
/// never used twice.
fn staged(store: &LocalFileSystem, path: &Path) -> Result<PathBuf> {
    let mut name = store.path_to_filesystem(path)?.into_os_string();
    name.push("#1");
    Ok(name.into())
}

#[derive(Debug)]
struct Upload {
    upload: Box<dyn MultipartUpload>,
    staged: Arc<std::path::Path>,
    /// Bytes put so far, and how many of them the kernel was told to let go.
    end: u64,
    given_back: u64,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.end..self.end + data.content_length() as u64;
        let mut before = self.given_back..part.start.saturating_sub(KEEP_BYTES).max(self.given_back);
        if before.end - before.start < GIVE_BACK_BYTES {
            before.end = before.start;
        }
        (self.end, self.given_back) = (part.end, before.end);
        let (written, staged) = (self.upload.put_part(data), self.staged.clone());
        async move {
            written.await?;
            // Hints: neither their errors nor their panics are of interest.
            let _ = tokio::task::spawn_blocking(move || write_out(&staged, part, before)).await;
            Ok(())
        }
        .boxed()
    }
    async fn complete(&mut self) -> Result<PutResult> {
        self.upload.complete().await
    }
    async fn abort(&mut self) -> Result<()> {
        self.upload.abort().await
    }
}

/// Begins to write out a part of a file; waits until an earlier one is written, and gives its memory back.
fn write_out(path: &std::path::Path, part: Range<u64>, before: Range<u64>) -> std::io::Result<()> {
    let file = File::open(path)?;
    hint::begin(&file, &part)?;
    hint::give_back(&file, &before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;

    #[tokio::test]
    async fn the_hint_finds_its_file_and_the_object_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let inner = LocalFileSystem::new_with_prefix(dir.path()).unwrap().with_fsync(true);
        let store = WriteBehind(inner, Ownership::of(&dir.path().canonicalize().unwrap()).unwrap());
        let path = Path::from("machines/m/segments/s.seg");
        let mut upload = store.put_multipart(&path).await.unwrap();
        upload.put_part(vec![1; 100].into()).await.unwrap();
        let staged = staged(&store.0, &path).unwrap();
        assert_eq!(
            staged.metadata().unwrap().len(),
            100,
            "the store keeps its uploads under other names now"
        );
        write_out(&staged, 50..100, 0..50).unwrap();
        upload.put_part(vec![2; 50].into()).await.unwrap();
        upload.complete().await.unwrap();
        assert!(!staged.exists());
        let bytes = store.get(&path).await.unwrap().bytes().await.unwrap();
        assert_eq!(bytes, [vec![1; 100], vec![2; 50]].concat());

        let path = Path::from("machines/m/segments/large.seg");
        let mut upload = store.put_multipart(&path).await.unwrap();
        let content: Vec<u8> = (0..20 << 20).map(|at: usize| (at >> 8) as u8).collect();
        for part in content.chunks(1 << 20) {
            upload.put_part(part.to_vec().into()).await.unwrap();
        }
        upload.complete().await.unwrap();
        assert!(store.get(&path).await.unwrap().bytes().await.unwrap() == content);
        store.delete(&path).await.unwrap();

        let mut upload = store.put_multipart(&Path::from("machines/m/segments/t.seg")).await.unwrap();
        upload.put_part(vec![1; 100].into()).await.unwrap();
        upload.abort().await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("machines/m/segments")).unwrap().count(), 1);
    }
}
