//! An object on its way into the store: a small one as one put, a larger one as a multipart upload with one part under way.

use crate::{Result, Vault, VaultError, store::create_own};
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, path::Path};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// The frame that fills a part may reach beyond it by the largest chunk.
const BEYOND_PART_BYTES: usize = highwater_delta::CHUNK_BYTES_MAX + 4096;

/// An object on its way into the store.
pub(crate) struct Upload {
    store: Arc<dyn ObjectStore>,
    /// Of each part but the last.
    part_bytes: usize,
    pub(super) path: Path,
    pub(super) buffer: Vec<u8>,
    multipart: Option<Box<dyn MultipartUpload>>,
    under_way: Option<JoinHandle<object_store::Result<()>>>,
}

impl Upload {
    pub(super) fn new(vault: &Vault, path: Path) -> Self {
        let (store, part_bytes) = (vault.store().clone(), vault.part_bytes());
        Self { store, part_bytes, path, buffer: Vec::new(), multipart: None, under_way: None }
    }

    /// Sends full parts; at most one is under way.
    pub(super) async fn flush(&mut self) -> Result<()> {
        while self.buffer.len() >= self.part_bytes {
            // Of its final size at once: growing by doubling would take twice as much.
            let mut rest = Vec::with_capacity(self.part_bytes + BEYOND_PART_BYTES);
            rest.extend_from_slice(&self.buffer[self.part_bytes..]);
            let mut part = std::mem::replace(&mut self.buffer, rest);
            part.truncate(self.part_bytes);
            self.send(part).await?;
        }
        Ok(())
    }

    async fn send(&mut self, part: Vec<u8>) -> Result<()> {
        self.wait().await?;
        let multipart = match &mut self.multipart {
            Some(multipart) => multipart,
            None => self.multipart.insert(self.store.put_multipart(&self.path).await?),
        };
        self.under_way = Some(tokio::spawn(multipart.put_part(part.into())));
        Ok(())
    }

    async fn wait(&mut self) -> Result<()> {
        if let Some(task) = self.under_way.take() {
            task.await.map_err(|e| VaultError::Store(object_store::Error::JoinError { source: e }))??;
        }
        Ok(())
    }

    /// Sends the rest; the object is complete and durable afterwards. If that fails, nothing of it stays.
    pub(crate) async fn complete(mut self) -> Result<()> {
        let completed = self.finish().await;
        if completed.is_err() {
            let _ = self.abort().await;
        }
        completed
    }

    async fn finish(&mut self) -> Result<()> {
        if self.multipart.is_none() {
            let content = std::mem::take(&mut self.buffer);
            if !create_own(&*self.store, &self.path, content).await? {
                return Err(VaultError::corrupt(&self.path, "a new segment's name exists already"));
            }
            return Ok(());
        }
        if !self.buffer.is_empty() {
            let part = std::mem::take(&mut self.buffer);
            self.send(part).await?;
        }
        self.wait().await?;
        if let Some(multipart) = &mut self.multipart {
            multipart.complete().await?;
        }
        Ok(())
    }

    pub(super) async fn abort(&mut self) -> Result<()> {
        let _ = self.wait().await;
        if let Some(mut multipart) = self.multipart.take() {
            multipart.abort().await?;
        }
        Ok(())
    }
}
