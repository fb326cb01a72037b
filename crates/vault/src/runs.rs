//! What lies in a machine's history between two commits: runs, and shortcuts over them. Pure.
//!
//! The **runs** of a machine follow each other without gaps: each holds what the commits in `(from, to]` brought, of each
//! block the last. A commit brings a run of segments; maintenance replaces neighbouring runs, between which no recovery point
//! is left, by one run of maps ([`crate::maps`]). Each segment belongs to exactly one run; it can be deleted once that run holds
//! nothing of it.
//!
//! A **shortcut** holds what several neighbouring runs hold together, for readers only: a point among hundreds of thousands
//! is the [`cover`] of a few dozen of them. It owns nothing, and is dropped when one of its ends is no boundary any more, or when a merge beneath
//! it has moved content that it names.

use crate::{
    Result, VaultError,
    record::{DiskSpan, SegmentRef},
};
use highwater_delta::{CommitId, SegmentId};
use serde::{Deserialize, Serialize};

mod shortcuts;

pub(crate) use shortcuts::missing_shortcuts;

/// Objects that are merged at once, at most: each may have to be at hand while its neighbours are. What is left is merged next.
const MERGE_OBJECTS_MAX: usize = 256;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The commit before it.
    pub from: CommitId,
    /// Its last commit.
    pub to: CommitId,
    /// What it is made of.
    pub content: Content,
}

/// What a run is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// As committed, in the order in which they apply.
    Segments(Vec<SegmentRef>),
    /// Merged: maps that do not overlap, sorted by disk and block, and the sums over their segments.
    Maps {
        /// The maps, as objects. Their `commit` is the run's last.
        maps: Vec<SegmentRef>,
        /// What they refer to.
        held: Held,
    },
}

/// What merged runs refer to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Bytes of all segments that the maps name.
    pub bytes: u64,
    /// Data blocks of these segments.
    pub blocks: u64,
    /// Those of them that the maps still name.
    pub live_blocks: u64,
    /// Segments.
    pub segments: u64,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortcut {
    /// The commit before it.
    pub from: CommitId,
    /// Its last commit.
    pub to: CommitId,
    /// Maps that do not overlap, sorted by disk and block.
    pub maps: Vec<SegmentRef>,
}

/// Where a maintained object lies, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A segment that a delta brought.
    Segment,
    /// A segment that maintenance wrote.
    Rewritten,
    /// A map.
    Map,
}

/// An object of a machine, by what it is and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectName {
    /// What it is.
    pub kind: Kind,
    /// Its id.
    pub id: SegmentId,
}

/// An object that nothing refers to any more; readers that began earlier may still use it for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trashed {
    /// Which.
    pub object: ObjectName,
    /// Its bytes.
    pub bytes: u64,
    /// Since when, by the maintainer's clock, in milliseconds since 1970.
    pub since_ms: u64,
}

impl Run {
    /// The objects that a reader begins with, in the order in which they apply.
    pub(crate) fn objects(&self) -> &[SegmentRef] {
        match &self.content {
            Content::Segments(objects) | Content::Maps { maps: objects, .. } => objects,
        }
    }
    pub(crate) fn is_merged(&self) -> bool {
        matches!(self.content, Content::Maps { .. })
    }
    /// Bytes of content that it refers to.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        match &self.content {
            Content::Segments(segments) => segments.iter().map(|segment| segment.bytes).sum(),
            Content::Maps { held, .. } => held.bytes,
        }
    }
    /// How much there is to merge of it: bytes of content that it holds, dead ones left out.
    pub(crate) fn weight(&self) -> u64 {
        match &self.content {
            Content::Segments(_) => self.data_bytes(),
            Content::Maps { held, .. } if held.blocks > 0 => {
                (u128::from(held.bytes) * u128::from(held.live_blocks) / u128::from(held.blocks)) as u64
            }
            Content::Maps { .. } => 0,
        }
    }
}

/// Something to read: a run, or a shortcut over several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    Run(&'a Run),
    Shortcut(&'a Shortcut),
}

impl<'a> Item<'a> {
    pub(crate) fn from(self) -> CommitId {
        match self {
            Self::Run(run) => run.from,
            Self::Shortcut(shortcut) => shortcut.from,
        }
    }
    #[cfg(test)]
    pub(crate) fn to(self) -> CommitId {
        match self {
            Self::Run(run) => run.to,
            Self::Shortcut(shortcut) => shortcut.to,
        }
    }
    pub(crate) fn objects(self) -> &'a [SegmentRef] {
        match self {
            Self::Run(run) => run.objects(),
            Self::Shortcut(shortcut) => &shortcut.maps,
        }
    }
    pub(crate) fn is_merged(self) -> bool {
        match self {
            Self::Run(run) => run.is_merged(),
            Self::Shortcut(_) => true,
        }
    }
}

/// What to read for the state after a commit, newest first: as few items as there can be.
///
/// # Errors
/// The commit lies within a run: its state is not there any more.
pub(crate) fn cover<'a>(runs: &'a [Run], shortcuts: &'a [Shortcut], at: CommitId) -> Result<Vec<Item<'a>>> {
    let mut end = runs.partition_point(|run| run.to <= at);
    if runs.get(end).is_some_and(|run| run.from < at) {
        return Err(VaultError::UnknownPoint(at));
    }
    // Of those that end at one commit, the longest last.
    let mut sorted: Vec<&Shortcut> = shortcuts.iter().filter(|shortcut| shortcut.to <= at).collect();
    sorted.sort_by_key(|shortcut| (shortcut.to, std::cmp::Reverse(shortcut.from)));
    let mut items = Vec::new();
    while let Some(run) = end.checked_sub(1).map(|last| &runs[last]) {
        while sorted.last().is_some_and(|shortcut| shortcut.to > run.to) {
            sorted.pop();
        }
        match sorted.last() {
            Some(shortcut) if shortcut.to == run.to => {
                items.push(Item::Shortcut(shortcut));
                end = runs.partition_point(|run| run.to <= shortcut.from);
            }
            _ => {
                items.push(Item::Run(run));
                end -= 1;
            }
        }
    }
    Ok(items)
}

/// Where neighbouring runs are to be merged, as index ranges that do not overlap: `is_boundary` tells at which commits something
/// ends that is still wanted. In each stretch between two of those, an older run is merged with all that are newer once
/// these weigh a quarter of it: each entry is so rewritten a number of times that grows with the logarithm of the run's size only, and a
/// quarter at most of what a stretch holds is held in vain.
pub(crate) fn merges(runs: &[Run], is_boundary: impl Fn(CommitId) -> bool) -> Vec<std::ops::Range<usize>> {
    let mut found = Vec::new();
    let mut begin = 0;
    for end in 1..=runs.len() {
        if end < runs.len() && !is_boundary(runs[end - 1].to) {
            continue;
        }
        let mut newer = 0_u64;
        let mut from = end;
        for index in (begin..end).rev() {
            let weight = runs[index].weight();
            // All that came after it; with the newest itself nothing did.
            if index + 1 < end && newer.saturating_mul(4) >= weight {
                from = index;
            }
            newer = newer.saturating_add(weight);
        }
        // The oldest of too many first: the newest are merged again soon.
        let mut objects = 0;
        let within = runs[from.min(end)..end].iter().take_while(|run| {
            objects += run.objects().len();
            objects <= MERGE_OBJECTS_MAX
        });
        let count = within.count().max(2).min(end - from.min(end));
        if count >= 2 {
            found.push(from..from + count);
        }
        begin = end;
    }
    found
}

/// The spans of several objects together.
pub(crate) fn touches(spans: &[DiskSpan], disk: highwater_delta::DiskId) -> bool {
    spans.iter().any(|span| span.disk == disk)
}

#[cfg(test)]
mod tests {
    use super::{shortcuts::FAN_OUT, *};
    use proptest::prelude::*;

    fn segment(bytes: u64) -> SegmentRef {
        SegmentRef {
            id: SegmentId::new(),
            commit: CommitId(0),
            bytes,
            salt: [0; 16],
            footer_offset: 0,
            footer_len: 0,
            footer_frame: 0,
            spans: vec![],
        }
    }
    fn runs(weights: &[u64]) -> Vec<Run> {
        (0..)
            .zip(weights)
            .map(|(at, weight)| Run {
                from: CommitId(at * 10),
                to: CommitId(at * 10 + 10),
                content: Content::Segments(vec![segment(*weight)]),
            })
            .collect()
    }

    #[test]
    fn equal_runs_are_merged_at_once_and_a_large_one_waits() {
        let merges = |runs: &[Run], is_boundary: fn(CommitId) -> bool| -> Vec<(usize, usize)> {
            merges(runs, is_boundary).into_iter().map(|range| (range.start, range.end)).collect()
        };
        let all = runs(&[10; 12]);
        assert_eq!(merges(&all, |_| false), [(0, 12)]);
        assert_eq!(merges(&all, |to| to == CommitId(60)), [(0, 6), (6, 12)]);
        assert_eq!(merges(&all, |_| true), []);
        assert_eq!(merges(&runs(&[1000, 10, 10]), |_| false), [(1, 3)]);
        assert_eq!(merges(&runs(&[1000, 200, 60]), |_| false), [(0, 3)]);
        assert_eq!(merges(&runs(&[1000, 10]), |_| false), []);
        assert_eq!(merges(&runs(&[0, 0]), |_| false), [(0, 2)]);
        assert_eq!(merges(&[], |_| false), []);
    }

    proptest! {
        /// However points come and go, a cover is exact and short, once the shortcuts that are missing were made.
        #[test]
        fn covers_are_exact_and_short(
            steps in prop::collection::vec((1_usize..400, prop::collection::vec(any::<prop::sample::Index>(), 0..200)), 1..6)
        ) {
            let mut all: Vec<Run> = vec![];
            let mut shortcuts: Vec<Shortcut> = vec![];
            for (new, expired) in steps {
                for _ in 0..new {
                    let from = all.last().map_or(CommitId(0), |run| run.to);
                    all.push(Run { from, to: CommitId(from.0 + 1), content: Content::Segments(vec![segment(1)]) });
                }
                // Neighbours merged.
                for at in expired {
                    if all.len() < 2 { continue }
                    let at = at.index(all.len() - 1);
                    let gone = all.remove(at + 1);
                    let boundary = all[at].to;
                    all[at].to = gone.to;
                    shortcuts.retain(|s| s.from != boundary && s.to != boundary);
                }
                for (from, to) in missing_shortcuts(&all, &shortcuts) {
                    prop_assert!(!shortcuts.iter().any(|s| (s.from, s.to) == (from, to)));
                    shortcuts.push(Shortcut { from, to, maps: vec![] });
                }
                prop_assert_eq!(missing_shortcuts(&all, &shortcuts), vec![]);
                let levels = (all.len() as f64).log(FAN_OUT as f64).ceil().max(1.0) as usize + 1;
                for run in &all {
                    let items = cover(&all, &shortcuts, run.to).unwrap();
                    let mut at = run.to;
                    for item in &items {
                        prop_assert_eq!(item.to(), at);
                        at = item.from();
                    }
                    prop_assert_eq!(at, CommitId(0));
                    prop_assert!(items.len() <= 2 * FAN_OUT * levels, "{} of {}", items.len(), all.len());
                }
                prop_assert!(shortcuts.len() <= all.len());
            }
        }
    }

    /// As a policy has it: hours of points become one run each, behind a long past that stays.
    #[test]
    fn a_long_past_is_not_written_again_for_every_hour() {
        const PAST: u64 = 60;
        let mut all: Vec<Run> = runs(&[1000; PAST as usize]);
        let mut shortcuts: Vec<Shortcut> = vec![];
        let mut written = 0;
        for hour in 0..100 {
            for _ in 0..12 {
                let from = all.last().unwrap().to;
                let content = Content::Segments(vec![segment(1)]);
                all.push(Run { from, to: CommitId(from.0 + 1), content });
            }
            if let Some(begin) = (PAST as usize + hour).checked_sub(2).filter(|begin| *begin >= PAST as usize)
            {
                let gone: Vec<Run> = all.drain(begin..begin + 12).collect();
                let (from, to) = (gone[0].from, gone[11].to);
                all.insert(begin, Run { from, to, content: Content::Segments(vec![segment(12)]) });
                let is_end = |at: CommitId| gone[..11].iter().any(|run| run.to == at);
                shortcuts.retain(|s| !is_end(s.from) && !is_end(s.to));
            }
            for (from, to) in missing_shortcuts(&all, &shortcuts) {
                let within = all.iter().filter(|run| from <= run.from && run.to <= to);
                written += within.map(Run::weight).sum::<u64>();
                shortcuts.push(Shortcut { from, to, maps: vec![] });
            }
        }
        // Once for each level over the past, and a few times more.
        assert!(written < 12 * PAST * 1000, "{written}");
    }

    #[test]
    fn a_commit_within_a_run_is_not_there() {
        let all = runs(&[1, 1]);
        assert!(matches!(cover(&all, &[], CommitId(15)), Err(VaultError::UnknownPoint(_))));
        assert_eq!(cover(&all, &[], CommitId(20)).unwrap().len(), 2);
        assert_eq!(cover(&all, &[], CommitId(27)).unwrap().len(), 2, "nothing was changed after 20");
        assert_eq!(cover(&all, &[], CommitId(0)).unwrap(), []);
    }
}
