//! Uploads in parts, each call of which may fail like any other.

use crate::{Shared, When, failure, locked};
use async_trait::async_trait;
use object_store::{path::Path, *};
use std::fmt;
use std::sync::Arc;

pub(crate) fn wrap(
    inner: Box<dyn MultipartUpload>,
    path: Path,
    shared: Arc<Shared>,
) -> Box<dyn MultipartUpload> {
    Box::new(FaultyUpload { inner, path, shared })
}

struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    path: Path,
    shared: Arc<Shared>,
}

impl fmt::Debug for FaultyUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyUpload({})", self.path)
    }
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, shared) = (self.inner.put_part(data), self.shared.clone());
        Box::pin(async move {
            let luck = shared.begin().await;
            if luck.fails == Some(When::Before) {
                return Err(failure());
            }
            let done = part.await;
            shared.answer(&luck, done).await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let luck = self.shared.begin().await;
        if luck.fails == Some(When::Before) {
            return Err(failure());
        }
        let done = self.inner.complete().await;
        let done = done.inspect(|_| locked(&self.shared.changes).put(&self.path));
        self.shared.answer(&luck, done).await
    }

    async fn abort(&mut self) -> Result<()> {
        let luck = self.shared.begin().await;
        if luck.fails == Some(When::Before) {
            return Err(failure());
        }
        let done = self.inner.abort().await;
        self.shared.answer(&luck, done).await
    }
}
