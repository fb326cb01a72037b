//! A set of blocks as disjoint ranges: for what comes in long runs (discards), however long.

use highwater_delta::BlockRange;
use std::collections::BTreeMap;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// Whether it holds a block.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        self.0.range(..=block).next_back().is_some_and(|(_, end)| *end > block)
    }
    /// Adds blocks `from..to`.
    pub fn insert(&mut self, from: u64, to: u64) {
        if from >= to {
            return;
        }
        let (mut from, mut to) = (from, to);
        // Whatever touches it becomes one with it.
        while let Some((start, end)) = self.0.range(..=to).next_back().map(|(s, e)| (*s, *e))
            && end >= from
        {
            self.0.remove(&start);
            (from, to) = (from.min(start), to.max(end));
        }
        self.0.insert(from, to);
    }
    /// Takes blocks `from..to` out.
    pub fn remove(&mut self, from: u64, to: u64) {
        while from < to
            && let Some((start, end)) = self.0.range(..to).next_back().map(|(s, e)| (*s, *e))
            && end > from
        {
            self.0.remove(&start);
            if start < from {
                self.0.insert(start, from);
            }
            if end > to {
                self.0.insert(to, end);
            }
        }
    }
    /// The same and more: ranges that are at most `gap` blocks apart become one.
    #[must_use]
    pub fn joined(&self, gap: u64) -> Self {
        let mut joined: Vec<(u64, u64)> = vec![];
        for (&from, &to) in &self.0 {
            match joined.last_mut() {
                Some((_, end)) if from <= *end + gap => *end = to,
                _ => joined.push((from, to)),
            }
        }
        Self(joined.into_iter().collect())
    }
    /// All of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.0.iter().map(|(start, end)| BlockRange::new(*start, end - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_set_it_stands_for(ops in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 1..60)) {
            let (mut ranges, mut model) = (Ranges::default(), [false; 80]);
            for (add, from, count) in ops {
                if add { ranges.insert(from, from + count) } else { ranges.remove(from, from + count) }
                model[from as usize..(from + count) as usize].fill(add);
                for (block, held) in model.iter().enumerate() {
                    prop_assert_eq!(ranges.contains(block as u64), *held);
                }
                let all: Vec<BlockRange> = ranges.iter().collect();
                prop_assert!(all.windows(2).all(|w| w[0].end() < w[1].start.0), "disjoint and apart: {:?}", all);
                prop_assert_eq!(all.iter().map(|r| r.count).sum::<u64>(), model.iter().filter(|h| **h).count() as u64);
                let joined = ranges.joined(3);
                let gaps: Vec<u64> = all.windows(2).map(|w| w[1].start.0 - w[0].end()).collect();
                let near = gaps.iter().filter(|gap| **gap <= 3);
                prop_assert_eq!(joined.iter().count() + near.clone().count(), all.len());
                let count = joined.iter().map(|r| r.count).sum::<u64>();
                prop_assert_eq!(count, all.iter().map(|r| r.count).sum::<u64>() + near.sum::<u64>());
            }
        }
    }
}
