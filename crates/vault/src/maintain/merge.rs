//! Doing one merge: the index entries of some runs become maps over all of them; content is moved only where too little of a
//! segment is needed, or segments are so small that reading them costs more than they hold.

use super::{Merge as Planned, Purpose, plan::sources, turn::Turn};
use crate::{
    MachineState, Pace, Result, VaultError,
    journal::Journal,
    maps::{Fill as Full, Merge, Output, SegmentRow, Source, Written, rows},
    record::{MergedBody, Replaces},
    runs::{Content, Held, Item, Kind, ObjectName, Run, Trashed},
    segment::SegmentReader,
};
use highwater_delta::{DiskId, SegmentId};
use std::collections::{HashMap, HashSet};

/// Segments below this size are put together …
const SMALL_BYTES: u64 = 4 << 20;
/// … if there are so many of them.
const SMALL_MANY: usize = if cfg!(test) { 3 } else { 8 };
/// A segment of which less than this part is needed is written anew by a merge; …
const DOOM_BELOW: (u64, u64) = (5, 10);
/// … and by a cleaning: by more than what called for it, so that it ends.
const DOOM_BELOW_CLEANING: (u64, u64) = (7, 10);
/// One merge moves no more content than this, or four times the bytes of its maps, which it writes anew: what an interruption
/// costs is bounded. What is left is moved by the next.
const MOVE_BYTES_LEAST: u64 = if cfg!(test) { 32 << 10 } else { 16 << 30 };

/// What a merge came to: objects are durable, nothing is recorded.
pub(crate) struct Merged {
    pub(crate) body: MergedBody,
    pub(super) written_bytes: u64,
    /// What was written.
    pub(crate) created: Vec<ObjectName>,
    /// Disks whose content was taken over; none: all.
    pub(super) keep: Option<HashSet<DiskId>>,
}

impl Merged {
    /// Whether it is right for a state: no disk has come that was left out.
    pub(crate) fn fits(&self, state: &MachineState) -> bool {
        self.keep.as_ref().is_none_or(|keep| wanted_disks(state).is_subset(keep))
    }
}

/// Does it. A failure or cancellation leaves objects that nothing names.
pub(super) async fn merge(
    journal: &mut Journal,
    turn: &mut Turn,
    planned: &Planned,
    pace: &Pace,
    full: Full,
) -> Result<Merged> {
    let items = sources(&journal.state, planned)?;
    let replaces = planned.purpose != Purpose::Shortcut;
    // What the replaced runs name.
    let before = if replaces { named(journal, &items).await? } else { HashMap::new() };
    let map_bytes = items.iter().filter(|item| item.is_merged()).flat_map(|item| item.objects());
    let move_max = MOVE_BYTES_LEAST.max(map_bytes.map(|map| map.bytes).sum::<u64>().saturating_mul(4));
    let doomed = if replaces { doomed(&before, planned.purpose, move_max) } else { HashSet::new() };
    let keep = replaces.then(|| wanted_disks(&journal.state));
    let list: Vec<Source> = items
        .iter()
        .flat_map(|item| {
            let kind = if item.is_merged() { Kind::Map } else { Kind::Segment };
            item.objects().iter().map(move |object| Source::new(kind, object.clone()))
        })
        .collect();
    let moved = !doomed.is_empty();
    let (written, _, skipped) = write(journal, turn, list, doomed, keep.as_ref(), pace, full).await?;
    // Shortcuts over it name what was left out, too.
    let moved = moved || skipped;
    let now_ms = journal.vault.stamp_ms().await?;
    Ok(Merged { keep, ..record(planned, &before, replaces.then_some(moved), written, now_ms) })
}

/// Makes one run anew out of sources that hold what it holds, in the order in which they apply: content of the `doomed` segments is moved.
/// Every shortcut over it is dropped, since it may name what is not there any more. What of the sources is not needed goes to the trash,
/// if it is not there already.
pub(crate) async fn remake(
    journal: &mut Journal,
    turn: &mut Turn,
    run: &Run,
    sources: Vec<Source>,
    doomed: HashSet<SegmentId>,
    pace: &Pace,
    full: Full,
) -> Result<Merged> {
    let keep = wanted_disks(&journal.state);
    let (written, rows, _) = write(journal, turn, sources, doomed, Some(&keep), pace, full).await?;
    let trashed: HashSet<SegmentId> = journal.state.trash.iter().map(|known| known.object.id).collect();
    let before = rows.into_iter().map(|row| (row.id, row)).collect();
    let (from, to, purpose) = (run.from, run.to, Purpose::Clean);
    let planned = Planned { from, to, runs: 1, bytes: 0, purpose };
    let now_ms = journal.vault.stamp_ms().await?;
    let mut merged = record(&planned, &before, Some(true), written, now_ms);
    if let Some(replaces) = &mut merged.body.replaces {
        replaces.dead.retain(|dead| !trashed.contains(&dead.object.id));
    }
    Ok(Merged { keep: Some(keep), ..merged })
}

/// Writes maps over sources; answers also all segments that these name, and whether something of a disk that is not kept was left out.
async fn write(
    journal: &mut Journal,
    turn: &mut Turn,
    sources: Vec<Source>,
    doomed: HashSet<SegmentId>,
    keep: Option<&HashSet<DiskId>>,
    pace: &Pace,
    full: Full,
) -> Result<(Written, Vec<SegmentRow>, bool)> {
    let (vault, machine, keys) = (journal.vault.clone(), journal.machine, journal.keys.clone());
    let mut stream = Merge::new(vault.store(), machine, &keys, pace, sources);
    let mut output = Output::new(&vault, machine, &keys, pace, doomed, full);
    let mut skipped = false;
    loop {
        let next = match turn.renew(journal).await {
            Ok(()) => stream.next().await,
            Err(error) => Err(error),
        };
        let piece = match next {
            Ok(piece) => piece,
            Err(error) => {
                output.abort().await;
                return Err(error);
            }
        };
        let Some(piece) = piece else { break };
        // A shortcut holds what its runs hold, or it would hide what they do.
        if keep.is_some_and(|keep| !keep.contains(&piece.disk)) {
            skipped = true;
            continue;
        }
        if let Err(error) = output.push(&piece, stream.rows()).await {
            output.abort().await;
            return Err(error);
        }
    }
    let written = output.finish().await?;
    Ok((written, stream.rows().to_vec(), skipped))
}

fn record(
    planned: &Planned,
    before: &HashMap<SegmentId, SegmentRow>,
    replaces: Option<bool>,
    written: Written,
    now_ms: u64,
) -> Merged {
    let Written { mut maps, held } = written;
    maps.iter_mut().for_each(|map| map.commit = planned.to);
    let new = held.values().filter(|row| !before.contains_key(&row.id) && replaces.is_some());
    let newest = maps.iter().map(|map| map.id).chain(new.clone().map(|row| row.id)).max();
    let written_bytes =
        maps.iter().map(|map| map.bytes).sum::<u64>() + new.clone().map(|row| row.bytes).sum::<u64>();
    let created = maps
        .iter()
        .map(|map| ObjectName { kind: Kind::Map, id: map.id })
        .chain(new.clone().map(|row| ObjectName { kind: row.kind, id: row.id }))
        .collect();
    let replaces = replaces.map(|moved| {
        let mut dead: Vec<Trashed> = before
            .values()
            .filter(|row| !held.contains_key(&row.id))
            .map(|row| Trashed {
                object: ObjectName { kind: row.kind, id: row.id },
                bytes: row.bytes,
                since_ms: now_ms,
            })
            .collect();
        dead.sort_by_key(|trashed| trashed.object);
        Replaces { held: sum(held.values()), dead, moved }
    });
    let newest = newest.unwrap_or_else(SegmentId::new);
    let body = MergedBody { from: planned.from, to: planned.to, maps, replaces, newest };
    Merged { body, written_bytes, created, keep: None }
}

fn sum<'a>(rows: impl Iterator<Item = &'a SegmentRow>) -> Held {
    rows.fold(Held::default(), |sum, row| Held {
        bytes: sum.bytes + row.bytes,
        blocks: sum.blocks + row.blocks,
        live_blocks: sum.live_blocks + row.live,
        segments: sum.segments + 1,
    })
}

/// All segments that runs name, with what they need of each. Of those that a commit brought, their lengths are enough here.
async fn named(journal: &Journal, items: &[Item<'_>]) -> Result<HashMap<SegmentId, SegmentRow>> {
    let Journal { vault, machine, keys, .. } = journal;
    let mut found: HashMap<SegmentId, SegmentRow> = HashMap::new();
    for item in items {
        let Item::Run(run) = item else { return Err(VaultError::Order("a shortcut owns nothing")) };
        match &run.content {
            Content::Segments(segments) => found.extend(segments.iter().map(|segment| {
                let (kind, salt, bytes) = (Kind::Segment, segment.salt, segment.bytes);
                (segment.id, SegmentRow { id: segment.id, kind, salt, bytes, blocks: 0, live: 0 })
            })),
            Content::Maps { maps, .. } => {
                for map in maps {
                    let reader = SegmentReader::new(vault.store().clone(), *machine, keys, Kind::Map, map)?;
                    for row in rows(&reader).await? {
                        found.entry(row.id).and_modify(|known| known.live += row.live).or_insert(row);
                    }
                }
            }
        }
    }
    Ok(found)
}

/// Segments whose content is written anew, together not much more than so many bytes of it: those first that are needed least.
fn doomed(
    named: &HashMap<SegmentId, SegmentRow>,
    purpose: Purpose,
    move_bytes_max: u64,
) -> HashSet<SegmentId> {
    let (part, of) = if purpose == Purpose::Clean { DOOM_BELOW_CLEANING } else { DOOM_BELOW };
    let small = named.values().filter(|row| row.bytes < SMALL_BYTES).count();
    let is_doomed = |row: &&SegmentRow| {
        let is_mostly_dead = row.blocks > 0 && row.live.saturating_mul(of) < row.blocks.saturating_mul(part);
        is_mostly_dead || (small >= SMALL_MANY && row.bytes < SMALL_BYTES)
    };
    let mut doomed: Vec<&SegmentRow> = named.values().filter(is_doomed).collect();
    let needed = |row: &SegmentRow| match row.blocks {
        // Of one that a commit brought nobody counted what is needed: all of it.
        0 => row.bytes,
        blocks => (u128::from(row.bytes) * u128::from(row.live) / u128::from(blocks)) as u64,
    };
    doomed.sort_by_key(|row| (needed(row), row.id));
    let mut moved: u64 = 0;
    let within = doomed.into_iter().take_while(|row| {
        let fits = moved < move_bytes_max;
        moved = moved.saturating_add(needed(row));
        fits
    });
    within.map(|row| row.id).collect()
}

/// Disks that the machine has, or that a point covers; what is held of others can be wanted no more.
fn wanted_disks(state: &MachineState) -> HashSet<DiskId> {
    let covered = state.points.iter().flat_map(|point| point.info.disks.iter().map(|disk| disk.disk));
    state.disks.iter().map(|record| record.disk).chain(covered).collect()
}
