//! Which writes of a disk are in flight, by block and sector (pure): from submissions and completions in the stream.
//!
//! It serves three ends. Two writes in flight to the same sector have no defined order: the block must be read again when both
//! are over. A block whose rest must be read from the device is read when no earlier write to it is in flight. And a completion
//! of what was never submitted here is a change that the stream lacks.
//!
//! **Lost completions.** A completion need not be shown. Then a write seems to be in flight for ever: [`InFlight::stale`] ends
//! that, and what it ended is read again. Erring that way costs a read.

use super::ranges::Ranges;
use std::collections::HashMap;

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

/// See the module.
#[derive(Debug, Default)]
pub struct InFlight {
    /// Nearly always one a block.
    first: HashMap<u64, Entry>,
    more: HashMap<u64, Vec<Entry>>,
    wide: Vec<Wide>,
    /// Where bios lie that may be in flight.
    bios: HashMap<u64, (u64, u64)>,
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

    /// Bytes `from..to` have completed; `bio`: the first of the request; `zeros`: they became zeros. Tells of each block which
    /// sectors of it were not known to be in flight.
    pub fn completed(
        &mut self,
        bio: u64,
        (from, to): (u64, u64),
        zeros: bool,
        mut each: impl FnMut(u64, Sectors),
    ) {
        if from >= to {
            return;
        }
        if self.bios.get(&bio).is_some_and(|(start, stop)| from <= *start && *stop <= to) {
            self.bios.remove(&bio);
        }
        if !zeros {
            for block in from / 4096..to.div_ceil(4096) {
                let unknown = self.leave(block, bio, sectors_of(block, from, to));
                each(block, unknown);
            }
            return;
        }
        let mut rest = Ranges::default();
        rest.insert(from, to);
        self.complete_wide(from, to, &mut rest);
        for range in rest.iter() {
            for block in range.start.0 / 4096..range.end().div_ceil(4096) {
                each(block, sectors_of(block, range.start.0, range.end()));
            }
        }
    }

    /// Takes bytes `from..to` out of the wide ranges that they lie in, and what lay there out of `rest`. One request can complete
    /// several of them.
    fn complete_wide(&mut self, from: u64, to: u64, rest: &mut Ranges) {
        let mut at = 0;
        while let Some(whole) = self.wide.get(at).copied() {
            if whole.from >= to || whole.to <= from {
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
        let mut blocks: Vec<u64> =
            self.first.iter().filter(|(_, e)| old(e)).map(|(block, _)| *block).collect();
        blocks.extend(self.more.iter().filter(|(_, more)| more.iter().any(old)).map(|(block, _)| *block));
        for block in blocks {
            self.remove(block, old);
            each(block);
        }
        self.wide.retain(|w| w.since >= before);
        let (first, wide) = (&self.first, &self.wide);
        self.bios.retain(|bio, (from, to)| {
            wide.iter().any(|w| w.bio == *bio)
                || (*from / 4096..to.div_ceil(4096))
                    .any(|block| first.get(&block).is_some_and(|e| e.bio == *bio))
        });
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
    fn unknown(flight: &mut InFlight, bio: u64, from: u64, to: u64) -> Vec<Sectors> {
        let mut left = vec![];
        flight.completed(bio, (from, to), to - from > 1 << 20, |_, sectors| left.push(sectors));
        left
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
        assert_eq!(unknown(&mut f, 8, 0, 8192), [0, 0]);
        assert!(!f.is_busy(0, 0xff) && f.is_busy(1, 1) && !f.is_busy(1, 2));
        assert_eq!(met(&mut f, 24, 4608, 8192), [(1, Met::Neighbours)]);
        // One request for both.
        assert_eq!(unknown(&mut f, 16, 4096, 8192), [0]);
        assert!(f.is_empty() && f.more.is_empty());
    }

    #[test]
    fn the_same_bio_is_no_overlap() {
        let mut f = InFlight::default();
        met(&mut f, 8, 0, 4096);
        assert_eq!(met(&mut f, 8, 0, 4096), [(0, Met::Nothing)]);
        assert_eq!(unknown(&mut f, 8, 0, 4096), [0]);
        assert!(f.is_empty());
        assert_eq!(unknown(&mut f, 8, 512, 1024), [2]);
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
