//! A set of a disk's blocks, as a bitmap in memory: 32 MiB for each TiB of disk.
//!
//! Bits at or beyond [`BlockSet::blocks`] are always clear, whatever is merged in; the count is kept, not computed.

use crate::BlockRange;

/// A set of blocks of a disk of fixed size.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
    blocks: u64,
    count: u64,
}

impl BlockSet {
    /// The empty set over `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self { words: vec![0; words_for(blocks)], blocks, count: 0 }
    }
    /// The set of all `blocks` blocks.
    #[must_use]
    pub fn full(blocks: u64) -> Self {
        let mut set = Self { words: vec![u64::MAX; words_for(blocks)], blocks, count: blocks };
        set.clear_tail();
        set
    }
    /// How many blocks the disk has.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }
    /// How many blocks are in the set.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }
    /// Whether no block is in the set.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// Whether a block is in the set; blocks beyond the disk never are.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] & (1 << (block % 64)) != 0
    }
    /// Adds a block; whether it is new. A block beyond the disk is ignored.
    pub fn insert(&mut self, block: u64) -> bool {
        let new = block < self.blocks && !self.contains(block);
        if new {
            self.words[(block / 64) as usize] |= 1 << (block % 64);
            self.count += 1;
        }
        new
    }
    /// Takes a block out; whether it was there.
    pub fn remove(&mut self, block: u64) -> bool {
        let there = self.contains(block);
        if there {
            self.words[(block / 64) as usize] &= !(1 << (block % 64));
            self.count -= 1;
        }
        there
    }
    /// Adds a range, cut at the end of the disk.
    pub fn insert_range(&mut self, range: BlockRange) {
        self.change_range(range, |word, mask| word | mask);
    }
    /// Takes a range out.
    pub fn remove_range(&mut self, range: BlockRange) {
        self.change_range(range, |word, mask| word & !mask);
    }
    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    fn change_range(&mut self, range: BlockRange, change: impl Fn(u64, u64) -> u64) {
        let start = range.start.0;
        let end = start.saturating_add(range.count).min(self.blocks);
        if start >= end {
            return;
        }
        let (first, last) = (start / 64, (end - 1) / 64);
        for index in first..=last {
            let mut mask = u64::MAX;
            if index == first {
                mask &= u64::MAX << (start % 64);
            }
            if index == last {
                mask &= u64::MAX >> (63 - (end - 1) % 64);
            }
            self.set_word(index as usize, change(self.words[index as usize], mask));
        }
    }

    fn set_word(&mut self, index: usize, word: u64) {
        let old = std::mem::replace(&mut self.words[index], word);
        self.count = self.count - u64::from(old.count_ones()) + u64::from(word.count_ones());
    }

    /// The bitmap: block `b` is bit `b % 64` of word `b / 64`.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }
    /// Changes the bitmap itself. The count is taken anew afterwards and bits beyond the disk are cleared.
    pub fn words_mut(&mut self, change: impl FnOnce(&mut [u64])) {
        change(&mut self.words);
        self.count = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        self.clear_tail();
    }
    /// Adds every block of a bitmap that begins at block 0; a longer or shorter one is fine.
    pub fn union_words(&mut self, words: &[u64]) {
        for (index, word) in words.iter().enumerate().take(self.words.len()) {
            if *word & !self.words[index] != 0 {
                self.set_word(index, self.words[index] | word);
            }
        }
        self.clear_tail();
    }
    /// Adds every block of another set, as far as this disk goes.
    pub fn union(&mut self, other: &Self) {
        self.union_words(&other.words);
    }
    /// Takes every block of another set out.
    pub fn subtract(&mut self, other: &Self) {
        for (index, word) in other.words.iter().enumerate().take(self.words.len()) {
            if *word & self.words[index] != 0 {
                self.set_word(index, self.words[index] & !word);
            }
        }
    }
    /// Takes on another size: blocks beyond a smaller one are forgotten, those of a larger one are not in the set.
    pub fn resize(&mut self, blocks: u64) {
        if blocks < self.blocks {
            self.remove_range(BlockRange::new(blocks, self.blocks - blocks));
        }
        self.words.resize(words_for(blocks), 0);
        self.blocks = blocks;
    }

    fn clear_tail(&mut self) {
        let used = self.blocks % 64;
        if used != 0
            && let Some(index) = self.words.len().checked_sub(1)
        {
            let old = self.words[index];
            let new = old & (u64::MAX >> (64 - used));
            if old != new {
                // `full` and `words_mut` come here with a count that may not include the tail.
                self.words[index] = new;
                self.count = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
            }
        }
    }

    /// The first run of blocks in the set at or after `from`, cut to `max_len` blocks.
    #[must_use]
    pub fn next_range(&self, from: u64, max_len: u64) -> Option<BlockRange> {
        let start = self.find(from, false)?;
        let end = self.find(start, true).unwrap_or(self.blocks);
        let count = (end - start).min(max_len);
        (count > 0).then(|| BlockRange::new(start, count))
    }

    /// The first block at or after `from` that is in the set, or, if `absent`, is not.
    fn find(&self, from: u64, absent: bool) -> Option<u64> {
        if from >= self.blocks {
            return None;
        }
        let flip = if absent { u64::MAX } else { 0 };
        let mut index = (from / 64) as usize;
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (from % 64));
        while word == 0 {
            index += 1;
            word = *self.words.get(index)? ^ flip;
        }
        let found = index as u64 * 64 + u64::from(word.trailing_zeros());
        (found < self.blocks).then_some(found)
    }

    /// All runs of blocks in the set, in order.
    pub fn ranges(&self) -> impl Iterator<Item = BlockRange> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let range = self.next_range(at, u64::MAX)?;
            at = range.end();
            Some(range)
        })
    }
}

impl std::fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockSet({} of {})", self.count, self.blocks)
    }
}

fn words_for(blocks: u64) -> usize {
    usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64),
        Remove(u64),
        InsertRange(u64, u64),
        RemoveRange(u64, u64),
        UnionWords(Vec<u64>),
        Union(Vec<u64>),
        Subtract(Vec<u64>),
        WordsMut(u64),
        Resize(u64),
        Clear,
    }
    fn op() -> impl Strategy<Value = Op> {
        let b = || 0_u64..420;
        prop_oneof![
            b().prop_map(Op::Insert),
            b().prop_map(Op::Remove),
            (b(), 0_u64..200).prop_map(|(s, c)| Op::InsertRange(s, c)),
            (b(), 0_u64..200).prop_map(|(s, c)| Op::RemoveRange(s, c)),
            prop::collection::vec(any::<u64>(), 0..9).prop_map(Op::UnionWords),
            prop::collection::vec(b(), 0..9).prop_map(Op::Union),
            prop::collection::vec(b(), 0..9).prop_map(Op::Subtract),
            any::<u64>().prop_map(Op::WordsMut),
            b().prop_map(Op::Resize),
            Just(Op::Clear),
        ]
    }
    fn set_of(blocks: &[u64]) -> BlockSet {
        let mut set = BlockSet::new(420);
        blocks.iter().for_each(|b| {
            set.insert(*b);
        });
        set
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(start in 0_u64..300, full: bool, ops in prop::collection::vec(op(), 0..40)) {
            let mut size = start;
            let mut set = if full { BlockSet::full(size) } else { BlockSet::new(size) };
            let mut model: BTreeSet<u64> = if full { (0..size).collect() } else { BTreeSet::new() };
            for op in ops {
                match op {
                    Op::Insert(b) => prop_assert_eq!(set.insert(b), b < size && model.insert(b)),
                    Op::Remove(b) => prop_assert_eq!(set.remove(b), model.remove(&b)),
                    Op::InsertRange(s, c) => {
                        set.insert_range(BlockRange::new(s, c));
                        model.extend((s..s + c).filter(|b| *b < size));
                    }
                    Op::RemoveRange(s, c) => {
                        set.remove_range(BlockRange::new(s, c));
                        model.retain(|b| !(s..s + c).contains(b));
                    }
                    Op::UnionWords(words) => {
                        set.union_words(&words);
                        for b in 0..size.min(words.len() as u64 * 64) {
                            if words[(b / 64) as usize] >> (b % 64) & 1 == 1 { model.insert(b); }
                        }
                    }
                    Op::Union(blocks) => {
                        set.union(&set_of(&blocks));
                        model.extend(blocks.iter().filter(|b| **b < size));
                    }
                    Op::Subtract(blocks) => {
                        set.subtract(&set_of(&blocks));
                        model.retain(|b| !blocks.contains(b));
                    }
                    Op::WordsMut(word) => {
                        set.words_mut(|words| words.fill(word));
                        model = (0..size).filter(|b| word >> (b % 64) & 1 == 1).collect();
                    }
                    Op::Resize(to) => {
                        set.resize(to);
                        model.retain(|b| *b < to);
                        size = to;
                    }
                    Op::Clear => { set.clear(); model.clear(); }
                }
                prop_assert_eq!(set.count(), model.len() as u64);
                prop_assert_eq!(set.is_empty(), model.is_empty());
                let listed: Vec<u64> = set.ranges().flat_map(|r| r.start.0..r.end()).collect();
                prop_assert_eq!(listed, model.iter().copied().collect::<Vec<_>>());
                prop_assert!((0..430).all(|b| set.contains(b) == model.contains(&b)));
                let ends: Vec<_> = set.ranges().map(|r| (r.start.0, r.end())).collect();
                prop_assert!(ends.windows(2).all(|w| w[0].1 < w[1].0), "runs must be whole");
            }
        }

        #[test]
        fn next_range_is_cut(from in 0_u64..500, max in 0_u64..70, s in 0_u64..400, c in 0_u64..100) {
            let mut set = BlockSet::new(420);
            set.insert_range(BlockRange::new(s, c));
            let (lo, hi) = (from.max(s), (s + c).min(420));
            let expected = (lo < hi && max > 0).then(|| BlockRange::new(lo, (hi - lo).min(max)));
            prop_assert_eq!(set.next_range(from, max), expected);
        }
    }
}
