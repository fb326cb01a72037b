//! Manifest records and the state that their replay gives. Pure: no store, no clock.
//!
//! Records of a machine are numbered from 1 without gaps; each holds the hash of the object before it, so that a
//! history cannot be cut and continued differently. A state is the fold of all records up to one of them; a
//! checkpoint is a state, stored, so that replay need not begin at 1.

use crate::{DISKS_MAX, NAME_BYTES_MAX, Result, VaultError};
use highwater_delta::{
    Block, CommitId, CommitKind, DeltaId, DiskId, MachineId, PointInfo, SegmentId, chunk::BLOCK_END_MAX,
};
use serde::{Deserialize, Serialize};
use std::collections::{HashSet, VecDeque};

/// Deltas remembered, so that one sent again is known.
const RECENT_MAX: usize = 256;

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Given at protection.
    pub disk: DiskId,
    /// For people.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
}

/// A recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointRecord {
    /// The commit that made it.
    pub id: CommitId,
    /// As the agent declared it.
    pub info: PointInfo,
    /// When it was committed, by the collector's clock, in milliseconds since 1970.
    pub stored_at_ms: u64,
    /// Bytes of the segments stored since the point before.
    pub bytes_stored: u64,
}

/// A segment as a record names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRef {
    /// Its identity.
    pub id: SegmentId,
    /// The commit that brought it.
    pub commit: CommitId,
    /// Bytes of the object.
    pub bytes: u64,
    /// Random; its key is derived from this and its identity.
    pub salt: [u8; 16],
    /// Where its footer frame lies.
    pub footer_offset: u64,
    /// Bytes of the footer frame.
    pub footer_len: u32,
    /// Number of the footer frame.
    pub footer_frame: u32,
    /// What it holds of each disk.
    pub spans: Vec<DiskSpan>,
}

/// What a segment holds of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpan {
    /// The disk.
    pub disk: DiskId,
    /// The first block.
    pub first: u64,
    /// The first block behind the last.
    pub end: u64,
}

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
    /// Its segments, in the order in which they apply.
    pub segments: Vec<SegmentRef>,
    /// Number of the last record, commit or not.
    pub last_record: u64,
    /// How often a writer has taken over from an interrupted one.
    pub epoch: u64,
    pub(crate) chain: [u8; 32],
    pub(crate) recent: VecDeque<(DeltaId, CommitId)>,
    pub(crate) bytes_since_point: u64,
}

/// What every record says. `kind` tells how `body` is to be read, so that older programs name what they don't know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Envelope {
    pub(crate) number: u64,
    pub(crate) previous: [u8; 32],
    pub(crate) writer: [u8; 16],
    pub(crate) epoch: u64,
    pub(crate) stored_at_ms: u64,
    pub(crate) kind: u16,
    pub(crate) body: Vec<u8>,
}

/// Kinds of records. 3 (segments replaced by compaction) and 4 (points expired) are reserved.
pub(crate) const KIND_COMMIT: u16 = 1;
pub(crate) const KIND_TAKEOVER: u16 = 2;

/// The body of a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CommitBody {
    pub(crate) delta: DeltaId,
    pub(crate) kind: CommitKind,
    pub(crate) disks: Vec<DiskRecord>,
    pub(crate) segments: Vec<SegmentRef>,
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
            segments: Vec::new(),
            last_record: 0,
            epoch: 0,
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

    /// Takes the next record in. `object` is the hash of the sealed object; `name` is for errors.
    pub(crate) fn apply(&mut self, envelope: &Envelope, object: [u8; 32], name: &str) -> Result<()> {
        let corrupt = |cause: &str| VaultError::corrupt(name, cause);
        if envelope.number != self.last_record + 1 {
            return Err(corrupt("its number does not fit its name"));
        }
        if envelope.previous != self.chain {
            return Err(corrupt("it does not continue the record before it"));
        }
        match envelope.kind {
            KIND_COMMIT => {
                if envelope.epoch != self.epoch {
                    return Err(corrupt("a commit of a writer that had been fenced"));
                }
                let body: CommitBody =
                    postcard::from_bytes(&envelope.body).map_err(|e| corrupt(&e.to_string()))?;
                self.apply_commit(CommitId(envelope.number), envelope.stored_at_ms, body)
                    .map_err(|e| corrupt(&e.to_string()))?;
            }
            KIND_TAKEOVER => {
                if envelope.epoch != self.epoch + 1 {
                    return Err(corrupt("epochs do not follow each other"));
                }
                self.epoch = envelope.epoch;
            }
            other => return Err(VaultError::Format { object: name.to_owned(), found: u64::from(other) }),
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
        self.segments.extend(body.segments);
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

    /// Bytes of memory that it takes, roughly, and never less than it takes as a document; grows with every commit.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let disks: usize = self.disks.iter().chain(&self.former_disks).map(disk_bytes).sum();
        let points: usize = self.points.iter().map(|point| point_bytes(&point.info)).sum();
        let segments: usize = self.segments.iter().map(segment_bytes).sum();
        grown(disks + points + segments) + 16 * 1024
    }

    /// [`MachineState::memory_bytes`] after such a commit, or somewhat more.
    pub(crate) fn memory_bytes_with(&self, body: &CommitBody) -> u64 {
        // All disks may become former ones.
        let disks: usize = if body.disks == self.disks { 0 } else { body.disks.iter().map(disk_bytes).sum() };
        let point = if let CommitKind::Point(info) = &body.kind { point_bytes(info) } else { 0 };
        let segments: usize = body.segments.iter().map(segment_bytes).sum();
        self.memory_bytes() + grown(disks + point + segments)
    }

    /// How many records after the last checkpoint the next one is due: rare enough that checkpoints of long
    /// histories cost little, often enough that replay is short.
    pub(crate) fn checkpoint_interval(&self) -> u64 {
        ((self.points.len() + self.segments.len()) as u64 / 64).max(64)
    }
}

fn disk_bytes(record: &DiskRecord) -> usize {
    size_of::<DiskRecord>() + record.name.len()
}
fn point_bytes(info: &PointInfo) -> usize {
    size_of::<PointRecord>() + info.disks.len() * size_of::<highwater_delta::PointDisk>()
}
fn segment_bytes(segment: &SegmentRef) -> usize {
    size_of::<SegmentRef>() + segment.spans.len() * size_of::<DiskSpan>()
}
/// A vector grows by doubling.
const fn grown(bytes: usize) -> u64 {
    (bytes * 3 / 2) as u64
}

/// Whether these can be a machine's disks.
pub(crate) fn check_disks(disks: &[DiskRecord]) -> Result<()> {
    if disks.len() > DISKS_MAX {
        return Err(VaultError::Limit("disks of one machine"));
    }
    let mut seen = HashSet::new();
    for record in disks {
        check_name(&record.name)?;
        if Block::count_for(record.size_bytes) > BLOCK_END_MAX {
            return Err(VaultError::Limit("size of a disk"));
        }
        if !seen.insert(record.disk) {
            return Err(VaultError::Name(format!("disk {} is named twice", record.disk)));
        }
    }
    Ok(())
}

/// Whether a point covers only disks that the machine has.
pub(crate) fn check_point(kind: &CommitKind, disks: &[DiskRecord]) -> Result<()> {
    let CommitKind::Point(info) = kind else { return Ok(()) };
    if info.disks.len() > DISKS_MAX {
        return Err(VaultError::Limit("disks of one point"));
    }
    let mut seen = HashSet::new();
    for covered in &info.disks {
        let Some(record) = disks.iter().find(|record| record.disk == covered.disk) else {
            return Err(VaultError::UnknownDisk(covered.disk));
        };
        if covered.size_bytes > record.size_bytes || !seen.insert(covered.disk) {
            return Err(VaultError::Order("a point's disks do not fit the machine's"));
        }
    }
    Ok(())
}

/// Whether this can be the name of a disk or host: short, and without control characters.
pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(VaultError::Name(name.chars().filter(|c| !c.is_control()).take(80).collect()));
    }
    Ok(())
}
