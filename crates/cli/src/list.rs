//! `machines` and `points`.

use crate::{
    CliError, Console, Exit,
    args::Global,
    context,
    group::marker_of_points,
    output::{age, bytes_text, json, plain, rfc3339, table},
};
use futures::{StreamExt, stream};
use highwater_delta::{Code, CommitId, Consistency, DiskId, MachineId, PointInfo};
use highwater_vault::{DiskRecord, Hold, MachineState, PointRecord, policy::Rules};
use serde::{Serialize, Serializer};
use serde_json::{Value, json as document};
use std::collections::HashMap;

/// Machines that are read at once: each costs a few requests, and the memory of its history.
const MACHINES_AT_ONCE: usize = 8;

pub(crate) async fn machines(global: &Global, console: &mut Console<'_>) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let (mut documents, mut rows, mut unreadable) = (Vec::new(), Vec::new(), 0);
    let mut read = stream::iter(vault.machines().await?)
        .map(|id| {
            let vault = vault.clone();
            async move { (id, vault.machine(id).await) }
        })
        .buffered(MACHINES_AT_ONCE);
    while let Some((id, state)) = read.next().await {
        // One damaged machine must not hide the others.
        match state {
            Ok(state) => {
                rows.push(machine_row(&state));
                documents.push(machine_document(&state));
            }
            Err(error) => {
                unreadable += 1;
                let code = Code(error.code()).to_string();
                rows.push(vec![id.to_string(), format!("unreadable, {code}")]);
                if !global.json {
                    writeln!(console.err, "{id}: {code}: {error}\n  → {}", error.action())?;
                }
                let error = document!({ "code": code, "cause": error.to_string(), "action": error.action() });
                documents.push(document!({ "machine": id, "error": error }));
            }
        }
    }
    if global.json {
        json(console, &document!({ "vault": vault.id(), "machines": documents }))?;
        return Ok(if unreadable == 0 { Exit::Success } else { Exit::Failure });
    }
    if rows.is_empty() {
        writeln!(console.out, "The vault holds no machines yet.")?;
    } else {
        table(console, &["MACHINE", "HOST", "DISKS", "SIZE", "POINTS", "LATEST", "AGE", "STORED"], &rows)?;
    }
    if unreadable > 0 { Err(CliError::Unreadable(unreadable)) } else { Ok(Exit::Success) }
}

fn machine_row(state: &MachineState) -> Vec<String> {
    let size = state.disks.iter().map(|disk| disk.size_bytes).sum();
    let stored = state.stored_bytes();
    let latest = state.points.last();
    vec![
        state.machine.to_string(),
        plain(&state.host_name),
        state.disks.len().to_string(),
        bytes_text(size),
        state.points.len().to_string(),
        latest.map_or("-".to_owned(), |point| point.id.to_string()),
        latest.map_or("-".to_owned(), |point| age(point.info.taken_at_ms)),
        bytes_text(stored),
    ]
}

fn machine_document(state: &MachineState) -> Value {
    document!({
        "machine": state.machine,
        "host-name": state.host_name,
        "disks": disks(state),
        "points": state.points.len(),
        "latest-point": state.points.last().map(|point| point_document(state, point)),
        "state-bytes": state.memory_bytes(),
        "bytes-stored": state.stored_bytes(),
    })
}

fn disks(state: &MachineState) -> Vec<Value> {
    let disks = state.disks.iter();
    disks.map(|d| document!({ "disk": d.disk, "name": d.name, "size-bytes": d.size_bytes })).collect()
}

/// What `points --json` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Listed<'a> {
    /// What keeps later points from being known.
    damage: Option<Value>,
    disks: Vec<Value>,
    host_name: &'a str,
    machine: MachineId,
    points: Points<'a>,
}

/// Until when a point is immutable, in milliseconds since 1970, if it is so now.
fn immutable_until_ms(rules: &Rules, point: &PointRecord, now_ms: u64) -> Option<u64> {
    Some(rules.immutable_until_ms(point.stored_at_ms)).filter(|until_ms| *until_ms > now_ms)
}

/// A machine's points, each a document only while it is written: of 100,000 all would take hundreds of MiB.
struct Points<'a> {
    state: &'a MachineState,
    rules: &'a Rules,
    groups: &'a HashMap<CommitId, (String, String)>,
    now_ms: u64,
}

impl Serialize for Points<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { state, rules, groups, now_ms } = *self;
        let mut seen = Seen::default();
        serializer.collect_seq(state.points.iter().map(|point| {
            let mut document = point_document_with(state, point, &seen.left_out(state, point));
            document["immutable-until"] = immutable_until_ms(rules, point, now_ms).map(rfc3339).into();
            let group = groups.get(&point.id);
            document["group-point"] =
                group.map(|(name, marker)| document!({ "group": name, "point": marker })).into();
            seen.take(point);
            document
        }))
    }
}

pub(crate) async fn points(
    global: &Global,
    machine: &str,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let id = context::machine(&vault, machine).await?;
    let (state, damage) = context::state(&vault, id, true, global.json, console).await?;
    let now_ms = vault.now_ms();
    let (rules, damage) = match Rules::load(&vault, id).await {
        // The points are there all the same; only what protects them is not known.
        Err(error) if error.is_damage() => {
            if !global.json {
                writeln!(console.err, "{error}: which points are immutable is not known")?;
            }
            (Rules::of(&[], &[]), damage.or(Some(error)))
        }
        rules => (rules?, damage),
    };
    let (groups, damage) = match marker_of_points(&vault, id).await {
        Err(error) if error.is_damage() => {
            if !global.json {
                writeln!(console.err, "{error}: which points belong to groups is not known")?;
            }
            (HashMap::new(), damage.or(Some(error)))
        }
        groups => (groups?, damage),
    };
    let exit = if damage.is_none() { Exit::Success } else { Exit::Damaged };
    if global.json {
        let (machine, host_name) = (state.machine, state.host_name.as_str());
        let points = Points { state: &state, rules: &rules, groups: &groups, now_ms };
        let damage = damage.as_ref().map(context::damage_document);
        let whole = Listed { damage, disks: disks(&state), host_name, machine, points };
        json(console, &whole)?;
        return Ok(exit);
    }
    if state.points.is_empty() {
        writeln!(console.out, "{} has no recovery point yet.", plain(&state.host_name))?;
        return Ok(exit);
    }
    let row = |point: &PointRecord| {
        vec![
            point.id.to_string(),
            rfc3339(point.info.taken_at_ms),
            age(point.info.taken_at_ms),
            consistency(&point.info).to_owned(),
            format!("{:.1} ms", point.info.freeze_us as f64 / 1000.0),
            bytes_text(point.bytes_stored),
            match (state.holds.get(&point.id), immutable_until_ms(&rules, point, now_ms)) {
                (Some(held), _) => kept(held.hold).to_owned(),
                (None, Some(until_ms)) => format!("immutable to {}", rfc3339(until_ms)),
                (None, None) => String::new(),
            },
            groups.get(&point.id).map(|(name, _)| plain(name)).unwrap_or_default(),
            names(&state, &point.info).join(" "),
        ]
    };
    let rows: Vec<Vec<String>> = state.points.iter().map(row).collect();
    table(
        console,
        &["POINT", "TAKEN", "AGE", "CONSISTENCY", "FREEZE", "STORED", "KEPT", "GROUP", "DISKS"],
        &rows,
    )?;
    Ok(exit)
}

pub(crate) fn point_document(state: &MachineState, point: &PointRecord) -> Value {
    point_document_with(state, point, &left_out(state, point))
}

fn point_document_with(
    state: &MachineState,
    point: &PointRecord,
    left_out: &[(&DiskRecord, CommitId)],
) -> Value {
    let disks: Vec<Value> = point
        .info
        .disks
        .iter()
        .map(|covered| {
            let name = state.disk(covered.disk).map(|record| record.name.as_str()).unwrap_or_default();
            document!({ "disk": covered.disk, "name": name, "size-bytes": covered.size_bytes })
        })
        .collect();
    document!({
        "point": point.id,
        "taken-at": rfc3339(point.info.taken_at_ms),
        "taken-at-ms": point.info.taken_at_ms,
        "stored-at-ms": point.stored_at_ms,
        "consistency": consistency(&point.info),
        "freeze-us": point.info.freeze_us,
        "bytes-stored": point.bytes_stored,
        "hold": state.holds.get(&point.id),
        "disks": disks,
        "disks-left-out": left_out
            .iter()
            .map(|(disk, last)| document!({ "disk": disk.disk, "name": disk.name, "last-point": last }))
            .collect::<Vec<Value>>(),
    })
}

/// Disks of the machine that this point lacks although an earlier one has them, and the last that does: the agent leaves a
/// disk out that it cannot read.
pub(crate) fn left_out<'a>(state: &'a MachineState, point: &PointRecord) -> Vec<(&'a DiskRecord, CommitId)> {
    let mut seen = Seen::default();
    state.points.iter().take_while(|earlier| earlier.id < point.id).for_each(|earlier| seen.take(earlier));
    seen.left_out(state, point)
}

/// The last point of each disk, of those that were gone through: a history may have hundreds of thousands.
#[derive(Default)]
struct Seen {
    last: HashMap<DiskId, CommitId>,
}

impl Seen {
    fn take(&mut self, point: &PointRecord) {
        self.last.extend(point.info.disks.iter().map(|covered| (covered.disk, point.id)));
    }
    fn left_out<'a>(&self, state: &'a MachineState, point: &PointRecord) -> Vec<(&'a DiskRecord, CommitId)> {
        let has = |disk: &DiskRecord| point.info.disks.iter().any(|covered| covered.disk == disk.disk);
        let missing = state.disks.iter().filter(|disk| !has(disk));
        missing.filter_map(|disk| Some((disk, *self.last.get(&disk.disk)?))).collect()
    }
}

pub(crate) fn consistency(info: &PointInfo) -> &'static str {
    match info.consistency {
        Consistency::Crash => "crash",
        Consistency::Filesystem => "filesystem",
        Consistency::Application => "application",
    }
}

fn kept(hold: Hold) -> &'static str {
    match hold {
        Hold::Pin => "pinned",
        Hold::Legal => "legal hold",
    }
}

fn names(state: &MachineState, info: &PointInfo) -> Vec<String> {
    info.disks
        .iter()
        .map(|covered| match state.disk(covered.disk) {
            Ok(record) if !record.name.is_empty() => plain(&record.name),
            _ => covered.disk.to_string(),
        })
        .collect()
}
