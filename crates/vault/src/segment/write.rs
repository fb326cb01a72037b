//! Writing a segment as a stream: chunks, then their index.

use super::{
    Footer, FrameAt, FrameKind, FrameWriter, PageRef, SEGMENT_BYTES_TARGET, index::IndexBuilder,
    upload::Upload,
};
use crate::{Result, Vault, VaultError, key::MachineKeys, record::SegmentRef, runs::Kind};
use highwater_delta::{ChunkView, MachineId, SegmentId};
use object_store::path::Path;

/// A segment being written; see [`FrameWriter`].
pub(crate) struct SegmentWriter {
    frames: FrameWriter,
    index: IndexBuilder,
}

impl SegmentWriter {
    pub(crate) fn new(vault: &Vault, machine: MachineId, keys: &MachineKeys, kind: Kind) -> Result<Self> {
        Ok(Self { frames: FrameWriter::new(vault, machine, keys, kind)?, index: IndexBuilder::default() })
    }

    pub(crate) fn path(&self) -> &Path {
        self.frames.path()
    }
    pub(crate) fn id(&self) -> SegmentId {
        self.frames.id()
    }
    pub(crate) fn salt(&self) -> [u8; 16] {
        self.frames.salt()
    }

    /// Whether it should be finished.
    pub(crate) fn is_full(&self) -> bool {
        self.frames.bytes() >= SEGMENT_BYTES_TARGET || self.index.is_full()
    }

    /// Appends a chunk that was parsed already; answers where it lies.
    pub(crate) async fn append(&mut self, chunk: &[u8], view: &ChunkView<'_>) -> Result<FrameAt> {
        let at = self.frames.append(FrameKind::Chunk, chunk).await?;
        self.index.add(view, at.frame, at.offset, at.len);
        Ok(at)
    }

    /// Writes index, footer and trailer. The object is complete and durable after [`Upload::complete`].
    pub(crate) async fn close(self) -> Result<(SegmentRef, Upload)> {
        let Self { mut frames, index } = self;
        let chunks = frames.frames();
        let built = index.build();
        let mut pages = Vec::with_capacity(built.pages.len());
        for (disk, first, end, plain) in built.pages {
            let FrameAt { offset, len, frame } = frames.append(FrameKind::Page, &plain).await?;
            pages.push(PageRef { disk, first, end, frame, offset, len });
        }
        let footer = Footer { chunks, data_blocks: built.data_blocks, zero_blocks: built.zero_blocks, pages };
        let plain = postcard::to_stdvec(&footer).map_err(|_| VaultError::Limit("bytes of a footer"))?;
        frames.close(&plain, built.spans)
    }

    /// Gives it up; nothing stays in the store.
    pub(crate) async fn abort(self) -> Result<()> {
        self.frames.abort().await
    }
}
