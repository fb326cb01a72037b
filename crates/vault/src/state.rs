//! What is in the vault of a machine: the fold of its records. Pure.

mod checkpoint;

pub(crate) use checkpoint::{decode, encode};

use crate::{
    Result, VaultError,
    record::{
        CommitBody, DiskRecord, DiskSpan, Envelope, ExpiredBody, HoldBody, HoldRecord, KIND_COMMIT,
        KIND_EXPIRED, KIND_HOLD, KIND_MAINTAINER, KIND_MERGED, KIND_SWEPT, KIND_TAKEOVER, MaintainerBody,
        MergedBody, PointRecord, SegmentRef, SweptBody, check_disks, check_name, check_point, is_maintainers,
    },
    runs::{Content, Kind, ObjectName, Run, Shortcut, Trashed, cover},
};
use highwater_delta::{CommitId, CommitKind, DeltaId, DiskId, MachineId, PointInfo, SegmentId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet, VecDeque};

/// Deltas remembered, so that one sent again is known.
const RECENT_MAX: usize = 256;

/// What is in the vault of a machine, after its last record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// The machine.
    pub machine: MachineId,
    /// Its host name at registration.
    pub host_name: String,
    /// Its disks.
    pub disks: Vec<DiskRecord>,
    /// Disks that it had earlier; older points may cover them.
    pub former_disks: Vec<DiskRecord>,
    /// The last commit of a delta.
    pub last_commit: CommitId,
    /// Its recovery points, oldest first.
    pub points: Vec<PointRecord>,
    /// Its runs, oldest first, without gaps.
    pub runs: Vec<Run>,
    /// Shortcuts over them.
    pub shortcuts: Vec<Shortcut>,
    /// Points that do not expire.
    pub holds: BTreeMap<CommitId, HoldRecord>,
    /// Objects that wait to be deleted.
    pub trash: Vec<Trashed>,
    /// Number of the last record, commit or not.
    pub last_record: u64,
    /// How often a writer has taken over from an interrupted one.
    pub epoch: u64,
    /// Who may maintain it.
    pub(crate) maintainer: [u8; 16],
    /// Who that is for, and until when it was seen at work.
    #[serde(skip)]
    pub(crate) lease: Lease,
    /// Of all segments that were ever committed, the greatest id: what is greater was not.
    pub(crate) newest_segment: Option<SegmentId>,
    /// The same of the maintainers' objects.
    pub(crate) newest_maintained: Option<SegmentId>,
    pub(crate) chain: [u8; 32],
    pub(crate) recent: VecDeque<(DeltaId, CommitId)>,
    pub(crate) bytes_since_point: u64,
}

/// For whom the machine's maintainer works: another one leaves it alone for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    /// As the maintainer said; zeros: nobody.
    pub(crate) owner: [u8; 16],
    /// When its last record was put, by its clock, in milliseconds since 1970.
    pub(crate) seen_ms: u64,
}

impl MachineState {
    pub(crate) fn empty(machine: MachineId, host_name: String) -> Self {
        Self {
            machine,
            host_name,
            disks: Vec::new(),
            former_disks: Vec::new(),
            last_commit: CommitId::NONE,
            points: Vec::new(),
            runs: Vec::new(),
            shortcuts: Vec::new(),
            holds: BTreeMap::new(),
            trash: Vec::new(),
            last_record: 0,
            epoch: 0,
            maintainer: [0; 16],
            lease: Lease::default(),
            newest_segment: None,
            newest_maintained: None,
            chain: [0; 32],
            recent: VecDeque::new(),
            bytes_since_point: 0,
        }
    }

    /// The commit of a delta among the last 256 commits.
    #[must_use]
    pub fn commit_of(&self, delta: DeltaId) -> Option<CommitId> {
        self.recent.iter().rev().find(|(known, _)| *known == delta).map(|(_, commit)| *commit)
    }
    /// A recovery point.
    pub fn point(&self, id: CommitId) -> Result<&PointRecord> {
        let at = self.points.binary_search_by_key(&id, |point| point.id);
        at.map(|at| &self.points[at]).map_err(|_| VaultError::UnknownPoint(id))
    }
    /// A disk, present or former.
    pub fn disk(&self, disk: DiskId) -> Result<&DiskRecord> {
        let mut all = self.disks.iter().chain(&self.former_disks);
        all.find(|record| record.disk == disk).ok_or(VaultError::UnknownDisk(disk))
    }
    /// The segments of commits that were not merged, in the order in which they apply.
    pub fn segments(&self) -> impl Iterator<Item = &SegmentRef> {
        self.runs.iter().filter(|run| !run.is_merged()).flat_map(Run::objects)
    }
    /// Bytes of all content that its points need, and of the maps over it.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let maps = self.runs.iter().filter(|run| run.is_merged()).flat_map(Run::objects);
        let maps = maps.chain(self.shortcuts.iter().flat_map(|shortcut| &shortcut.maps));
        self.runs.iter().map(Run::data_bytes).sum::<u64>() + maps.map(|map| map.bytes).sum::<u64>()
    }
    /// Most objects that a reader of its newest state begins with.
    #[must_use]
    pub fn depth(&self) -> usize {
        cover(&self.runs, &self.shortcuts, self.last_commit).map_or(0, |items| items.len())
    }

    /// A copy to try a maintainer's record on, which may have been made for a state that is not this one any more. A writer's
    /// is made for it.
    pub(crate) fn clone_for_maintenance(&self, kind: u16) -> Option<Self> {
        (!matches!(kind, KIND_COMMIT | KIND_TAKEOVER)).then(|| self.clone())
    }

    /// Takes the next record in. `object` is the hash of the sealed object; `name` is for errors.
    pub(crate) fn apply(&mut self, envelope: &Envelope, object: [u8; 32], name: &str) -> Result<()> {
        let corrupt = |cause: &str| VaultError::corrupt(name, cause);
        if envelope.number != self.last_record + 1 {
            return Err(corrupt("its number does not fit its name"));
        }
        if envelope.previous != self.chain {
            return Err(corrupt("it does not continue the record before it"));
        }
        let next_epoch = self.epoch + u64::from(envelope.kind == KIND_TAKEOVER);
        if envelope.epoch != next_epoch {
            return Err(corrupt(match envelope.kind {
                KIND_TAKEOVER => "epochs do not follow each other",
                _ => "a commit of a writer that had been fenced",
            }));
        }
        if is_maintainers(envelope.kind) && envelope.writer != self.maintainer {
            return Err(corrupt("of a maintainer that had been fenced"));
        }
        let body = &envelope.body;
        match envelope.kind {
            KIND_COMMIT => {
                let body: CommitBody = postcard::from_bytes(body).map_err(|e| corrupt(&e.to_string()))?;
                self.apply_commit(CommitId(envelope.number), envelope.stored_at_ms, body)
            }
            KIND_TAKEOVER => {
                self.epoch = next_epoch;
                Ok(())
            }
            KIND_MERGED => {
                let body: MergedBody = postcard::from_bytes(body).map_err(|e| corrupt(&e.to_string()))?;
                self.apply_merged(body, envelope.stored_at_ms)
            }
            KIND_EXPIRED => {
                let body: ExpiredBody = postcard::from_bytes(body).map_err(|e| corrupt(&e.to_string()))?;
                self.apply_expired(&body)
            }
            KIND_SWEPT => {
                let body: SweptBody = postcard::from_bytes(body).map_err(|e| corrupt(&e.to_string()))?;
                self.apply_swept(&body)
            }
            KIND_HOLD => {
                let body: HoldBody = postcard::from_bytes(body).map_err(|e| corrupt(&e.to_string()))?;
                self.apply_hold(body, envelope.stored_at_ms)
            }
            KIND_MAINTAINER => {
                let owner = MaintainerBody::decode(body).map_err(|e| corrupt(&e.to_string()))?.owner;
                self.maintainer = envelope.writer;
                self.lease.owner = owner;
                Ok(())
            }
            other => return Err(VaultError::Format { object: name.to_owned(), found: u64::from(other) }),
        }
        .map_err(|e| corrupt(&e.to_string()))?;
        if envelope.kind == KIND_MAINTAINER || is_maintainers(envelope.kind) {
            self.lease.seen_ms = envelope.stored_at_ms;
        }
        self.last_record = envelope.number;
        self.chain = object;
        Ok(())
    }

    fn apply_commit(&mut self, commit: CommitId, stored_at_ms: u64, body: CommitBody) -> Result<()> {
        check_disks(&body.disks)?;
        if body.segments.iter().any(|segment| segment.commit != commit) {
            return Err(VaultError::Order("a segment of another commit"));
        }
        check_point(&body.kind, &body.disks)?;
        if body.disks != self.disks {
            let before = std::mem::replace(&mut self.disks, body.disks);
            self.former_disks.extend(before);
            let present: HashSet<DiskId> = self.disks.iter().map(|record| record.disk).collect();
            let mut seen = HashSet::new();
            self.former_disks.reverse();
            self.former_disks.retain(|f| !present.contains(&f.disk) && seen.insert(f.disk));
            self.former_disks.reverse();
        }
        self.bytes_since_point += body.segments.iter().map(|segment| segment.bytes).sum::<u64>();
        // A commit that changed nothing and is no point ends nothing.
        if !body.segments.is_empty() || matches!(body.kind, CommitKind::Point(_)) {
            self.push_run(commit, body.segments);
        }
        if let CommitKind::Point(info) = body.kind {
            let bytes_stored = std::mem::take(&mut self.bytes_since_point);
            self.points.push(PointRecord { id: commit, info, stored_at_ms, bytes_stored });
        }
        self.recent.push_back((body.delta, commit));
        if self.recent.len() > RECENT_MAX {
            self.recent.pop_front();
        }
        self.last_commit = commit;
        Ok(())
    }

    /// Whether it is what a checkpoint of a state would say; earlier ones lack the lease.
    pub(crate) fn is_checkpoint_of(&self, state: &Self) -> bool {
        let unsaid = self.lease == Lease::default();
        *self == *state || (unsaid && *self == Self { lease: self.lease, ..state.clone() })
    }

    /// Whether runs follow each other, and shortcuts end where runs do.
    fn is_sound(&self) -> bool {
        let mut end = CommitId::NONE;
        let runs = self.runs.iter().all(|run| {
            let fits = run.from == end && run.from < run.to;
            end = run.to;
            fits
        });
        let ends = |commit| self.runs.binary_search_by_key(&commit, |run| run.to).is_ok();
        let mut shortcuts = self.shortcuts.iter();
        runs && shortcuts.all(|s| s.from < s.to && ends(s.to) && (s.from == CommitId::NONE || ends(s.from)))
    }

    fn push_run(&mut self, to: CommitId, segments: Vec<SegmentRef>) {
        self.newest_segment = segments.iter().map(|segment| segment.id).chain(self.newest_segment).max();
        let from = self.runs.last().map_or(CommitId::NONE, |run| run.to);
        self.runs.push(Run { from, to, content: Content::Segments(segments) });
    }

    /// Where the runs of a merge lie.
    pub(crate) fn runs_within(&self, from: CommitId, to: CommitId) -> Result<std::ops::Range<usize>> {
        let begin = self.runs.partition_point(|run| run.from < from);
        let end = self.runs.partition_point(|run| run.to <= to);
        let fits = begin < end && self.runs[begin].from == from && self.runs[end - 1].to == to;
        if fits { Ok(begin..end) } else { Err(VaultError::Order("a merge does not fit the runs")) }
    }

    fn apply_merged(&mut self, body: MergedBody, now_ms: u64) -> Result<()> {
        let MergedBody { from, to, maps, replaces, newest } = body;
        let within = self.runs_within(from, to)?;
        if maps.iter().any(|map| map.commit != to) {
            return Err(VaultError::Order("a map of another commit"));
        }
        self.newest_maintained = self.newest_maintained.max(Some(newest));
        let Some(replaces) = replaces else {
            if self.shortcuts.iter().any(|known| (known.from, known.to) == (from, to)) {
                return Err(VaultError::Order("a shortcut that there is already"));
            }
            self.shortcuts.push(Shortcut { from, to, maps });
            return Ok(());
        };
        // What lies behind a point that is kept is that point's.
        let inner = within.start..within.end - 1;
        let gone: HashSet<CommitId> = self.runs[inner].iter().map(|run| run.to).collect();
        if self.points.iter().any(|point| gone.contains(&point.id)) {
            return Err(VaultError::Order("a merge over a recovery point"));
        }
        let mut dropped: Vec<SegmentRef> = Vec::new();
        self.shortcuts.retain_mut(|shortcut| {
            // It may name segments that content was moved out of.
            let is_over = shortcut.from < to && from < shortcut.to;
            let lost_an_end = gone.contains(&shortcut.from) || gone.contains(&shortcut.to);
            let is_needless = (shortcut.from, shortcut.to) == (from, to);
            let goes = lost_an_end || is_needless || (replaces.moved && is_over);
            if goes {
                dropped.append(&mut shortcut.maps);
            }
            !goes
        });
        let kept: HashSet<SegmentId> = maps.iter().map(|map| map.id).collect();
        let content = Content::Maps { maps, held: replaces.held };
        for run in self.runs.splice(within, [Run { from, to, content }]) {
            if let Content::Maps { maps, .. } = run.content {
                dropped.extend(maps);
            }
        }
        self.trash.extend(replaces.dead);
        self.trash.extend(dropped.into_iter().filter(|map| !kept.contains(&map.id)).map(|map| Trashed {
            object: ObjectName { kind: Kind::Map, id: map.id },
            bytes: map.bytes,
            since_ms: now_ms,
        }));
        Ok(())
    }

    fn apply_expired(&mut self, body: &ExpiredBody) -> Result<()> {
        let expired: HashSet<CommitId> = body.points.iter().copied().collect();
        if self.holds.keys().any(|held| expired.contains(held)) {
            return Err(VaultError::Order("a point expires that is held"));
        }
        let before = self.points.len();
        self.points.retain(|point| !expired.contains(&point.id));
        if before - self.points.len() != body.points.len() {
            return Err(VaultError::Order("points expire that are not there"));
        }
        Ok(())
    }

    fn apply_hold(&mut self, body: HoldBody, since_ms: u64) -> Result<()> {
        self.point(body.point)?;
        check_name(&body.reason)?;
        match body.hold {
            Some(hold) => {
                let record = HoldRecord { hold, reason: body.reason, since_ms };
                self.holds.insert(body.point, record);
            }
            None => {
                self.holds.remove(&body.point);
            }
        }
        Ok(())
    }

    fn apply_swept(&mut self, body: &SweptBody) -> Result<()> {
        let swept: HashSet<ObjectName> = body.objects.iter().copied().collect();
        let before = self.trash.len();
        self.trash.retain(|trashed| !swept.contains(&trashed.object));
        if before - self.trash.len() != body.objects.len() {
            return Err(VaultError::Order("objects are swept that are not in the trash"));
        }
        Ok(())
    }

    /// Bytes of memory that it takes, roughly, and never less than it takes as a document; grows with every commit.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let disks: usize = self.disks.iter().chain(&self.former_disks).map(disk_bytes).sum();
        let points: usize = self.points.iter().map(|point| point_bytes(&point.info)).sum();
        let runs: usize = self.runs.iter().map(|run| size_of::<Run>() + objects_bytes(run.objects())).sum();
        let shortcuts: usize =
            self.shortcuts.iter().map(|s| size_of::<Shortcut>() + objects_bytes(&s.maps)).sum();
        let trash = self.trash.len() * size_of::<Trashed>();
        let holds: usize =
            self.holds.values().map(|hold| 2 * size_of::<HoldRecord>() + hold.reason.len()).sum();
        grown(disks + points + runs + shortcuts + trash + holds) + 16 * 1024
    }

    /// [`MachineState::memory_bytes`] after such a commit, or somewhat more.
    pub(crate) fn memory_bytes_with(&self, body: &CommitBody) -> u64 {
        // All disks may become former ones.
        let disks: usize = if body.disks == self.disks { 0 } else { body.disks.iter().map(disk_bytes).sum() };
        let point = if let CommitKind::Point(info) = &body.kind { point_bytes(info) } else { 0 };
        self.memory_bytes() + grown(disks + point + size_of::<Run>() + objects_bytes(&body.segments))
    }

    /// How many records after the last checkpoint the next one is due: rare enough that checkpoints of long
    /// histories cost little, often enough that replay is short.
    pub(crate) fn checkpoint_interval(&self) -> u64 {
        let least = if cfg!(test) { 5 } else { 64 };
        ((self.points.len() + self.runs.len()) as u64 / 64).max(least)
    }
}

fn disk_bytes(record: &DiskRecord) -> usize {
    size_of::<DiskRecord>() + record.name.len()
}
fn point_bytes(info: &PointInfo) -> usize {
    size_of::<PointRecord>() + info.disks.len() * size_of::<highwater_delta::PointDisk>()
}
fn objects_bytes(objects: &[SegmentRef]) -> usize {
    objects.iter().map(|object| size_of::<SegmentRef>() + object.spans.len() * size_of::<DiskSpan>()).sum()
}
/// A vector grows by doubling.
const fn grown(bytes: usize) -> u64 {
    (bytes * 3 / 2) as u64
}
