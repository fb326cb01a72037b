//! A layer over a store that counts what it is asked, as a bucket would bill it, and lets each request take its time.
//!
//! Several ranges of an object read at once are put together here as for a bucket: ranges beside each other are one request.

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use object_store::{path::Path, *};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What was asked since it was last taken.
#[derive(Debug, Default)]
pub struct Counts {
    pub gets: AtomicU64,
    pub puts: AtomicU64,
    /// Lists: one for each thousand names, as buckets answer them.
    pub lists: AtomicU64,
    pub read_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
    /// Of these, maps.
    pub map_bytes: AtomicU64,
}

/// The same at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    pub gets: u64,
    pub puts: u64,
    pub lists: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub map_bytes: u64,
}

impl Counts {
    fn written(&self, path: &Path, bytes: usize) {
        self.puts.fetch_add(1, Relaxed);
        self.written_bytes.fetch_add(bytes as u64, Relaxed);
        if path.as_ref().ends_with(".map") {
            self.map_bytes.fetch_add(bytes as u64, Relaxed);
        }
    }

    /// And begins anew.
    pub fn take(&self) -> Counted {
        let take = |count: &AtomicU64| count.swap(0, Relaxed);
        Counted {
            gets: take(&self.gets),
            puts: take(&self.puts),
            lists: take(&self.lists),
            read_bytes: take(&self.read_bytes),
            written_bytes: take(&self.written_bytes),
            map_bytes: take(&self.map_bytes),
        }
    }
}

impl Counted {
    /// All but deletions, which are not counted: buckets do them for nothing.
    pub fn requests(&self) -> u64 {
        self.gets + self.puts + self.lists
    }
}

/// See the module.
pub struct Counting {
    inner: Arc<dyn ObjectStore>,
    counts: Arc<Counts>,
    delay: Duration,
}

impl Counting {
    /// Over a store; each request takes so much longer.
    pub fn new(inner: Arc<dyn ObjectStore>, counts: &Arc<Counts>, delay: Duration) -> Arc<Self> {
        Arc::new(Self { inner, counts: counts.clone(), delay })
    }

    async fn wait(&self) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
    }

    fn listed(
        &self,
        names: BoxStream<'static, Result<ObjectMeta>>,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        const PAGE: usize = 1000;
        let (counts, delay) = (self.counts.clone(), self.delay);
        counts.lists.fetch_add(1, Relaxed);
        let paged = names.enumerate().then(move |(n, name)| {
            let counts = counts.clone();
            async move {
                if n % PAGE == 0 {
                    counts.lists.fetch_add(u64::from(n > 0), Relaxed);
                    tokio::time::sleep(delay).await;
                }
                name
            }
        });
        Box::pin(paged)
    }
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "counted {}", self.inner)
    }
}
impl fmt::Debug for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counting({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Counting {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.wait().await;
        self.counts.written(path, payload.content_length());
        self.inner.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.wait().await;
        self.counts.puts.fetch_add(1, Relaxed);
        let inner = self.inner.put_multipart_opts(path, options).await?;
        Ok(Box::new(Upload { inner, path: path.clone(), counts: self.counts.clone(), delay: self.delay }))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.wait().await;
        self.counts.gets.fetch_add(1, Relaxed);
        let only_head = options.head;
        let got = self.inner.get_opts(path, options).await?;
        if !only_head {
            self.counts.read_bytes.fetch_add(got.range.end.saturating_sub(got.range.start), Relaxed);
        }
        Ok(got)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listed(self.inner.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listed(self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.wait().await;
        self.counts.lists.fetch_add(1, Relaxed);
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    path: Path,
    counts: Arc<Counts>,
    delay: Duration,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.counts.written(&self.path, data.content_length());
        let (part, delay) = (self.inner.put_part(data), self.delay);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            part.await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        tokio::time::sleep(self.delay).await;
        self.counts.puts.fetch_add(1, Relaxed);
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
