//! Which writes of a disk are in flight, by block and sector (pure): from submissions and completions in the stream.
//!
//! It serves three ends. Two writes in flight to the same sector have no defined order: the block must be read again when both
//! are over. A block whose rest must be read from the device is read when no earlier write to it is in flight. And a completion
//! of what was never submitted here is a change that the stream lacks.
//!
//! **Lost completions.** A completion need not be shown. Then a write seems to be in flight for ever: [`InFlight::stale`] ends
//! that, and what it ended is read again. Erring that way costs a read.
//!
//! What was taken to be over is remembered, as long as nothing shows that it is: if it ends after all, it may be that it was read
//! again too early.

use super::{hashed::Map, ranges::Ranges};

/// A moment of the reader, in milliseconds.
pub type Tick = u64;

/// Sectors of a block, one a bit.
pub type Sectors = u8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    bio: u64,
    sectors: Sectors,
    since: Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wide {
    bio: u64,
    /// In bytes.
    from: u64,
    to: u64,
    since: Tick,
}

/// Zeroing of more takes long.
const LONG_BYTES: u64 = 4 << 20;

/// See the module.
#[derive(Debug, Default)]
pub struct InFlight {
    /// Nearly always one a block.
    first: Map<u64, Entry>,
    more: Map<u64, Vec<Entry>>,
    wide: Vec<Wide>,
    /// Where bios lie that may be in flight.
    bios: Map<u64, (u64, u64)>,
    /// Where bios lie that were taken to be over, as long as nothing shows that they are.
    late: Map<u64, (u64, u64)>,
}

/// What a submission met in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    /// Nothing of it was in flight.
    Nothing,
    /// Other sectors of it were in flight.
    Neighbours,
    /// A sector of it was in flight already: the order of the two is not defined.
    Same,
}

impl InFlight {
    /// Bytes `from..to` were submitted. `goes_on`: as a further part of a bio. `zeros`: to become zeros, which can be of any length
    /// and is kept as a range. Tells of each block what it met.
    pub fn submitted(
        &mut self,
        (bio, goes_on): (u64, bool),
        (from, to): (u64, u64),
        now: Tick,
        zeros: bool,
        mut each: impl FnMut(u64, Met),
    ) {
        if from >= to {
            return;
        }
        if !goes_on {
            // A bio that is used again has ended, shown or not.
            self.completed_bio(bio);
        }
        let range = self.bios.entry(bio).or_insert((from, to));
        *range = (range.0.min(from), range.1.max(to));
        let (first, end) = (from / 4096, to.div_ceil(4096));
        if zeros {
            // Whoever is in the way of it is told; the rest of the range is too long to be told block by block.
            let mut met: Vec<u64> = if self.first.len() as u64 > end - first {
                (first..end).filter(|block| self.first.contains_key(block)).collect()
            } else {
                self.first.keys().copied().filter(|block| (first..end).contains(block)).collect()
            };
            met.retain(|block| self.first.get(block).is_some_and(|e| e.bio != bio));
            for block in met {
                each(block, Met::Same);
            }
            self.wide.retain(|w| w.bio != bio || w.to <= from || w.from >= to);
            self.wide.push(Wide { bio, from, to, since: now });
            // Two of them may overlap: both make zeros.
            return;
        }
        for block in first..end {
            let sectors = sectors_of(block, from, to);
            let met = self.enter(block, Entry { bio, sectors, since: now });
            each(block, met);
        }
    }

    fn enter(&mut self, block: u64, entry: Entry) -> Met {
        let in_wide = |w: &Wide| w.bio != entry.bio && w.from < (block + 1) * 4096 && w.to > block * 4096;
        let mut met = if self.wide.iter().any(in_wide) { Met::Same } else { Met::Nothing };
        let mut meet = |other: &mut Entry| {
            if other.bio == entry.bio {
                // Another segment of it, the same record once more, or an earlier bio at this address that is over.
                other.sectors |= entry.sectors;
                other.since = entry.since;
                return true;
            }
            let same = other.sectors & entry.sectors != 0;
            met = if same || met == Met::Same { Met::Same } else { Met::Neighbours };
            false
        };
        let Some(first) = self.first.get_mut(&block) else {
            self.first.insert(block, entry);
            return met;
        };
        let mut known = meet(first);
        if let Some(more) = self.more.get_mut(&block) {
            for other in more {
                known |= meet(other);
            }
        }
        if !known {
            self.more.entry(block).or_default().push(entry);
        }
        met
    }

    /// Bytes `from..to` have completed; `bio`: the first of the request; `zeros`: they became zeros. Tells the ranges of bytes, in
    /// whole sectors, that were not known to be in flight.
    pub fn completed(
        &mut self,
        bio: u64,
        (from, to): (u64, u64),
        zeros: bool,
        mut unknown: impl FnMut(u64, u64),
    ) {
        if from >= to {
            return;
        }
        if self.bios.get(&bio).is_some_and(|(start, stop)| from <= *start && *stop <= to) {
            self.bios.remove(&bio);
        }
        if !zeros {
            for block in from / 4096..to.div_ceil(4096) {
                if self.leave(block, bio, sectors_of(block, from, to)) != 0 {
                    unknown(from.max(block * 4096), to.min((block + 1) * 4096));
                }
            }
            return;
        }
        let mut rest = Ranges::default();
        rest.insert(from, to);
        self.complete_wide(bio, from, to, &mut rest);
        rest.iter().for_each(|range| unknown(range.start.0, range.end()));
    }

    /// Takes bytes `from..to` out of the wide range of this bio, and what lay there out of `rest`; where it has none (it was split),
    /// out of all that they lie in.
    fn complete_wide(&mut self, bio: u64, from: u64, to: u64, rest: &mut Ranges) {
        let known = self.wide.iter().any(|w| w.bio == bio && w.from < to && w.to > from);
        let mut at = 0;
        while let Some(whole) = self.wide.get(at).copied() {
            if whole.from >= to || whole.to <= from || (known && whole.bio != bio) {
                at += 1;
                continue;
            }
            self.wide.swap_remove(at);
            rest.remove(whole.from.max(from), whole.to.min(to));
            for (from, to) in [(whole.from, from), (to, whole.to)] {
                if from < to {
                    self.wide.push(Wide { from, to, ..whole });
                }
            }
        }
    }

    /// Takes sectors of a block out: of this bio, if it is known, else of the oldest. Answers those that were not in flight.
    fn leave(&mut self, block: u64, bio: u64, sectors: Sectors) -> Sectors {
        let Some(first) = self.first.get_mut(&block) else { return sectors };
        let mut left = sectors;
        let mut take = |entry: &mut Entry| {
            let taken = entry.sectors & left;
            entry.sectors &= !taken;
            left &= !taken;
        };
        let more = self.more.get_mut(&block);
        match more {
            None => take(first),
            Some(more) => {
                if first.bio == bio {
                    take(first);
                }
                more.iter_mut().filter(|e| e.bio == bio).for_each(&mut take);
                take(first);
                more.iter_mut().for_each(take);
                more.retain(|e| e.sectors != 0);
                if first.sectors == 0 && !more.is_empty() {
                    *first = more.remove(0);
                }
                if more.is_empty() {
                    self.more.remove(&block);
                }
            }
        }
        if self.first.get(&block).is_some_and(|e| e.sectors == 0) {
            self.first.remove(&block);
        }
        left
    }

    /// A bio has completed. Answers in which bytes it lay, if it was known.
    pub fn completed_bio(&mut self, bio: u64) -> Option<(u64, u64)> {
        let (from, to) = self.bios.remove(&bio)?;
        let before = self.wide.len();
        self.wide.retain(|w| w.bio != bio);
        if self.wide.len() == before {
            for block in from / 4096..to.div_ceil(4096) {
                self.remove(block, |e| e.bio == bio);
            }
        }
        Some((from, to))
    }

    fn remove(&mut self, block: u64, over: impl Fn(&Entry) -> bool) {
        if let Some(more) = self.more.get_mut(&block) {
            more.retain(|e| !over(e));
        }
        if self.first.get(&block).is_some_and(&over) {
            match self.more.get_mut(&block).filter(|more| !more.is_empty()) {
                Some(more) => {
                    let next = more.remove(0);
                    self.first.insert(block, next);
                }
                None => {
                    self.first.remove(&block);
                }
            }
        }
        if self.more.get(&block).is_some_and(Vec::is_empty) {
            self.more.remove(&block);
        }
    }

    /// Whether one of these sectors of a block is in flight.
    #[must_use]
    pub fn is_busy(&self, block: u64, sectors: Sectors) -> bool {
        let hit = |e: &Entry| e.sectors & sectors != 0;
        self.first.get(&block).is_some_and(hit)
            || self.more.get(&block).is_some_and(|more| more.iter().any(hit))
            || self.wide.iter().any(|w| w.from < (block + 1) * 4096 && w.to > block * 4096)
    }

    /// Forgets what was submitted before `before`: it is taken to be over. Tells its blocks.
    pub fn stale(&mut self, before: Tick, mut each: impl FnMut(u64)) {
        let old = |e: &Entry| e.since < before;
        let is_old = |bio: u64, of: &Self, (from, to): (u64, u64)| {
            (from / 4096..to.div_ceil(4096)).any(|block| {
                let entries =
                    of.first.get(&block).into_iter().chain(of.more.get(&block).into_iter().flatten());
                entries.into_iter().any(|e| e.bio == bio && old(e))
            })
        };
        let aged: Vec<(u64, (u64, u64))> = self
            .bios
            .iter()
            .map(|(bio, range)| (*bio, *range))
            .filter(|(bio, range)| is_old(*bio, self, *range))
            .collect();
        aged.into_iter().for_each(|(bio, range)| add_late(&mut self.late, bio, range));
        let mut blocks: Vec<u64> =
            self.first.iter().filter(|(_, e)| old(e)).map(|(block, _)| *block).collect();
        blocks.extend(self.more.iter().filter(|(_, more)| more.iter().any(old)).map(|(block, _)| *block));
        for block in blocks {
            self.remove(block, old);
            each(block);
        }
        let (first, more, wide) = (&self.first, &self.more, &self.wide);
        self.bios.retain(|bio, (from, to)| {
            wide.iter().any(|w| w.bio == *bio)
                || (*from / 4096..to.div_ceil(4096)).any(|block| {
                    first.get(&block).is_some_and(|e| e.bio == *bio)
                        || more.get(&block).is_some_and(|more| more.iter().any(|e| e.bio == *bio))
                })
        });
    }

    /// The same of ranges of zeros; long ones take longer. Tells their bytes.
    pub fn stale_wide(&mut self, before: Tick, long_before: Tick, mut each: impl FnMut(u64, u64)) {
        let (late, bios) = (&mut self.late, &mut self.bios);
        self.wide.retain(|w| {
            let before = if w.to - w.from > LONG_BYTES { long_before } else { before };
            if w.since < before {
                each(w.from, w.to);
                bios.remove(&w.bio);
                add_late(late, w.bio, (w.from, w.to));
            }
            w.since >= before
        });
    }

    /// A bio has ended that was taken to be over before: answers its bytes, which may have changed since.
    pub fn ended_late(&mut self, bio: u64) -> Option<(u64, u64)> {
        if self.late.is_empty() { None } else { self.late.remove(&bio) }
    }
    /// How many there are of which that is not known yet.
    pub fn late(&self) -> usize {
        self.late.len()
    }

    /// All blocks with something in flight, but those in wide ranges.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.first.keys().copied()
    }
    /// Wide ranges in flight, in blocks.
    pub fn wide(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.wide.iter().map(|w| (w.from / 4096, w.to.div_ceil(4096)))
    }
    /// Whether nothing is in flight.
    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.first.is_empty() && self.wide.is_empty()
    }
}

/// A bio that goes on after it was taken to be over is late with all of it.
fn add_late(late: &mut Map<u64, (u64, u64)>, bio: u64, (from, to): (u64, u64)) {
    let range = late.entry(bio).or_insert((from, to));
    *range = (range.0.min(from), range.1.max(to));
}

/// The sectors of a block that bytes `from..to` touch.
#[must_use]
pub fn sectors_of(block: u64, from: u64, to: u64) -> Sectors {
    let start = block * 4096;
    let first = (from.max(start) - start) / 512;
    let end = (to.min(start + 4096) - start).div_ceil(512);
    if first >= end { 0 } else { ((1u16 << end) - (1u16 << first)) as Sectors }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn met(flight: &mut InFlight, bio: u64, from: u64, to: u64) -> Vec<(u64, Met)> {
        let mut met = vec![];
        flight.submitted((bio, false), (from, to), 0, to - from > 1 << 20, |block, m| met.push((block, m)));
        met
    }
    fn unknown(flight: &mut InFlight, bio: u64, from: u64, to: u64) -> Vec<u64> {
        let mut blocks = vec![];
        flight.completed(bio, (from, to), to - from > 1 << 20, |from, to| {
            blocks.extend(from / 4096..to.div_ceil(4096));
        });
        blocks
    }

    #[test]
    fn sectors_are_those_touched() {
        assert_eq!(sectors_of(0, 0, 4096), 0xff);
        assert_eq!(sectors_of(1, 4096 + 512, 4096 + 1024), 0b10);
        assert_eq!(sectors_of(0, 4095, 9000), 0x80);
        assert_eq!(sectors_of(2, 0, 8192), 0);
    }

    #[test]
    fn overlap_is_told_by_sector() {
        let mut f = InFlight::default();
        assert_eq!(met(&mut f, 8, 0, 8192), [(0, Met::Nothing), (1, Met::Nothing)]);
        assert_eq!(met(&mut f, 16, 4096, 4608), [(1, Met::Same)]);
        assert_eq!(unknown(&mut f, 8, 0, 8192), [0u64; 0]);
        assert!(!f.is_busy(0, 0xff) && f.is_busy(1, 1) && !f.is_busy(1, 2));
        assert_eq!(met(&mut f, 24, 4608, 8192), [(1, Met::Neighbours)]);
        // One request for both.
        assert_eq!(unknown(&mut f, 16, 4096, 8192), [0u64; 0]);
        assert!(f.is_empty() && f.more.is_empty());
    }

    #[test]
    fn the_same_bio_is_no_overlap() {
        let mut f = InFlight::default();
        met(&mut f, 8, 0, 4096);
        assert_eq!(met(&mut f, 8, 0, 4096), [(0, Met::Nothing)]);
        assert_eq!(unknown(&mut f, 8, 0, 4096), [0u64; 0]);
        assert!(f.is_empty());
        assert_eq!(unknown(&mut f, 8, 512, 1024), [0]);
        // Its end was not shown, and it is used again elsewhere.
        met(&mut f, 8, 0, 8192);
        met(&mut f, 8, 40960, 45056);
        assert!(!f.is_busy(0, 0xff) && !f.is_busy(1, 0xff) && f.is_busy(10, 1));
    }

    #[test]
    fn a_bios_completion_takes_all_of_it() {
        let mut f = InFlight::default();
        f.submitted((8, false), (512, 8192), 1, false, |_, _| ());
        f.submitted((8, true), (8192, 8704), 1, false, |_, _| ());
        f.submitted((16, false), (8704, 9216), 2, false, |_, _| ());
        assert_eq!(f.completed_bio(8), Some((512, 8704)));
        assert_eq!(f.completed_bio(8), None);
        assert!(f.is_busy(2, 2) && !f.is_busy(2, 1) && !f.is_busy(0, 0xff));
        let mut stale = vec![];
        f.stale(3, |block| stale.push(block));
        assert!(stale == [2] && f.is_empty() && f.bios.is_empty());
        // It ends after all.
        assert_eq!((f.ended_late(16), f.ended_late(16), f.ended_late(8)), (Some((8704, 9216)), None, None));
    }

    #[test]
    fn a_young_bio_behind_another_is_not_forgotten() {
        let mut f = InFlight::default();
        f.submitted((8, false), (0, 512), 1, false, |_, _| ());
        f.submitted((16, false), (512, 1024), 5, false, |_, _| ());
        f.stale(0, |_| ());
        assert_eq!(f.completed_bio(16), Some((512, 1024)));
        f.submitted((24, false), (4096, 8192), 1, true, |_, _| ());
        let mut told = vec![];
        f.stale_wide(2, 0, |from, to| told.push((from, to)));
        assert_eq!((told, f.ended_late(24), f.late()), (vec![(4096, 8192)], Some((4096, 8192)), 0));
    }

    #[test]
    fn long_ranges_are_kept_as_such() {
        let mut f = InFlight::default();
        met(&mut f, 8, 4096 * 7, 4096 * 8);
        assert_eq!(met(&mut f, 16, 0, 4096 << 20), [(7, Met::Same)]);
        assert_eq!(met(&mut f, 24, 4096 * 9, 4096 * 10), [(9, Met::Same)]);
        unknown(&mut f, 16, 0, 4096 << 19);
        assert!(!f.is_busy(3, 0xff) && f.is_busy(1 << 19, 1));
        unknown(&mut f, 99, 4096 << 19, 4096 << 20);
        assert!(!f.is_busy(1 << 19, 1));
    }
}
