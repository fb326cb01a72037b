//! Which blocks of which points cannot be read, and until when.
//!
//! Told from indexes: of content only chunks of damaged segments are read. What is damaged in a segment of a run is lost at the points from
//! that run's on, until something newer holds the block: so if one point does not miss it any more, no later one does, and it is
//! looked at as many points as it takes to halve them. A lost map may be passed over by a shortcut: then each point is looked at.

use super::{Bad, names};
use crate::{
    BlockMap, MachineState, Pace, Result, Vault, VaultError,
    key::MachineKeys,
    map::{Broken, size_at},
    maps::{Merge, Source, rows},
    runs::{Item, Kind},
    segment::SegmentReader,
};
use highwater_delta::{BLOCK_BYTES, BlockRange, CommitId, DiskId, SegmentId};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Blocks that are looked at at once.
const WINDOW_BLOCKS: u64 = 65_536;
/// Ranges that are told.
const RANGES_MAX: usize = 10_000;

/// What cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Losses {
    /// The points that miss something, oldest first. All others are whole.
    pub points: Vec<LostPoint>,
    /// How many are whole.
    pub whole: u64,
    /// The newest of these.
    pub newest_whole: Option<CommitId>,
    /// What is missing, by disk and block.
    pub ranges: Vec<Lost>,
    /// Ranges that are not told, since there are too many.
    pub ranges_left_out: u64,
}

/// A point that misses something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LostPoint {
    /// Its number.
    pub point: CommitId,
    /// Blocks that cannot be read, of all its disks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Disks that they are of.
    pub disks: u64,
}

/// Blocks that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Lost {
    /// Of this disk,
    pub disk: DiskId,
    /// from this block,
    pub first: u64,
    /// so many,
    pub blocks: u64,
    /// from this point,
    pub from: CommitId,
    /// up to this one.
    pub to: CommitId,
}

/// Ranges of blocks, from and to, sorted, not overlapping.
type Ranges = Vec<(u64, u64)>;

/// What may be lost because of a run or shortcut.
struct Part {
    /// The first commit that may miss it.
    since: CommitId,
    ranges: BTreeMap<DiskId, Ranges>,
    objects: HashSet<SegmentId>,
}

pub(super) async fn losses(
    vault: &Vault,
    keys: &MachineKeys,
    state: &MachineState,
    damaged: &Bad,
) -> Result<Losses> {
    let (mut parts, index_lost) = parts(vault, keys, state, damaged).await?;
    let mut lost = Vec::new();
    if index_lost {
        let mut all = Part { since: CommitId(u64::MAX), ranges: BTreeMap::new(), objects: HashSet::new() };
        for part in parts.drain(..) {
            all.since = all.since.min(part.since);
            all.objects.extend(part.objects);
            for (disk, ranges) in part.ranges {
                all.ranges.entry(disk).or_default().extend(ranges);
            }
        }
        all.ranges.values_mut().for_each(normalize);
        each_point(&View { vault, keys, state }, &all, &mut lost).await?;
    }
    for part in &parts {
        by_halves(&View { vault, keys, state }, part, &mut lost).await?;
    }
    Ok(summed(state, lost))
}

/// What may be lost, by run and shortcut; and whether an index of some cannot be read.
async fn parts(
    vault: &Vault,
    keys: &MachineKeys,
    state: &MachineState,
    damaged: &Bad,
) -> Result<(Vec<Part>, bool)> {
    let (mut parts, mut index_lost) = (Vec::new(), false);
    if damaged.is_empty() {
        return Ok((parts, false));
    }
    let pace = Pace::new(None);
    let items = state.runs.iter().map(Item::Run).chain(state.shortcuts.iter().map(Item::Shortcut));
    for item in items {
        let since = match item {
            Item::Run(run) => run.to,
            Item::Shortcut(shortcut) => shortcut.to,
        };
        let mut part = Part { since, ranges: BTreeMap::new(), objects: HashSet::new() };
        for (object, name) in item.objects().iter().zip(names(item)) {
            let reader = SegmentReader::new(vault.store().clone(), state.machine, keys, name.kind, object)?;
            let wanted: Option<HashSet<SegmentId>> = match name.kind {
                // A shortcut names what its runs do.
                Kind::Map if matches!(item, Item::Shortcut(_)) => Some(HashSet::new()),
                Kind::Map => match rows(&reader).await {
                    Ok(rows) => Some(
                        rows.iter().filter(|row| damaged.has(row.kind, row.id)).map(|row| row.id).collect(),
                    ),
                    Err(error @ VaultError::Store(_)) => return Err(error),
                    Err(_) => None,
                },
                _ => Some(HashSet::from([object.id])),
            };
            let is_damaged = damaged.has(name.kind, name.id);
            let whole_map = is_damaged && name.kind == Kind::Map;
            let wanted = wanted.filter(|_| !whole_map);
            if wanted.as_ref().is_some_and(HashSet::is_empty) || (name.kind != Kind::Map && !is_damaged) {
                continue;
            }
            part.objects.extend(wanted.iter().flatten().chain([&object.id]));
            let source = Source::new(name.kind, object.clone());
            let mut stream = Merge::new(vault.store(), state.machine, keys, &pace, vec![source]);
            let mut found: BTreeMap<DiskId, Ranges> = BTreeMap::new();
            let whole = loop {
                let Some(wanted) = &wanted else { break false };
                match stream.next().await {
                    Ok(Some(piece)) if piece.entry.fill == highwater_delta::Fill::Zero => {}
                    Ok(Some(piece)) => {
                        if stream
                            .rows()
                            .get(piece.entry.segment as usize)
                            .is_some_and(|row| wanted.contains(&row.id))
                        {
                            let range = (piece.entry.start, piece.entry.end());
                            found.entry(piece.disk).or_default().push(range);
                        }
                    }
                    Ok(None) => break true,
                    Err(error @ VaultError::Store(_)) => return Err(error),
                    Err(_) => break false,
                }
            };
            if !whole {
                index_lost = true;
                found = BTreeMap::new();
                for span in &object.spans {
                    found.entry(span.disk).or_default().push((span.first, span.end));
                }
            }
            for (disk, ranges) in found {
                part.ranges.entry(disk).or_default().extend(ranges);
            }
        }
        part.ranges.values_mut().for_each(normalize);
        if !part.ranges.is_empty() {
            parts.push(part);
        }
    }
    Ok((parts, index_lost))
}

struct View<'a> {
    vault: &'a Vault,
    keys: &'a MachineKeys,
    state: &'a MachineState,
}

impl View<'_> {
    /// The points that cover a disk, from a commit on.
    fn points(&self, disk: DiskId, since: CommitId) -> Vec<CommitId> {
        let covers = |point: &&crate::PointRecord| point.info.disks.iter().any(|own| own.disk == disk);
        let points = self.state.points.iter().filter(|point| point.id >= since);
        points.filter(covers).map(|point| point.id).collect()
    }

    /// What of some ranges cannot be read at a point.
    async fn lost(&self, disk: DiskId, at: CommitId, of: &Ranges, broken: &mut Broken) -> Result<Ranges> {
        let size_bytes = size_at(self.state, disk, at)?;
        let map = BlockMap::load(self.vault, self.keys, self.state, disk, size_bytes, at)?;
        let end = map.blocks();
        let mut rest: Ranges =
            of.iter().map(|(from, to)| (*from, (*to).min(end))).filter(|(from, to)| from < to).collect();
        rest.reverse();
        let mut lost = Ranges::new();
        while let Some((first, _)) = rest.last().copied() {
            // As much as can be looked at at once, and only where it is asked for.
            let limit = first + WINDOW_BLOCKS;
            let (mut window, mut last) = (Ranges::new(), first);
            while let Some((from, to)) = rest.last().copied().filter(|(from, _)| *from < limit) {
                rest.pop();
                last = to.min(limit);
                window.push((from, last));
                if to > limit {
                    rest.push((limit, to));
                }
            }
            let found = map.lost(BlockRange::new(first, last - first), broken).await?;
            lost.extend(common(&found, &window));
        }
        normalize(&mut lost);
        Ok(lost)
    }
}

/// Looks at each point by itself.
async fn each_point(view: &View<'_>, part: &Part, lost: &mut Vec<Lost>) -> Result<()> {
    let mut broken = Broken::new(part.objects.clone());
    for (disk, ranges) in &part.ranges {
        // Of the point before, where it is told.
        let mut before: HashMap<(u64, u64), usize> = HashMap::new();
        for point in view.points(*disk, part.since) {
            let mut now = HashMap::new();
            for (first, end) in view.lost(*disk, point, ranges, &mut broken).await? {
                let at = match before.get(&(first, end)) {
                    Some(at) => *at,
                    None => {
                        lost.push(Lost { disk: *disk, first, blocks: end - first, from: point, to: point });
                        lost.len() - 1
                    }
                };
                lost[at].to = point;
                now.insert((first, end), at);
            }
            before = now;
        }
    }
    Ok(())
}

/// What is read at a point is read at all later ones, and what is lost at one at all earlier ones.
async fn by_halves(view: &View<'_>, part: &Part, lost: &mut Vec<Lost>) -> Result<()> {
    let mut broken = Broken::new(part.objects.clone());
    for (disk, ranges) in &part.ranges {
        let points = view.points(*disk, part.since);
        // Ranges that are lost at all points before `lo`, and at none from `hi` on.
        let mut open = vec![(0, points.len(), ranges.clone())];
        while let Some((lo, hi, ranges)) = open.pop() {
            if ranges.is_empty() {
                continue;
            }
            if lo == hi {
                if let Some(last) = lo.checked_sub(1) {
                    lost.extend(ranges.into_iter().map(|(first, end)| Lost {
                        disk: *disk,
                        first,
                        blocks: end - first,
                        from: points[0],
                        to: points[last],
                    }));
                }
                continue;
            }
            let middle = lo + (hi - lo) / 2;
            let missing = view.lost(*disk, points[middle], &ranges, &mut broken).await?;
            let whole = without(&ranges, &missing);
            open.push((lo, middle, whole));
            open.push((middle + 1, hi, missing));
        }
    }
    Ok(())
}

/// Adds up what each point misses.
fn summed(state: &MachineState, mut lost: Vec<Lost>) -> Losses {
    lost.sort_unstable();
    let index = |commit| state.points.partition_point(|point| point.id < commit);
    let mut blocks: BTreeMap<DiskId, Vec<i128>> = BTreeMap::new();
    let covers = |point: &crate::PointRecord, disk| point.info.disks.iter().any(|own| own.disk == disk);
    for one in &lost {
        let steps = blocks.entry(one.disk).or_insert_with(|| vec![0; state.points.len() + 1]);
        steps[index(one.from)] += i128::from(one.blocks);
        steps[index(one.to) + 1] -= i128::from(one.blocks);
    }
    let mut sums: Vec<(u64, u64)> = vec![(0, 0); state.points.len()];
    for (disk, steps) in blocks {
        let mut now = 0;
        for ((point, step), sum) in state.points.iter().zip(steps).zip(&mut sums) {
            now += step;
            // Between two that cover it, one may not.
            if now > 0 && covers(point, disk) {
                *sum = (sum.0 + u64::try_from(now).unwrap_or(u64::MAX), sum.1 + 1);
            }
        }
    }
    let all = state.points.iter().map(|point| point.id).zip(sums);
    let points: Vec<LostPoint> = (all.clone().filter(|(_, (blocks, _))| *blocks > 0))
        .map(|(point, (blocks, disks))| {
            let bytes = blocks.saturating_mul(BLOCK_BYTES as u64);
            LostPoint { point, blocks, bytes, disks }
        })
        .collect();
    let newest_whole = all.filter(|(_, (blocks, _))| *blocks == 0).map(|(point, _)| point).next_back();
    let whole = (state.points.len() - points.len()) as u64;
    let ranges_left_out = lost.len().saturating_sub(RANGES_MAX) as u64;
    lost.truncate(RANGES_MAX);
    Losses { points, whole, newest_whole, ranges: lost, ranges_left_out }
}

/// Sorts, and joins what overlaps or touches.
fn normalize(ranges: &mut Ranges) {
    ranges.sort_unstable();
    let mut joined = Ranges::with_capacity(ranges.len());
    for (from, to) in ranges.drain(..) {
        match joined.last_mut() {
            Some((_, end)) if *end >= from => *end = (*end).max(to),
            _ => joined.push((from, to)),
        }
    }
    *ranges = joined;
}

/// What is in both.
fn common(a: &Ranges, b: &Ranges) -> Ranges {
    let (mut i, mut j, mut both) = (0, 0, Ranges::new());
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (from, to) = (x.0.max(y.0), x.1.min(y.1));
        if from < to {
            both.push((from, to));
        }
        if x.1 < y.1 { i += 1 } else { j += 1 }
    }
    both
}

/// What is in the first and not in the second.
fn without(a: &Ranges, b: &Ranges) -> Ranges {
    let (mut left, mut next) = (Ranges::new(), 0);
    for (from, to) in a {
        let mut at = *from;
        next += b[next..].partition_point(|(_, end)| end <= from);
        for (gone, end) in b[next..].iter().take_while(|(gone, _)| gone < to) {
            if at < *gone {
                left.push((at, *gone));
            }
            at = at.max(*end);
        }
        if at < *to {
            left.push((at, *to));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Ranges> {
        prop::collection::vec((0_u64..60, 1_u64..9), 0..8).prop_map(|raw| {
            let mut ranges = raw.into_iter().map(|(from, n)| (from, from + n)).collect();
            normalize(&mut ranges);
            ranges
        })
    }

    proptest! {
        #[test]
        fn ranges_are_sets(a in ranges(), b in ranges()) {
            let has = |ranges: &Ranges, n| ranges.iter().any(|(from, to)| (*from..*to).contains(&n));
            let (both, left) = (common(&a, &b), without(&a, &b));
            for n in 0..70 {
                prop_assert_eq!(has(&both, n), has(&a, n) && has(&b, n));
                prop_assert_eq!(has(&left, n), has(&a, n) && !has(&b, n));
            }
            for of in [&a, &both, &left] {
                prop_assert!(of.windows(2).all(|w| w[0].1 <= w[1].0) && of.iter().all(|(from, to)| from < to));
            }
        }
    }
}
