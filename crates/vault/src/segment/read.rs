//! Reading segments: single frames for recovery, everything in order for verification.

use super::{
    FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Footer, FrameKind, HEADER_BYTES, Identity, Page, PageKind, PageRef,
    TRAILER_BYTES, array, frame_header,
};
use crate::{
    Pace, Result, VaultError,
    key::MachineKeys,
    record::SegmentRef,
    runs::Kind,
    seal::{TAG_BYTES, cipher, nonce},
    store::{object_path, of_object},
};
use aws_lc_rs::aead::LessSafeKey;
use bytes::Bytes;
use highwater_delta::MachineId;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use std::{ops::Range, sync::Arc};

/// Bytes that verification reads at once.
const WALK_BYTES: u64 = 8 << 20;

/// Opens the frames of one segment.
pub(crate) struct SegmentReader {
    store: Arc<dyn ObjectStore>,
    pub(crate) path: Path,
    pub(crate) reference: SegmentRef,
    identity: Identity,
    key: LessSafeKey,
}

/// Where a frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FrameAt {
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) frame: u32,
}

impl FrameAt {
    fn range(self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.len)
    }
}

/// The end of an object, with its footer; empty: it has not been read.
#[derive(Default)]
pub(crate) struct Tail {
    start: u64,
    bytes: Bytes,
}

impl Tail {
    pub(crate) fn has(&self, at: FrameAt) -> bool {
        self.start <= at.offset && at.range().end <= self.start + self.bytes.len() as u64
    }
    fn frame(&self, at: FrameAt) -> Option<Bytes> {
        let from = at.offset.checked_sub(self.start).filter(|_| self.has(at))? as usize;
        Some(self.bytes.slice(from..from + at.len as usize))
    }
}

/// A frame met on a walk through a whole segment.
pub(crate) struct Walked {
    pub(crate) at: FrameAt,
    pub(crate) kind: FrameKind,
    pub(crate) plain: Vec<u8>,
}

impl SegmentReader {
    pub(crate) fn new(
        store: Arc<dyn ObjectStore>,
        machine: MachineId,
        keys: &MachineKeys,
        kind: Kind,
        reference: &SegmentRef,
    ) -> Result<Self> {
        Ok(Self {
            store,
            path: object_path(machine, kind, reference.id),
            reference: reference.clone(),
            identity: Identity { kind, machine, segment: reference.id, salt: reference.salt },
            key: cipher(&keys.segment(reference.id, &reference.salt)?)?,
        })
    }

    /// The footer.
    pub(crate) async fn footer(&self) -> Result<Footer> {
        self.parse_footer(&self.footer_frame().await?)
    }

    /// The footer's content, of a map too.
    pub(crate) async fn footer_frame(&self) -> Result<Vec<u8>> {
        self.one(self.footer_at(), FrameKind::Footer).await
    }

    /// The same, and so many bytes before it, by one request: mostly, what is read next lies there.
    pub(crate) async fn footer_frame_and_tail(&self, before_bytes: u64) -> Result<(Vec<u8>, Tail)> {
        let at = self.footer_at();
        self.check(at)?;
        let start = at.offset.saturating_sub(before_bytes);
        let bytes = self.fetched(start..at.range().end).await?;
        let tail = Tail { start, bytes };
        let footer = tail.frame(at).ok_or_else(|| VaultError::corrupt(&self.path, "cut off"))?;
        Ok((self.open(at, FrameKind::Footer, &footer)?, tail))
    }

    const fn footer_at(&self) -> FrameAt {
        let SegmentRef { footer_offset: offset, footer_len: len, footer_frame: frame, .. } = self.reference;
        FrameAt { offset, len, frame }
    }

    pub(crate) fn parse_footer(&self, plain: &[u8]) -> Result<Footer> {
        let footer: Footer = postcard::from_bytes(plain)
            .map_err(|e| VaultError::corrupt(&self.path, format!("footer: {e}")))?;
        let sorted = footer
            .pages
            .windows(2)
            .all(|w| w[0].disk < w[1].disk || (w[0].disk == w[1].disk && w[0].end <= w[1].first));
        if !sorted || footer.pages.iter().any(|page| page.first >= page.end) {
            return Err(VaultError::corrupt(&self.path, "footer: pages out of order"));
        }
        Ok(footer)
    }

    /// A page.
    pub(crate) async fn page(&self, page: &PageRef, kind: PageKind, tail: &Tail) -> Result<Page> {
        let frame = if kind == PageKind::Leaf { FrameKind::Leaf } else { FrameKind::Page };
        let plain = self.one_of(tail, page.at(), frame).await?;
        Page::decode(&plain, kind, page, &self.path)
    }

    pub(crate) async fn one(&self, at: FrameAt, kind: FrameKind) -> Result<Vec<u8>> {
        self.one_of(&Tail::default(), at, kind).await
    }

    /// A frame that may have been read already.
    pub(crate) async fn one_of(&self, tail: &Tail, at: FrameAt, kind: FrameKind) -> Result<Vec<u8>> {
        self.check(at)?;
        let bytes = match tail.frame(at) {
            Some(bytes) => bytes,
            None => self.fetched(at.range()).await?,
        };
        self.open(at, kind, &bytes)
    }

    async fn fetched(&self, range: Range<u64>) -> Result<Bytes> {
        let end = range.end;
        match self.store.get_range(&self.path, range).await {
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(self.range_error(error, end).await),
        }
    }

    /// Chunks, each as sent, in the order of `frames`. The caller bounds their number.
    pub(crate) async fn chunks(&self, frames: &[FrameAt]) -> Result<Vec<Vec<u8>>> {
        let mut ranges = Vec::with_capacity(frames.len());
        for at in frames {
            self.check(*at)?;
            ranges.push(at.range());
        }
        let end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        let got = match self.store.get_ranges(&self.path, &ranges).await {
            Ok(got) => got,
            Err(error) => return Err(self.range_error(error, end).await),
        };
        frames.iter().zip(got).map(|(at, bytes)| self.open(*at, FrameKind::Chunk, &bytes)).collect()
    }

    /// A whole reference to the object, from its trailer. What that says is checked by whoever reads the footer.
    pub(crate) async fn reference_of_trailer(&self) -> Result<SegmentRef> {
        let corrupt = |cause: &str| VaultError::corrupt(&self.path, cause);
        let end = self.reference.bytes;
        let begin =
            end.checked_sub(TRAILER_BYTES as u64).ok_or_else(|| corrupt("shorter than any segment"))?;
        let bytes = self.fetched(begin..end).await?;
        if bytes.len() != TRAILER_BYTES {
            return Err(corrupt("cut off"));
        }
        let footer_offset = u64::from_le_bytes(array(&bytes, 24));
        let footer_len = u32::from_le_bytes(array(&bytes, 32));
        let footer_frame = u32::from_le_bytes(array(&bytes, 36));
        if self.identity.trailer(footer_offset, footer_len, footer_frame, end)[..] != bytes[..] {
            return Err(corrupt("its trailer does not fit"));
        }
        Ok(SegmentRef { footer_offset, footer_len, footer_frame, ..self.reference.clone() })
    }

    /// A range that lies behind the end of the object is damage of the vault, not failure of the store. Stores have no words of their own for
    /// that: so it is looked how long the object is.
    async fn range_error(&self, error: object_store::Error, end: u64) -> VaultError {
        if !matches!(error, object_store::Error::Generic { .. }) {
            return of_object(&self.path, error);
        }
        match self.store.head(&self.path).await {
            Ok(meta) if meta.size < end => {
                VaultError::corrupt(&self.path, format!("it has {} bytes, and should have more", meta.size))
            }
            Err(gone @ object_store::Error::NotFound { .. }) => of_object(&self.path, gone),
            _ => of_object(&self.path, error),
        }
    }

    fn check(&self, at: FrameAt) -> Result<()> {
        let least = (FRAME_HEADER_BYTES + TAG_BYTES) as u32;
        let inside = at.offset.checked_add(u64::from(at.len)).is_some_and(|end| end <= self.reference.bytes);
        if at.len < least || at.len as usize > FRAME_BYTES_MAX || !inside {
            return Err(VaultError::corrupt(&self.path, "a frame lies outside of it"));
        }
        Ok(())
    }

    pub(crate) fn open(&self, at: FrameAt, kind: FrameKind, bytes: &[u8]) -> Result<Vec<u8>> {
        let corrupt = |cause: &str| {
            VaultError::corrupt(&self.path, format!("frame {} at {}: {cause}", at.frame, at.offset))
        };
        if bytes.len() != at.len as usize {
            return Err(corrupt("cut off"));
        }
        let Some((header, body)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Err(corrupt("cut off"));
        };
        if *header != frame_header(body.len(), at.frame, kind)? {
            return Err(corrupt("its header does not fit"));
        }
        let mut plain = body.to_vec();
        let len = self
            .key
            .open_in_place(nonce(u64::from(at.frame)), self.identity.aad(header), &mut plain)
            .map_err(|_| corrupt("not authentic"))?
            .len();
        plain.truncate(len);
        Ok(plain)
    }

    /// Reads the whole object from the front, as fast as it may, and gives every frame to `each`, which may refuse it.
    pub(crate) async fn walk(&self, pace: &Pace, mut each: impl FnMut(Walked) -> Result<()>) -> Result<()> {
        let corrupt = |cause: &str| VaultError::corrupt(&self.path, cause);
        let head = self.store.head(&self.path).await;
        let bytes_all = head.map_err(|error| of_object(&self.path, error))?.size;
        if bytes_all != self.reference.bytes || bytes_all < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            return Err(corrupt("its length is not what the manifest says"));
        }
        let mut window = Window::new(WALK_BYTES);
        if window.take(self, 0, HEADER_BYTES).await?[..] != self.identity.header() {
            return Err(corrupt("its header does not fit"));
        }
        let frames_end = bytes_all - TRAILER_BYTES as u64;
        let each = |frame| each(frame).map(|()| true);
        let frames = self.frames(&mut window, pace, frames_end, each).await?;
        let SegmentRef { footer_offset, footer_len, footer_frame, .. } = self.reference;
        if footer_offset + u64::from(footer_len) != frames_end || footer_frame + 1 != frames {
            return Err(corrupt("its footer is not where the manifest says"));
        }
        let trailer = self.identity.trailer(footer_offset, footer_len, footer_frame, bytes_all);
        if window.take(self, frames_end, TRAILER_BYTES).await?[..] != trailer {
            return Err(corrupt("its trailer does not fit"));
        }
        Ok(())
    }

    /// Reads frames from the front until `each` wants no more or one cannot be read, whatever header and trailer say.
    pub(crate) async fn walk_frames(
        &self,
        pace: &Pace,
        each: impl FnMut(Walked) -> Result<bool>,
    ) -> Result<()> {
        let frames_end = self.reference.bytes.saturating_sub(TRAILER_BYTES as u64);
        self.frames(&mut Window::new(WALK_BYTES), pace, frames_end, each).await.map(drop)
    }

    /// Answers how many there were.
    async fn frames(
        &self,
        window: &mut Window,
        pace: &Pace,
        frames_end: u64,
        mut each: impl FnMut(Walked) -> Result<bool>,
    ) -> Result<u32> {
        let corrupt = |cause: &str| VaultError::corrupt(&self.path, cause);
        let (mut offset, mut frame) = (HEADER_BYTES as u64, 0);
        while offset < frames_end {
            let header = window.take(self, offset, FRAME_HEADER_BYTES).await?;
            let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as u64
                + FRAME_HEADER_BYTES as u64;
            let kind = FrameKind::from_byte(header[8]).ok_or_else(|| corrupt("a frame of unknown kind"))?;
            if offset + len > frames_end || len > FRAME_BYTES_MAX as u64 {
                return Err(corrupt("a frame reaches behind its end"));
            }
            let at = FrameAt { offset, len: len as u32, frame };
            self.check(at)?;
            let bytes = window.take(self, offset, len as usize).await?;
            pace.spend(window.take_fetched()).await;
            let goes_on = each(Walked { at, kind, plain: self.open(at, kind, &bytes)? })?;
            offset += len;
            frame += 1;
            if !goes_on {
                break;
            }
        }
        Ok(frame)
    }
}

/// A piece of an object in memory, moved forward.
pub(crate) struct Window {
    /// Fetched at once.
    ahead: u64,
    start: u64,
    bytes: Bytes,
    fetched: u64,
}

impl Window {
    pub(crate) fn new(ahead: u64) -> Self {
        Self { ahead, start: 0, bytes: Bytes::new(), fetched: 0 }
    }
    /// Bytes fetched since this was asked last.
    pub(crate) fn take_fetched(&mut self) -> u64 {
        std::mem::take(&mut self.fetched)
    }

    pub(crate) async fn take(&mut self, reader: &SegmentReader, offset: u64, len: usize) -> Result<Bytes> {
        let end = offset + len as u64;
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let upto = (offset + self.ahead).max(end).min(reader.reference.bytes);
            self.bytes = reader.fetched(offset..upto).await?;
            self.start = offset;
            self.fetched += self.bytes.len() as u64;
        }
        let from = (offset - self.start) as usize;
        if from + len > self.bytes.len() {
            return Err(VaultError::corrupt(&reader.path, "cut off"));
        }
        Ok(self.bytes.slice(from..from + len))
    }

    /// A frame.
    pub(crate) async fn frame(
        &mut self,
        reader: &SegmentReader,
        at: FrameAt,
        kind: FrameKind,
    ) -> Result<Vec<u8>> {
        reader.check(at)?;
        let bytes = self.take(reader, at.offset, at.len as usize).await?;
        reader.open(at, kind, &bytes)
    }
}
