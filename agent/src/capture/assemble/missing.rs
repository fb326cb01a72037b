//! Blocks told in part (pure): which there are, and of which the rest was not asked for yet.

use super::partial::Partial;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// See the module.
#[derive(Debug, Default)]
pub struct Missing {
    partials: BTreeMap<u64, Partial>,
    /// Apart, since it is gone through at each completion, and is nearly always short.
    unasked: BTreeSet<u64>,
}

impl Missing {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.partials.is_empty()
    }
    /// How many there are, and of how many the rest was not asked for.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.partials.len(), self.unasked.len())
    }
    /// Whether this block is told in part.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        self.partials.contains_key(&block)
    }
    /// What is told of a block.
    pub fn get_mut(&mut self, block: u64) -> Option<&mut Partial> {
        self.partials.get_mut(&block)
    }
    /// A block is told in part for the first time.
    pub fn insert(&mut self, block: u64, partial: Partial) {
        self.partials.insert(block, partial);
        self.unasked.insert(block);
    }
    /// Nothing is missing of it any more.
    pub fn remove(&mut self, block: u64) -> Option<Partial> {
        self.unasked.remove(&block);
        self.partials.remove(&block)
    }
    /// The same of all of these.
    pub fn remove_all(&mut self, blocks: Range<u64>) {
        while let Some(block) = self.partials.range(blocks.clone()).next().map(|(block, _)| *block) {
            self.remove(block);
        }
    }
    /// Blocks of which the rest was not asked for yet.
    #[must_use]
    pub fn unasked(&self) -> Vec<u64> {
        self.unasked.iter().copied().collect()
    }
    /// What is told of a block of which the rest was not asked for yet.
    #[must_use]
    pub fn unasked_of(&self, block: u64) -> Option<&Partial> {
        self.unasked.contains(&block).then(|| self.partials.get(&block)).flatten()
    }
    /// The rest was asked for, by the question of this number.
    pub fn asked(&mut self, block: u64, number: u64) {
        if let Some(partial) = self.partials.get_mut(&block) {
            partial.asked = Some(number);
            self.unasked.remove(&block);
        }
    }
}
