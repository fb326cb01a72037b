//! Recovery points and what a commit is: declared by the agent, kept by the vault.

use crate::{BlockHash, DiskId};
use serde::{Deserialize, Serialize};

/// What a commit is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitKind {
    /// Progress only: stored, but no state that may be offered for recovery.
    Partial,
    /// A recovery point.
    Point(PointInfo),
}

/// A recovery point as the agent declares it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointInfo {
    /// What the state is consistent with.
    pub consistency: Consistency,
    /// When the marker lay, by the machine's clock, in milliseconds since 1970.
    pub taken_at_ms: u64,
    /// How long filesystems were frozen, in microseconds; 0 if they were not.
    pub freeze_us: u64,
    /// The disks that the point covers, with their sizes at the marker.
    pub disks: Vec<PointDisk>,
}

/// A disk within a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// The disk.
    pub disk: DiskId,
    /// Its size at the marker.
    pub size_bytes: u64,
}

/// How consistent a recovery point is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// As after a power cut.
    Crash,
    /// Filesystems were frozen.
    Filesystem,
    /// Filesystems were frozen after the applications' own hooks.
    Application,
}

/// What the vault holds of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredBlock {
    /// Never written to the vault.
    Absent,
    /// Known to be all zeros.
    Zero,
    /// Content with this hash.
    Data(BlockHash),
}
