//! One disk's bitmaps: two that the kernel's programs write in turn, and *pending*.

use super::{TrackerError, bitmap::Bitmap, object, record::DiskRecord};
use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// The names of the pins of the two bitmaps, by parity.
const TURNS: [&str; 2] = ["a", "b"];
const PENDING: &str = "pending";

/// A disk's bitmaps.
pub struct Slot {
    pub record: DiskRecord,
    turns: [Bitmap; 2],
    pub pending: Bitmap,
    /// Which of the two the programs write now: the parity of the slot's epoch.
    pub parity: u32,
}

impl Slot {
    /// New ones, all clear. A failure can leave some: they are replaced by the next try.
    pub fn create(
        bpf_dir: &Path,
        record: DiskRecord,
        words: usize,
        parity: u32,
    ) -> Result<Self, TrackerError> {
        let create = |which| {
            let path = object::bits_path(bpf_dir, record.slot, which);
            let _ = fs::remove_file(&path);
            Bitmap::create(words, &path)
        };
        let (turns, pending) = ([create(TURNS[0])?, create(TURNS[1])?], create(PENDING)?);
        Ok(Self { turns, pending, record, parity })
    }

    /// Those that an earlier life left.
    pub fn open(bpf_dir: &Path, record: DiskRecord, parity: u32) -> Result<Self, TrackerError> {
        let open = |which| Bitmap::open(&object::bits_path(bpf_dir, record.slot, which));
        let (turns, pending) = ([open(TURNS[0])?, open(TURNS[1])?], open(PENDING)?);
        Ok(Self { turns, pending, record, parity })
    }

    /// Removes their pins.
    pub fn remove(&self, bpf_dir: &Path) {
        for which in TURNS.into_iter().chain([PENDING]) {
            let _ = fs::remove_file(object::bits_path(bpf_dir, self.record.slot, which));
        }
    }

    /// One of the two that take turns.
    pub fn turn(&self, parity: u32) -> &Bitmap {
        &self.turns[(parity & 1) as usize]
    }
    /// What the programs write now.
    pub fn current(&self) -> &Bitmap {
        self.turn(self.parity)
    }
    /// What they wrote in the epoch before.
    pub fn spare(&self) -> &Bitmap {
        self.turn(self.parity + 1)
    }

    /// Moves the spare bitmap's bits to pending, and tells them (index of the word, bits). No program may write it any more.
    pub fn empty_spare(&self, mut each: impl FnMut(usize, u64)) {
        let words = self.pending.words();
        self.spare().drain(|index, bits| {
            words[index].fetch_or(bits, Ordering::AcqRel);
            each(index, bits);
        });
    }

    /// Marks in pending what of `sectors` from `sector` on (of the whole device) lies on this disk, and tells it.
    pub fn mark_sectors(&self, sector: u64, sectors: u64, mut each: impl FnMut(usize, u64)) {
        let record = &self.record;
        let (start, end) = (record.start, record.start + record.sectors);
        let (from, to) = (sector.max(start), sector.saturating_add(sectors).min(end));
        if from >= to {
            return;
        }
        for granule in (from - start) >> record.shift..=(to - 1 - start) >> record.shift {
            let (index, bit) = ((granule / 64) as usize, 1u64 << (granule % 64));
            self.pending.words()[index].fetch_or(bit, Ordering::AcqRel);
            each(index, bit);
        }
    }
}

/// The epoch of every slot, in memory shared with the programs: its parity says which of a slot's bitmaps they write.
///
/// Ending an epoch is one store a disk: no call into the kernel, however many disks there are. Whoever ends one waits for the
/// programs that still write the bitmap of before ([`super::Barrier`]).
pub struct Epochs(Bitmap);

impl Epochs {
    pub fn open(path: &Path) -> Result<Self, TrackerError> {
        Ok(Self(Bitmap::open(path)?))
    }
    /// The parity of a slot's epoch.
    pub fn parity(&self, slot: u32) -> u32 {
        self.word(slot).map_or(0, |word| (word.load(Ordering::Acquire) & 1) as u32)
    }
    /// Makes the programs write the bitmap of this parity.
    pub fn set(&self, slot: u32, parity: u32) {
        if let Some(word) = self.word(slot) {
            word.store(u64::from(parity & 1), Ordering::SeqCst);
        }
    }
    fn word(&self, slot: u32) -> Option<&AtomicU64> {
        self.0.words().get(slot as usize)
    }
}
