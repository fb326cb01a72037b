//! What `highwater-agent status` knows. The JSON form is a contract: fields are added, never renamed or removed.

use crate::units::Bandwidth;
use highwater_delta::{CommitId, Consistency, DiskId, MachineId};
use serde::{Deserialize, Serialize};

/// How everything stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StatusReport {
    /// The agent's version.
    pub agent_version: String,
    /// The agent's process.
    pub pid: u32,
    /// Since when it runs, ms since 1970.
    pub started_at_ms: u64,
    /// When all this was so, ms since 1970: some time ago if the agent is busy sending.
    #[serde(default)]
    pub as_of_ms: u64,
    /// The machine; none before enrolment.
    pub machine: Option<MachineId>,
    /// The connection.
    pub collector: CollectorStatus,
    /// The last recovery point that is stored.
    pub last_point: Option<PointStatus>,
    /// When the next one is due, ms since 1970.
    pub next_point_at_ms: Option<u64>,
    /// The bandwidth limit in force.
    pub bandwidth: Bandwidth,
    /// The guardian's process, if it is well.
    pub guardian_pid: Option<u32>,
    /// The protected disks.
    pub disks: Vec<DiskStatus>,
    /// Write-ordered capture.
    #[serde(default)]
    pub capture: CaptureStatus,
    /// The replication group that the machine belongs to.
    #[serde(default)]
    pub group: Option<crate::group::GroupStatus>,
    /// Guests of this KVM host, as configured.
    #[serde(default)]
    pub guests: Vec<GuestStatus>,
    /// What the operator should know, worst first.
    pub notes: Vec<String>,
}

/// A guest of this KVM host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestStatus {
    /// As configured.
    pub name: String,
    /// When it was last to be frozen for a point, ms since 1970; none: not since the agent began.
    pub frozen_at_ms: Option<u64>,
    /// Why it did not stand still then, and what to do: the point is only crash-consistent for its disks.
    pub trouble: Option<String>,
}

/// Write-ordered capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CaptureStatus {
    /// All disks are in write-ordered mode.
    pub active: bool,
    /// Writes are captured, and what is pending is read: it is being entered.
    #[serde(default)]
    pub entering: bool,
    /// When it is entered again, if it was left, ms since 1970.
    #[serde(default)]
    pub retry_at_ms: Option<u64>,
    /// Why they never are on this machine; none if they can be.
    pub unavailable: Option<String>,
    /// How often it was left or could not be entered, by kind.
    pub left: std::collections::BTreeMap<String, u64>,
    /// Why it was left last.
    pub last_left: Option<String>,
    /// When that was, ms since 1970.
    pub last_left_at_ms: Option<u64>,
    /// What to do about it.
    #[serde(default)]
    pub last_left_action: Option<String>,
    /// Size of the ring; 0 if there is none.
    pub ring_bytes: u64,
    /// Of it in use now.
    pub ring_filled_bytes: u64,
    /// Most memory of what is held of the stream beside the ring.
    pub buffer_bytes: u64,
    /// Of it in use now.
    pub buffered_bytes: u64,
    /// Payload captured since the stream began.
    pub captured_bytes: u64,
    /// What was left of it after coalescing between points.
    pub coalesced_bytes: u64,
    /// Records of changes since the stream began.
    pub writes: u64,
    /// Records that the stream lacked, since the programs were loaded.
    pub lost_records: u64,
    /// Events that single copies of the program missed (others saw them).
    pub misses: u64,
    /// Copies of the program.
    pub copies: u32,
    /// Blocks written in part whose rest was read from the disk.
    pub completed_blocks: u64,
    /// Blocks with two writes to one sector in flight.
    pub overlaps: u64,
    /// Blocks that wait to be read again.
    pub doubtful_blocks: u64,
    /// When the next point of the stream is due, ms since 1970.
    pub next_point_at_ms: Option<u64>,
}

/// The connection to the collector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CollectorStatus {
    /// Where it is.
    pub endpoint: Option<String>,
    /// How the connection stands.
    pub state: ConnectionState,
    /// Since when, ms since 1970.
    pub since_ms: u64,
    /// Failures in a row.
    pub failures: u32,
    /// When it is tried again, ms since 1970.
    pub retry_at_ms: Option<u64>,
    /// The last error.
    pub last_error: Option<String>,
}

/// How the connection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectionState {
    /// This machine has no certificate yet.
    #[default]
    NotEnrolled,
    /// Being made.
    Connecting,
    /// In use.
    Connected,
    /// Waiting before the next try.
    BackingOff,
    /// Refused for good: an operator must act.
    Critical,
}

/// A recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PointStatus {
    /// Its commit.
    pub id: CommitId,
    /// When its marker lay, ms since 1970.
    pub taken_at_ms: u64,
    /// How old it is.
    pub age_ms: u64,
    /// What it is consistent with.
    pub consistency: Consistency,
    /// How long filesystems were frozen for it.
    pub freeze_us: u64,
}

/// A disk's state, as the design names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// The first copy is under way.
    InitialReplication,
    /// Replicated in the order of its writes.
    WriteOrdered,
    /// Replicated in rounds.
    Bitmap,
    /// Must be compared with the vault.
    ResyncRequired,
    /// Is being compared with the vault.
    Resynchronizing,
    /// Writes may have been missed.
    Suspect,
    /// Stopped by an operator.
    Paused,
    /// Its copy has taken over.
    FailedOver,
    /// Something an operator must see to.
    Error,
}

impl DiskState {
    /// All of them, for metrics.
    pub const ALL: [Self; 9] = [
        Self::InitialReplication,
        Self::WriteOrdered,
        Self::Bitmap,
        Self::ResyncRequired,
        Self::Resynchronizing,
        Self::Suspect,
        Self::Paused,
        Self::FailedOver,
        Self::Error,
    ];
    /// As it is written everywhere.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InitialReplication => "initial-replication",
            Self::WriteOrdered => "write-ordered",
            Self::Bitmap => "bitmap",
            Self::ResyncRequired => "resync-required",
            Self::Resynchronizing => "resynchronizing",
            Self::Suspect => "suspect",
            Self::Paused => "paused",
            Self::FailedOver => "failed-over",
            Self::Error => "error",
        }
    }
}

impl std::fmt::Display for DiskState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A protected disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// Its id.
    pub id: DiskId,
    /// For people.
    pub name: String,
    /// Where it is now; none if it is absent.
    pub path: Option<String>,
    /// What it is known by.
    pub identity: String,
    /// Its size.
    pub size_bytes: u64,
    /// Its state.
    pub state: DiskState,
    /// Why.
    pub reason: Option<String>,
    /// Since when, ms since 1970.
    pub since_ms: u64,
    /// Written since the last epoch's end.
    pub dirty_bytes: u64,
    /// Of earlier epochs, and not stored yet.
    pub pending_bytes: u64,
    /// While the first copy or a comparison runs.
    pub progress: Option<Progress>,
    /// Bytes written per second lately.
    pub churn_bytes_per_s: u64,
    /// The tracker's account beside the kernel's.
    pub tracker: TrackerStatus,
    /// Swap areas that are not copied.
    pub swap_bytes: u64,
    /// Whether a mounted filesystem lies on it; points of a disk without one are rarer.
    pub has_filesystem: bool,
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// Done.
    pub done_bytes: u64,
    /// Of so many.
    pub total_bytes: u64,
    /// Lately.
    pub bytes_per_s: u64,
    /// At this rate; none if it stands still.
    pub eta_s: Option<u64>,
}

/// The tracker's account of a disk beside the kernel's, since tracking began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrackerStatus {
    /// Writes seen by the tracker.
    pub writes: u64,
    /// Sectors written, by the tracker.
    pub sectors_written: u64,
    /// Sectors discarded, by the tracker.
    pub sectors_discarded: u64,
    /// Sectors written, by the kernel; nothing if the device cannot be asked now.
    pub kernel_sectors_written: Option<u64>,
    /// Sectors discarded, by the kernel; as above.
    pub kernel_sectors_discarded: Option<u64>,
    /// Events that a copy of the program missed (others saw them).
    pub misses: u64,
    /// Copies of each program attached.
    pub copies: u32,
}
