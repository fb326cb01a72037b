//! Which granules of a disk must be sent, and which are under way (pure).
//!
//! *Pending* (kept by the tracker, outliving the agent) = *to send* ∪ *covered* ∪ *under way*. A granule goes to *under way* when
//! it is read for a delta, and leaves pending when that delta is stored, unless it was marked again since it was read: then
//! what was stored is old already.
//!
//! *Covered* is what need not be read, because the captured stream has it: it goes to *under way* with the delta that takes the
//! stream in, up to a position that every change to it lies before. A granule that is read while it is covered stays
//! covered: what the stream says of it is applied after what was read, and may be older until all of it has been.

use highwater_delta::{BlockRange, BlockSet, DeltaId};
use std::collections::VecDeque;

/// The ledger of one disk, in granules.
#[derive(Debug)]
pub struct Ledger {
    to_send: BlockSet,
    covered: BlockSet,
    under_way: VecDeque<(DeltaId, BlockSet)>,
    skip: Vec<BlockRange>,
}

impl Ledger {
    /// Everything pending is to be sent.
    #[must_use]
    pub fn new(granules: u64, pending: &[u64]) -> Self {
        let mut to_send = BlockSet::new(granules);
        to_send.union_words(&fit(pending, granules));
        Self { to_send, covered: BlockSet::new(granules), under_way: VecDeque::new(), skip: vec![] }
    }

    /// What is to be sent.
    #[must_use]
    pub fn to_send(&self) -> &BlockSet {
        &self.to_send
    }

    /// How many granules are under way.
    #[must_use]
    pub fn under_way(&self) -> u64 {
        self.under_way.iter().map(|(_, set)| set.count()).sum()
    }

    /// Granules that are never sent (swap). Answers those that are no longer left out: they must be marked anew.
    pub fn set_skip(&mut self, skip: Vec<BlockRange>) -> Vec<BlockRange> {
        let mut freed = vec![];
        if skip != self.skip {
            // Coarse on purpose: a change of swap areas is rare, and sending too much is harmless.
            freed = std::mem::replace(&mut self.skip, skip);
            for range in &freed {
                self.to_send.insert_range(*range);
            }
            for range in &self.skip {
                self.to_send.remove_range(*range);
            }
        }
        freed
    }

    /// Whether a granule is left out.
    #[must_use]
    pub fn skipped(&self) -> &[BlockRange] {
        &self.skip
    }

    /// Bits of one word were marked in an epoch that has ended.
    pub fn marked(&mut self, index: usize, bits: u64) {
        self.to_send.words_mut(|words| {
            if let Some(word) = words.get_mut(index) {
                *word |= bits;
            }
        });
        for (_, set) in &mut self.under_way {
            set.words_mut(|words| {
                if let Some(word) = words.get_mut(index) {
                    *word &= !bits;
                }
            });
        }
    }

    /// Bits of one word were marked in an epoch that has ended, by changes that the captured stream has.
    pub fn marked_covered(&mut self, index: usize, bits: u64) {
        self.covered.words_mut(|words| {
            if let Some(word) = words.get_mut(index) {
                *word |= bits;
            }
        });
        for (_, set) in &mut self.under_way {
            set.words_mut(|words| {
                if let Some(word) = words.get_mut(index) {
                    *word &= !bits;
                }
            });
        }
    }

    /// What is covered.
    #[must_use]
    pub fn covered(&self) -> u64 {
        self.covered.count()
    }

    /// This delta takes the stream in as far as it covers anything: all that is covered goes under way, but these granules, and
    /// those that are still to be read (the stream has a change of them, and not all of them).
    pub fn take_covered(&mut self, delta: DeltaId, except: impl IntoIterator<Item = u64>) {
        let mut taken = self.covered.clone();
        taken.subtract(&self.to_send);
        for granule in except {
            taken.remove(granule);
        }
        if !taken.is_empty() {
            self.covered.subtract(&taken);
            self.under_way_of(delta).union(&taken);
        }
    }

    /// A delta that [`Ledger::take_covered`] was called for, and nothing was read for, is not committed after all: what it took is
    /// covered still.
    pub fn untake(&mut self, delta: DeltaId) {
        if let Some(at) = self.under_way.iter().position(|(id, _)| *id == delta)
            && let Some((_, set)) = self.under_way.remove(at)
        {
            self.covered.union(&set);
        }
    }

    /// These granules are to be read, whatever was said of them.
    pub fn again(&mut self, granules: impl IntoIterator<Item = u64>) {
        for granule in granules {
            if granule < self.to_send.blocks() {
                self.to_send.insert(granule);
            }
        }
        self.settle();
    }

    fn under_way_of(&mut self, delta: DeltaId) -> &mut BlockSet {
        if self.under_way.back().is_none_or(|(id, _)| *id != delta) {
            self.under_way.push_back((delta, BlockSet::new(self.to_send.blocks())));
        }
        let last = self.under_way.len() - 1;
        &mut self.under_way[last].1
    }

    /// After the last `marked` of an epoch: leaves out again what is never sent.
    pub fn settle(&mut self) {
        for range in &self.skip {
            self.to_send.remove_range(*range);
            self.covered.remove_range(*range);
        }
    }

    /// Takes up to `most` granules out of what is to be sent, from granule `from` on, for this delta.
    pub fn take(&mut self, delta: DeltaId, from: u64, most: u64) -> Vec<BlockRange> {
        let mut taken = vec![];
        let (mut at, mut left) = (from, most);
        while left > 0 {
            let Some(range) = self.to_send.next_range(at, left) else { break };
            taken.push(range);
            at = range.end();
            left -= range.count;
        }
        for range in &taken {
            self.to_send.remove_range(*range);
        }
        let mut set = BlockSet::new(self.to_send.blocks());
        taken.iter().for_each(|range| set.insert_range(*range));
        set.subtract(&self.covered);
        self.under_way_of(delta).union(&set);
        taken
    }

    /// The delta is stored: the words of granules that may be forgotten.
    pub fn stored(&mut self, delta: DeltaId) -> Option<Vec<u64>> {
        let at = self.under_way.iter().position(|(id, _)| *id == delta)?;
        self.under_way.remove(at).map(|(_, set)| set.words().to_vec())
    }

    /// Nothing under way will be stored: everything pending is to be sent again.
    pub fn reset(&mut self, pending: &[u64]) {
        self.reset_except(pending, &[]);
    }

    /// Only these deltas may still be stored: everything pending that is not in one of them is to be sent again.
    pub fn reset_except(&mut self, pending: &[u64], keep: &[DeltaId]) {
        self.under_way.retain(|(id, _)| keep.contains(id));
        let granules = self.to_send.blocks();
        let mut again = BlockSet::new(granules);
        again.union_words(&fit(pending, granules));
        for (_, set) in &self.under_way {
            again.subtract(set);
        }
        self.to_send.union(&again);
        self.covered.clear();
        self.settle();
    }
}

/// Cuts a bitmap's words to a set's length and clears bits behind its end.
fn fit(words: &[u64], granules: u64) -> Vec<u64> {
    let mut words = words.to_vec();
    words.resize(usize::try_from(granules.div_ceil(64)).unwrap_or(usize::MAX), 0);
    if !granules.is_multiple_of(64)
        && let Some(last) = words.last_mut()
    {
        *last &= (1u64 << (granules % 64)) - 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Op {
        Mark(u64),
        Take(u64, u64),
        /// A write that is captured: in the stream at once, marked at the end of the epoch.
        Captured(u64),
        /// The epoch ends: what was captured is told.
        Epoch,
        /// The stream is sealed into the delta, but for one granule that must be read again.
        Seal(u64),
        /// The same, but the delta is not committed after all.
        Idle,
        Next,
        Stored,
        Lost,
        /// An epoch's end proves nothing: what was sealed is not committed, and what was committed before may still be stored.
        LostWindow,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0u64..200).prop_map(Op::Mark),
            (0u64..200, 1u64..50).prop_map(|(a, b)| Op::Take(a, b)),
            (0u64..200).prop_map(Op::Captured),
            Just(Op::Epoch),
            (0u64..200).prop_map(Op::Seal),
            Just(Op::Idle),
            Just(Op::Next),
            Just(Op::Stored),
            Just(Op::Lost),
            Just(Op::LostWindow),
        ]
    }

    proptest! {
        /// The model: each granule has a version, raised by each mark; the vault holds the version that was read. A granule
        /// may leave pending only if the vault holds its latest version.
        #[test]
        fn nothing_is_forgotten_too_early(ops in proptest::collection::vec(op(), 1..200)) {
            let mut pending: BTreeSet<u64> = BTreeSet::new();
            let mut version = vec![0u64; 200];
            let mut vault = vec![0u64; 200];
            let mut ledger = Ledger::new(200, &[]);
            // Written and captured, and told at the end of the epoch; and the version that the stream has of each.
            let mut current: BTreeSet<u64> = BTreeSet::new();
            let mut stream = std::collections::BTreeMap::new();
            let mut delta = DeltaId::new();
            let mut deltas: VecDeque<(DeltaId, Vec<(u64, u64)>)> = VecDeque::new();
            let words = |set: &BTreeSet<u64>| {
                let mut words = vec![0u64; 4];
                for b in set { words[(b / 64) as usize] |= 1 << (b % 64); }
                words
            };
            for op in ops {
                match op {
                    // What the stream has a change of is explained by it, not marked: another change of it, which the stream lacks, is
                    // read only when nothing of it is in flight or to be sealed (`capture::assemble`).
                    Op::Mark(b) if stream.contains_key(&b) || current.contains(&b) => {}
                    Op::Mark(b) => {
                        version[b as usize] += 1;
                        pending.insert(b);
                        ledger.marked((b / 64) as usize, 1 << (b % 64));
                    }
                    Op::Take(from, most) => {
                        let read: Vec<(u64, u64)> = ledger.take(delta, from, most).iter()
                            .flat_map(|r| r.start.0..r.end()).map(|b| (b, version[b as usize])).collect();
                        match deltas.back_mut() {
                            Some((id, all)) if *id == delta => all.extend(read),
                            _ => deltas.push_back((delta, read)),
                        }
                    }
                    Op::Captured(b) => {
                        version[b as usize] += 1;
                        stream.insert(b, version[b as usize]);
                        current.insert(b);
                    }
                    Op::Epoch => {
                        for b in std::mem::take(&mut current) {
                            pending.insert(b);
                            ledger.marked_covered((b / 64) as usize, 1 << (b % 64));
                        }
                    }
                    Op::Seal(doubtful) => {
                        let sealed: Vec<(u64, u64)> = std::mem::take(&mut stream).into_iter().collect();
                        match deltas.back_mut() {
                            Some((id, all)) if *id == delta => all.extend(sealed),
                            _ => deltas.push_back((delta, sealed)),
                        }
                        ledger.take_covered(delta, [doubtful]);
                    }
                    Op::Idle if stream.is_empty() => {
                        let unused = DeltaId::new();
                        let (under_way, covered) = (ledger.under_way(), ledger.covered());
                        ledger.take_covered(unused, []);
                        ledger.untake(unused);
                        prop_assert_eq!((under_way, covered), (ledger.under_way(), ledger.covered()));
                    }
                    Op::Idle => {}
                    Op::Next => delta = DeltaId::new(),
                    Op::Stored => {
                        let Some((id, read)) = deltas.pop_front() else { continue };
                        if id == delta { delta = DeltaId::new(); }
                        for (b, v) in read { vault[b as usize] = v; }
                        let Some(clear) = ledger.stored(id) else { continue };
                        pending.retain(|b| clear[(*b / 64) as usize] >> (b % 64) & 1 == 0);
                    }
                    Op::LostWindow => {
                        if deltas.back().is_some_and(|(id, _)| *id == delta) {
                            deltas.pop_back();
                        }
                        delta = DeltaId::new();
                        stream.clear();
                        for b in std::mem::take(&mut current) {
                            pending.insert(b);
                            ledger.marked((b / 64) as usize, 1 << (b % 64));
                        }
                        let kept: Vec<DeltaId> = deltas.iter().map(|(id, _)| *id).collect();
                        ledger.reset_except(&words(&pending), &kept);
                    }
                    Op::Lost => {
                        deltas.clear();
                        // The next stream begins with the end of an epoch that it explains nothing of.
                        stream.clear();
                        for b in std::mem::take(&mut current) {
                            pending.insert(b);
                            ledger.marked((b / 64) as usize, 1 << (b % 64));
                        }
                        delta = DeltaId::new();
                        ledger.reset(&words(&pending));
                        prop_assert!(pending.iter().all(|b| ledger.to_send().contains(*b)));
                    }
                }
                for b in 0..200u64 {
                    if !pending.contains(&b) && !current.contains(&b) { prop_assert_eq!(version[b as usize], vault[b as usize]); }
                }
            }
        }
    }
}
