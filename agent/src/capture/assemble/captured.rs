//! Which blocks the stream has told of lately (pure): what explains a bit that the tracker's programs set when a write
//! completed. A bit that nothing explains stands for a change that the stream lacks.

use super::{hashed::Map, ranges::Ranges};

/// A set of blocks: single ones by words of a bitmap, long runs as ranges.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    words: Map<u64, u64>,
    runs: Ranges,
}

/// Ranges of more blocks are kept as such.
const RUN_BLOCKS: u64 = 128;

impl Captured {
    /// Adds blocks `from..to`.
    pub fn insert(&mut self, from: u64, to: u64) {
        if to.saturating_sub(from) > RUN_BLOCKS {
            return self.runs.insert(from, to);
        }
        let mut at = from;
        while at < to {
            let end = to.min((at / 64 + 1) * 64);
            *self.words.entry(at / 64).or_default() |= bits_of(at, end);
            at = end;
        }
    }
    /// Takes blocks `from..to` out.
    pub fn remove(&mut self, from: u64, to: u64) {
        self.runs.remove(from, to);
        if (to.saturating_sub(from)) / 64 > self.words.len() as u64 {
            self.words.retain(|word, bits| {
                (word * 64..word * 64 + 64)
                    .filter(|b| (from..to).contains(b))
                    .for_each(|b| *bits &= !(1 << (b % 64)));
                *bits != 0
            });
            return;
        }
        let mut at = from;
        while at < to {
            let end = to.min((at / 64 + 1) * 64);
            if let Some(word) = self.words.get_mut(&(at / 64)) {
                *word &= !bits_of(at, end);
            }
            at = end;
        }
    }
    /// Whether it holds a block.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        self.words.get(&(block / 64)).is_some_and(|word| word >> (block % 64) & 1 == 1)
            || self.runs.contains(block)
    }
    /// Adds all of another.
    pub fn union(&mut self, other: &Self) {
        for (word, bits) in &other.words {
            *self.words.entry(*word).or_default() |= bits;
        }
        other.runs.iter().for_each(|r| self.runs.insert(r.start.0, r.end()));
    }
    /// Which of these 64 granules (of `1 << shift` blocks) it tells of, in any block.
    #[must_use]
    pub fn granules(&self, index: usize, shift: u32) -> u64 {
        let first = (index as u64 * 64) << shift;
        let mut bits = 0;
        if shift == 0 {
            bits = self.words.get(&(index as u64)).copied().unwrap_or(0);
        } else {
            for word in first / 64..(first + (64 << shift)).div_ceil(64) {
                let mut blocks = self.words.get(&word).copied().unwrap_or(0);
                while blocks != 0 {
                    bits |= 1 << (((word * 64 + u64::from(blocks.trailing_zeros())) - first) >> shift);
                    blocks &= blocks - 1;
                }
            }
        }
        if !self.runs.is_empty() {
            for granule in 0..64 {
                let start = first + (granule << shift);
                // A run is longer than a granule or touches its edges: its ends and middle are asked for.
                if (start..start + (1 << shift)).any(|block| self.runs.contains(block)) {
                    bits |= 1 << granule;
                }
            }
        }
        bits
    }
}

/// Blocks `from..to` of one word.
fn bits_of(from: u64, to: u64) -> u64 {
    if to - from == 64 { !0 } else { ((1 << (to - from)) - 1) << (from % 64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn granules_are_those_touched(
            ranges in proptest::collection::vec((0u64..1000, 1u64..200), 1..8),
            removed in proptest::collection::vec((0u64..1000, 1u64..400), 0..3),
            shift in 0u32..4,
        ) {
            let mut captured = Captured::default();
            let mut other = Captured::default();
            let mut model = [false; 1300];
            for (at, (from, count)) in ranges.iter().enumerate() {
                if at % 2 == 0 { captured.insert(*from, from + count) } else { other.insert(*from, from + count) }
                model[*from as usize..(from + count) as usize].fill(true);
            }
            captured.union(&other);
            for (from, count) in removed {
                captured.remove(from, from + count);
                let end = (from + count).min(1300);
                model[from as usize..end as usize].fill(false);
            }
            for index in 0..1280usize.div_ceil(64 << shift) {
                let mut expected = 0u64;
                for granule in 0..64 {
                    let start = (index * 64 + granule) << shift;
                    if (start..start + (1 << shift)).any(|block| model.get(block).copied().unwrap_or(false)) {
                        expected |= 1 << granule;
                    }
                }
                prop_assert_eq!(captured.granules(index, shift), expected);
            }
        }
    }
}
