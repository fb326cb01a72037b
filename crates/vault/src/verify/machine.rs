//! One machine: its records, then its objects in the order of kind and id, then what nobody names.

use super::{
    Damaged, Pass, Place, Report,
    entries::{self, Indexes},
    map,
    pass::Told,
    replay::replay,
    segment,
};
use crate::{
    MachineState, Result, SegmentRef, VaultError,
    maps::{SegmentRow, rows},
    runs::{Content, Held, Item, Kind, ObjectName},
    segment::SegmentReader,
    store,
    vault::Begin,
};
use futures::TryStreamExt;
use highwater_delta::SegmentId;
use object_store::ObjectStoreExt;
use std::collections::{HashMap, HashSet};

/// Times that a machine's runs are looked at anew, since they were merged meanwhile.
const ROUNDS_MAX: usize = 16;

/// An object to be checked.
#[derive(Clone, Copy)]
struct Task {
    name: ObjectName,
    /// The run, or shortcut, that it belongs to.
    part: u32,
    of: Of,
}

#[derive(Clone, Copy)]
enum Of {
    /// The n-th object that the run or shortcut itself names.
    Named(u32),
    /// A segment that a map names.
    Row { salt: [u8; 16], bytes: u64, blocks: u64 },
}

/// What a machine's runs name.
#[derive(Default)]
struct Named {
    tasks: Vec<Task>,
    /// Segments that a shortcut names and no run does.
    lacking: HashSet<ObjectName>,
    /// A map of a run cannot be read: what it names is not known.
    unknown: bool,
}

pub(super) async fn verify(
    place: &Place<'_>,
    host_name: String,
    mut own: Report,
    pass: &mut Pass,
    told: &Told<'_>,
    indexes: &mut Indexes,
) -> Result<()> {
    let (mut state, whole) = replay(place, host_name, &mut own).await?;
    own.points += state.points.len() as u64;
    for point in &state.points {
        for covered in &point.info.disks {
            if let Err(error) = state.disk(covered.disk) {
                own.problem(Some(place.machine), &error);
            }
        }
    }
    overlaps(&state, &mut own);
    let counted = pass.current().is_some_and(|current| std::mem::replace(&mut current.counted, true));
    if counted {
        // By the process before.
        let (problems, left_out) = (own.problems, own.left_out);
        own = Report { problems, left_out, ..Report::default() };
    }
    pass.absorb(own);
    told.done(pass).await?;
    let mut done: HashSet<ObjectName> = HashSet::new();
    let through = pass.current().map(|current| current.through.clone()).unwrap_or_default();
    let mut named;
    let mut rounds = 0;
    loop {
        let mut own = Report::default();
        let merged_away;
        (named, merged_away) = collect(place, &state, &mut own).await?;
        pass.absorb(own);
        let merged_away =
            objects(place, &state, &named, &through, &mut done, pass, told, indexes).await? || merged_away;
        rounds += 1;
        if !merged_away || rounds == ROUNDS_MAX {
            break;
        }
        // What took the place of what was merged away is read too.
        state = place.vault.load_state(place.machine, place.keys, state.host_name, Begin::Checkpoint).await?;
    }
    let mut own = Report::default();
    if whole {
        unnamed(place, &state, &named, &mut own).await?;
    }
    pass.absorb(own);
    Ok(())
}

/// Checks all that is named and was not checked yet. Whether something was merged away meanwhile.
#[expect(clippy::too_many_arguments, reason = "all of one pass")]
async fn objects(
    place: &Place<'_>,
    state: &MachineState,
    named: &Named,
    through: &std::collections::BTreeMap<Kind, SegmentId>,
    done: &mut HashSet<ObjectName>,
    pass: &mut Pass,
    told: &Told<'_>,
    indexes: &mut Indexes,
) -> Result<bool> {
    let sample = pass.sample();
    let sizes = match sample {
        Some(_) => sizes(place).await?,
        None => HashMap::new(),
    };
    let mut merged_away = false;
    for task in &named.tasks {
        let ObjectName { kind, id } = task.name;
        if through.get(&kind).is_some_and(|through| id <= *through) || done.contains(&task.name) {
            continue;
        }
        let mut own = Report::default();
        match sample.is_none_or(|sample| sample.takes(id)) {
            true => one(place, state, named, task, &mut own, indexes).await?,
            false => {
                own.not_read += 1;
                let there = is_as_long(place, task, state, &sizes).await;
                own.keep(Some(place.machine), there)?;
            }
        }
        if !own.is_clean() {
            // Maintenance may go on meanwhile: what was merged away, and is then deleted, is no damage.
            if !is_there(place, part_of(state, task.part)).await {
                merged_away = true;
                continue;
            }
        }
        pass.absorb(own);
        done.insert(task.name);
        if let Some(current) = pass.current() {
            current.through.insert(kind, id);
        }
        told.done(pass).await?;
    }
    Ok(merged_away)
}

/// The run or shortcut of a number.
fn part_of(state: &MachineState, part: u32) -> Option<Item<'_>> {
    let at = part as usize;
    let run = state.runs.get(at).map(Item::Run);
    run.or_else(|| state.shortcuts.get(at - state.runs.len()).map(Item::Shortcut))
}

/// Whether a machine still has it. If that cannot be told, it has.
async fn is_there(place: &Place<'_>, part: Option<Item<'_>>) -> bool {
    let now = place.vault.load_state(place.machine, place.keys, String::new(), Begin::Checkpoint).await;
    now.map_or(true, |now| {
        let mut parts = now.runs.iter().map(Item::Run).chain(now.shortcuts.iter().map(Item::Shortcut));
        parts.any(|known| part.is_some_and(|part| known.objects() == part.objects()))
    })
}

async fn one(
    place: &Place<'_>,
    state: &MachineState,
    named: &Named,
    task: &Task,
    own: &mut Report,
    indexes: &mut Indexes,
) -> Result<()> {
    let machine = Some(place.machine);
    let mut entries_hold = false;
    let checked = match (reference(state, task), task.of) {
        (Some(map), Of::Named(_)) if task.name.kind == Kind::Map => {
            own.maps += 1;
            own.bytes += map.bytes;
            let checked = map::check(place, map).await;
            let whole = own.keep(machine, checked)?.is_some();
            let compared = match entries::check(place, map, &named.lacking, indexes, own).await {
                // What of it is wrong was told.
                Err(error) if !whole && !matches!(error, VaultError::Store(_)) => None,
                compared => own.keep(machine, compared)?,
            };
            own.entries += compared.as_ref().map_or(0, |compared| compared.entries);
            entries_hold = compared.as_ref().is_some_and(|compared| compared.all);
            compared.filter(|_| whole).map(drop)
        }
        (Some(segment), _) => {
            own.segments += 1;
            own.bytes += segment.bytes;
            let checked = segment::check(place, task.name.kind, segment, own).await;
            own.keep(machine, checked)?
        }
        (None, Of::Row { salt, bytes, blocks }) => {
            own.segments += 1;
            own.bytes += bytes;
            let ObjectName { kind, id } = task.name;
            let row = SegmentRow { id, kind, salt, bytes, blocks, live: 0 };
            let store = place.vault.store().clone();
            let reader = SegmentReader::new(store, place.machine, place.keys, kind, &row.reference())?;
            let checked = match reader.reference_of_trailer().await {
                Ok(reference) => segment::check(place, kind, &reference, own).await,
                Err(error) => Err(error),
            };
            own.keep(machine, checked)?
        }
        (None, Of::Named(_)) => None,
    };
    if checked.is_none() {
        own.damaged.push(Damaged { machine: place.machine, object: task.name, entries_hold });
    }
    Ok(())
}

/// A task's object as its record has it.
fn reference<'a>(state: &'a MachineState, task: &Task) -> Option<&'a SegmentRef> {
    match task.of {
        Of::Named(at) => part_of(state, task.part)?.objects().get(at as usize),
        Of::Row { .. } => None,
    }
}

/// What runs and shortcuts name, sorted by kind and id; whether some of it was merged away meanwhile.
async fn collect(place: &Place<'_>, state: &MachineState, own: &mut Report) -> Result<(Named, bool)> {
    let mut named = Named::default();
    let mut merged_away = false;
    let mut of_runs: HashSet<ObjectName> = HashSet::new();
    for (part, run) in (0_u32..).zip(&state.runs) {
        let kind = if run.is_merged() { Kind::Map } else { Kind::Segment };
        for (at, object) in (0..).zip(run.objects()) {
            let name = ObjectName { kind, id: object.id };
            of_runs.insert(name);
            named.tasks.push(Task { name, part, of: Of::Named(at) });
        }
        let Content::Maps { maps, held } = &run.content else { continue };
        // A segment may be named by several maps of a run.
        let mut all: HashMap<SegmentId, SegmentRow> = HashMap::new();
        let mut readable = true;
        for map in maps {
            match rows_of(place, map).await {
                Ok(rows) => rows.into_iter().for_each(|row| {
                    all.entry(row.id).and_modify(|known| known.live += row.live).or_insert(row);
                }),
                Err(error @ VaultError::Store(_)) => return Err(error),
                // What is wrong with it is said where it is checked.
                Err(_) => readable = false,
            }
        }
        if !readable {
            let gone = !is_there(place, Some(Item::Run(run))).await;
            merged_away |= gone;
            named.unknown |= !gone;
        }
        let found = all.values().fold(Held::default(), |sum, row| Held {
            bytes: sum.bytes + row.bytes,
            blocks: sum.blocks + row.blocks,
            live_blocks: sum.live_blocks + row.live,
            segments: sum.segments + 1,
        });
        if found != *held && readable {
            let what = format!("run {} of machine {}", run.to, place.machine);
            let cause = "its maps do not add up to what its record says";
            own.problem(Some(place.machine), &VaultError::corrupt(what, cause));
        }
        for row in all.into_values() {
            let name = ObjectName { kind: row.kind, id: row.id };
            if !of_runs.insert(name) {
                let what = store::object_path(place.machine, row.kind, row.id);
                own.problem(Some(place.machine), &VaultError::corrupt(what, "two runs name it"));
                continue;
            }
            let SegmentRow { salt, bytes, blocks, .. } = row;
            named.tasks.push(Task { name, part, of: Of::Row { salt, bytes, blocks } });
        }
    }
    for (part, shortcut) in (state.runs.len() as u32..).zip(&state.shortcuts) {
        for (at, map) in (0..).zip(&shortcut.maps) {
            let name = ObjectName { kind: Kind::Map, id: map.id };
            named.tasks.push(Task { name, part, of: Of::Named(at) });
            let rows = match rows_of(place, map).await {
                Ok(rows) => rows,
                Err(error @ VaultError::Store(_)) => return Err(error),
                Err(_) => {
                    merged_away |= !is_there(place, Some(Item::Shortcut(shortcut))).await;
                    continue;
                }
            };
            let lacking: Vec<ObjectName> = rows
                .iter()
                .map(|row| ObjectName { kind: row.kind, id: row.id })
                .filter(|name| !of_runs.contains(name))
                .collect();
            // What no run names is deleted some day.
            if !lacking.is_empty() && !named.unknown {
                let what = store::object_path(place.machine, Kind::Map, map.id);
                let cause = "a shortcut names a segment that no run names";
                own.problem(Some(place.machine), &VaultError::corrupt(what, cause));
            }
            named.lacking.extend(lacking);
        }
    }
    named.tasks.sort_unstable_by_key(|task| task.name);
    Ok((named, merged_away))
}

async fn rows_of(place: &Place<'_>, map: &SegmentRef) -> Result<Vec<SegmentRow>> {
    let store = place.vault.store().clone();
    rows(&SegmentReader::new(store, place.machine, place.keys, Kind::Map, map)?).await
}

/// Runs and shortcuts whose objects overlap where they must not.
fn overlaps(state: &MachineState, own: &mut Report) {
    let mut report = |what: String, cause: &str| {
        own.problem(Some(state.machine), &VaultError::corrupt(what, cause));
    };
    let mut seen = HashSet::new();
    let runs = state.runs.iter().map(Item::Run).chain(state.shortcuts.iter().map(Item::Shortcut));
    for part in runs {
        if part.is_merged() {
            let mut end = None;
            for span in part.objects().iter().flat_map(|map| &map.spans) {
                if end.is_some_and(|end| (span.disk, span.first) < end) || span.first >= span.end {
                    report(format!("run after {}", part.from()), "its maps overlap");
                }
                end = Some((span.disk, span.end));
            }
        }
        for object in part.objects() {
            if !seen.insert(object.id) {
                report(format!("object {}", object.id), "it is named twice");
            }
        }
    }
    for trashed in &state.trash {
        if seen.contains(&trashed.object.id) {
            report(format!("object {}", trashed.object.id), "it is in use, and in the trash");
        }
    }
}

/// What there is of segments and maps, with sizes.
async fn sizes(place: &Place<'_>) -> Result<HashMap<ObjectName, u64>> {
    let mut sizes = HashMap::new();
    for kind in [Kind::Segment, Kind::Rewritten, Kind::Map] {
        let mut listed = place.vault.store().list(Some(&store::object_dir(place.machine, kind)));
        while let Some(meta) = listed.try_next().await? {
            if let Some(id) = store::segment_of(&meta.location) {
                sizes.insert(ObjectName { kind, id }, meta.size);
            }
        }
    }
    Ok(sizes)
}

/// Whether an object that is not read is there, with the length that it should have.
async fn is_as_long(
    place: &Place<'_>,
    task: &Task,
    state: &MachineState,
    sizes: &HashMap<ObjectName, u64>,
) -> Result<()> {
    let wanted = match task.of {
        Of::Row { bytes, .. } => Some(bytes),
        Of::Named(_) => reference(state, task).map(|reference| reference.bytes),
    };
    let path = store::object_path(place.machine, task.name.kind, task.name.id);
    let size = match sizes.get(&task.name) {
        Some(size) => *size,
        // Made since it was looked.
        None => {
            let head = place.vault.store().head(&path).await;
            head.map_err(|error| store::of_object(&path, error))?.size
        }
    };
    match wanted {
        Some(wanted) if wanted != size => {
            Err(VaultError::corrupt(path, "its length is not what the manifest says"))
        }
        _ => Ok(()),
    }
}

/// What nobody names, and what nobody knows.
async fn unnamed(place: &Place<'_>, state: &MachineState, named: &Named, own: &mut Report) -> Result<()> {
    let known: HashSet<ObjectName> = named
        .tasks
        .iter()
        .map(|task| task.name)
        .chain(state.trash.iter().map(|trashed| trashed.object))
        .chain(named.lacking.iter().copied())
        .collect();
    let mut listed = place.vault.store().list(Some(&store::machine_dir(place.machine)));
    while let Some(meta) = listed.try_next().await? {
        match store::what_is(place.machine, &meta.location) {
            store::What::Object(name) if known.contains(&name) => {}
            // One that cannot be read may name it.
            store::What::Object(name) if named.unknown && name.kind != Kind::Map => {}
            store::What::Object(_) => own.orphans.push(meta.location.to_string()),
            store::What::Stranger => own.strangers.push(meta.location.to_string()),
            store::What::Document => {}
        }
    }
    own.orphans.sort();
    own.strangers.sort();
    Ok(())
}
