//! Writing a segment as a stream: small ones as one put, larger ones as a multipart upload with one part under way.

use super::{
    FRAME_HEADER_BYTES, Footer, FrameKind, HEADER_BYTES, Identity, PageRef, SEGMENT_BYTES_TARGET,
    frame_header, index::IndexBuilder,
};
use crate::{
    Result, Vault, VaultError,
    key::{MachineKeys, random},
    record::SegmentRef,
    seal::{cipher, nonce},
    store::{create_object, read_object, segment_path},
};
use aws_lc_rs::aead::LessSafeKey;
use highwater_delta::{ChunkView, CommitId, MachineId, SegmentId};
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, path::Path};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// The frame that fills a part may reach beyond it by the largest chunk.
const BEYOND_PART_BYTES: usize = highwater_delta::CHUNK_BYTES_MAX + 4096;

/// A segment being written. Dropped unfinished, it leaves nothing in a local store and an incomplete multipart
/// upload in a remote one, which the store's own rules expire.
pub(crate) struct SegmentWriter {
    identity: Identity,
    key: LessSafeKey,
    upload: Upload,
    offset: u64,
    frame: u32,
    index: IndexBuilder,
}

impl SegmentWriter {
    pub(crate) fn new(vault: &Vault, machine: MachineId, keys: &MachineKeys) -> Result<Self> {
        let segment = SegmentId::new();
        let mut salt = [0; 16];
        random(&mut salt)?;
        let identity = Identity { machine, segment, salt };
        let mut upload = Upload::new(vault, segment_path(machine, segment));
        upload.buffer.extend_from_slice(&identity.header());
        Ok(Self {
            identity,
            key: cipher(&keys.segment(segment, &salt)?)?,
            upload,
            offset: HEADER_BYTES as u64,
            frame: 0,
            index: IndexBuilder::default(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.upload.path
    }

    /// Whether it should be finished.
    pub(crate) fn is_full(&self) -> bool {
        self.offset >= SEGMENT_BYTES_TARGET || self.index.is_full()
    }

    /// Appends a chunk that was parsed already.
    pub(crate) async fn append(&mut self, chunk: &[u8], view: &ChunkView<'_>) -> Result<()> {
        let (offset, frame) = (self.offset, self.frame);
        let len = self.frame(FrameKind::Chunk, chunk)?;
        self.index.add(view, frame, offset, len);
        self.upload.flush().await
    }

    fn frame(&mut self, kind: FrameKind, plain: &[u8]) -> Result<u32> {
        let body_len = plain.len() + self.key.algorithm().tag_len();
        let header = frame_header(body_len, self.frame, kind)?;
        let buffer = &mut self.upload.buffer;
        buffer.extend_from_slice(&header);
        let body_at = buffer.len();
        buffer.extend_from_slice(plain);
        let tag = self
            .key
            .seal_in_place_separate_tag(
                nonce(u64::from(self.frame)),
                self.identity.aad(&header),
                &mut buffer[body_at..],
            )
            .map_err(|_| VaultError::Crypto("sealing"))?;
        buffer.extend_from_slice(tag.as_ref());
        let len = FRAME_HEADER_BYTES + body_len;
        self.offset += len as u64;
        // A segment ends long before 2^32 frames; a repeated nonce must be impossible all the same.
        self.frame = self.frame.checked_add(1).ok_or(VaultError::Limit("frames of a segment"))?;
        Ok(len as u32)
    }

    /// Writes index, footer and trailer. The object is complete and durable after [`Upload::complete`].
    pub(crate) async fn close(mut self, commit: CommitId) -> Result<(SegmentRef, Upload)> {
        let chunks = self.frame;
        let built = std::mem::take(&mut self.index).build();
        let mut pages = Vec::with_capacity(built.pages.len());
        for (disk, first, end, plain) in built.pages {
            let (offset, frame) = (self.offset, self.frame);
            let len = self.frame(FrameKind::Page, &plain)?;
            pages.push(PageRef { disk, first, end, frame, offset, len });
            self.upload.flush().await?;
        }
        let footer = Footer { chunks, data_blocks: built.data_blocks, zero_blocks: built.zero_blocks, pages };
        let plain = postcard::to_stdvec(&footer).map_err(|_| VaultError::Limit("bytes of a footer"))?;
        let (footer_offset, footer_frame) = (self.offset, self.frame);
        let footer_len = self.frame(FrameKind::Footer, &plain)?;
        let bytes = self.offset + super::TRAILER_BYTES as u64;
        let trailer = self.identity.trailer(footer_offset, footer_len, footer_frame, bytes);
        self.upload.buffer.extend_from_slice(&trailer);
        let Identity { segment: id, salt, .. } = self.identity;
        let spans = built.spans;
        let segment = SegmentRef { id, commit, bytes, salt, footer_offset, footer_len, footer_frame, spans };
        Ok((segment, self.upload))
    }

    /// Gives it up; nothing stays in the store.
    pub(crate) async fn abort(mut self) -> Result<()> {
        self.upload.abort().await
    }
}

/// An object on its way into the store.
pub(crate) struct Upload {
    store: Arc<dyn ObjectStore>,
    /// Of each part but the last.
    part_bytes: usize,
    path: Path,
    buffer: Vec<u8>,
    multipart: Option<Box<dyn MultipartUpload>>,
    under_way: Option<JoinHandle<object_store::Result<()>>>,
}

impl Upload {
    fn new(vault: &Vault, path: Path) -> Self {
        let (store, part_bytes) = (vault.store().clone(), vault.part_bytes());
        Self { store, part_bytes, path, buffer: Vec::new(), multipart: None, under_way: None }
    }

    /// Sends full parts; at most one is under way.
    async fn flush(&mut self) -> Result<()> {
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
            if !create_object(&*self.store, &self.path, content.clone()).await?
                // A client of a remote store may have put it twice, having lost the first answer.
                && read_object(&*self.store, &self.path, content.len() as u64).await? != content
            {
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

    async fn abort(&mut self) -> Result<()> {
        let _ = self.wait().await;
        if let Some(mut multipart) = self.multipart.take() {
            multipart.abort().await?;
        }
        Ok(())
    }
}
