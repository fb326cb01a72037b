//! Manifest records: what each says. Pure: no store, no clock.
//!
//! Records of a machine are numbered from 1 without gaps; each holds the hash of the object before it, so that a
//! history cannot be cut and continued differently. Their fold is a [`crate::MachineState`].

use crate::{
    DISKS_MAX, NAME_BYTES_MAX, Result, VaultError,
    runs::{Held, ObjectName, Trashed},
};
use highwater_delta::{
    Block, CommitId, CommitKind, DeltaId, DiskId, PointInfo, SegmentId, chunk::BLOCK_END_MAX,
};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

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

/// Kinds of records: 1 and 2 are a writer's, 3 to 6 a maintainer's.
pub(crate) const KIND_COMMIT: u16 = 1;
/// A writer has taken over: no body.
pub(crate) const KIND_TAKEOVER: u16 = 2;
/// Runs were merged, or a shortcut was made.
pub(crate) const KIND_MERGED: u16 = 3;
/// Recovery points are no longer kept.
pub(crate) const KIND_EXPIRED: u16 = 4;
/// Objects of the trash were deleted.
pub(crate) const KIND_SWEPT: u16 = 5;
/// A maintainer has begun, or is still at work. Its `writer` is who may put the three kinds before until another begins.
pub(crate) const KIND_MAINTAINER: u16 = 6;

/// A point is held, or let go. Anybody may put it.
pub(crate) const KIND_HOLD: u16 = 7;

/// Whether only the machine's maintainer may put records of a kind.
pub(crate) const fn is_maintainers(kind: u16) -> bool {
    matches!(kind, KIND_MERGED | KIND_EXPIRED | KIND_SWEPT)
}

/// Why a point does not expire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HoldRecord {
    /// How it is held.
    pub hold: Hold,
    /// Why, for people.
    pub reason: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

/// How a point is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// Somebody wants it kept.
    Pin,
    /// It must be kept, for a court or an auditor.
    Legal,
}

/// The body of a hold; none: the point is let go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HoldBody {
    pub(crate) point: CommitId,
    pub(crate) hold: Option<Hold>,
    pub(crate) reason: String,
}

/// The body of a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CommitBody {
    pub(crate) delta: DeltaId,
    pub(crate) kind: CommitKind,
    pub(crate) disks: Vec<DiskRecord>,
    pub(crate) segments: Vec<SegmentRef>,
}

/// The body of a merge: the maps over all that lies in `(from, to]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MergedBody {
    pub(crate) from: CommitId,
    pub(crate) to: CommitId,
    /// Sorted, not overlapping.
    pub(crate) maps: Vec<SegmentRef>,
    /// The maps replace the runs; none: they are a shortcut over them.
    pub(crate) replaces: Option<Replaces>,
    /// Of maintained objects, the newest id there is.
    pub(crate) newest: SegmentId,
}

/// What a merge that replaces runs leaves behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replaces {
    pub(crate) held: Held,
    /// Segments of the replaced runs of which nothing is held any more.
    pub(crate) dead: Vec<Trashed>,
    /// Content of some of these is needed still, and lies elsewhere now.
    pub(crate) moved: bool,
}

/// The body of an expiry: sorted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExpiredBody {
    pub(crate) points: Vec<CommitId>,
}

/// The body of a maintainer's record. Nothing at all: of nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MaintainerBody {
    /// For whom it works: other ones of the same owner come after it at once.
    pub(crate) owner: [u8; 16],
}

impl MaintainerBody {
    pub(crate) fn decode(body: &[u8]) -> Result<Self, postcard::Error> {
        if body.is_empty() { Ok(Self::default()) } else { postcard::from_bytes(body) }
    }
}

/// The body of a sweep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SweptBody {
    pub(crate) objects: Vec<ObjectName>,
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
