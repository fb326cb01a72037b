//! Writing an object of frames as a stream: header, sealed frames, footer and trailer. What the frames hold is the caller's.

use super::{
    FRAME_HEADER_BYTES, FrameKind, HEADER_BYTES, Identity, TRAILER_BYTES, frame_header, read::FrameAt,
    upload::Upload,
};
use crate::{
    Result, Vault, VaultError,
    key::{MachineKeys, random},
    record::{DiskSpan, SegmentRef},
    runs::Kind,
    seal::{cipher, nonce},
    store::object_path,
};
use aws_lc_rs::aead::LessSafeKey;
use highwater_delta::{CommitId, MachineId, SegmentId};
use object_store::path::Path;

/// An object being written. Dropped unfinished, it leaves nothing in a local store and an incomplete multipart
/// upload in a remote one, which the store's own rules expire.
pub(crate) struct FrameWriter {
    identity: Identity,
    key: LessSafeKey,
    upload: Upload,
    offset: u64,
    frame: u32,
}

impl FrameWriter {
    pub(crate) fn new(vault: &Vault, machine: MachineId, keys: &MachineKeys, kind: Kind) -> Result<Self> {
        let segment = vault.new_segment_id();
        let mut salt = [0; 16];
        random(&mut salt)?;
        let identity = Identity { kind, machine, segment, salt };
        let mut upload = Upload::new(vault, object_path(machine, kind, segment));
        upload.buffer.extend_from_slice(&identity.header());
        let key = cipher(&keys.segment(segment, &salt)?)?;
        Ok(Self { identity, key, upload, offset: HEADER_BYTES as u64, frame: 0 })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.upload.path
    }
    pub(crate) fn id(&self) -> SegmentId {
        self.identity.segment
    }
    pub(crate) fn salt(&self) -> [u8; 16] {
        self.identity.salt
    }
    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.offset
    }
    /// Frames so far.
    pub(crate) fn frames(&self) -> u32 {
        self.frame
    }

    /// Seals a frame, and sends what fills a part.
    pub(crate) async fn append(&mut self, kind: FrameKind, plain: &[u8]) -> Result<FrameAt> {
        let at = self.seal(kind, plain)?;
        self.upload.flush().await?;
        Ok(at)
    }

    fn seal(&mut self, kind: FrameKind, plain: &[u8]) -> Result<FrameAt> {
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
        let at = FrameAt { offset: self.offset, len: len as u32, frame: self.frame };
        self.offset += len as u64;
        // A segment ends long before 2^32 frames; a repeated nonce must be impossible all the same.
        self.frame = self.frame.checked_add(1).ok_or(VaultError::Limit("frames of a segment"))?;
        Ok(at)
    }

    /// Writes footer and trailer. The object is complete and durable after [`Upload::complete`]. Which commit brings it is
    /// known when it is recorded.
    pub(crate) fn close(mut self, footer: &[u8], spans: Vec<DiskSpan>) -> Result<(SegmentRef, Upload)> {
        let at = self.seal(FrameKind::Footer, footer)?;
        let bytes = self.offset + TRAILER_BYTES as u64;
        let trailer = self.identity.trailer(at.offset, at.len, at.frame, bytes);
        self.upload.buffer.extend_from_slice(&trailer);
        let Identity { segment: id, salt, .. } = self.identity;
        let (footer_offset, footer_len, footer_frame) = (at.offset, at.len, at.frame);
        let commit = CommitId::NONE;
        let object = SegmentRef { id, commit, bytes, salt, footer_offset, footer_len, footer_frame, spans };
        Ok((object, self.upload))
    }

    /// Gives it up; nothing stays in the store.
    pub(crate) async fn abort(mut self) -> Result<()> {
        self.upload.abort().await
    }
}
