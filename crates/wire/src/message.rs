//! What an agent and a collector say to each other on port 9443.
//!
//! A control message is one frame with a postcard body (see [`crate::frame`]); chunks travel in frames of their own
//! kind, so that payload is never copied through an encoder. `docs/PROTOCOL.md` tells the order in which messages
//! may come.

use crate::roster::SignedRoster;
use highwater_delta::{
    BlockRange, CommitId, CommitKind, DeltaId, DiskId, GroupId, HashKey, MachineId, StoredBlock, VaultId,
};
use highwater_group::{Kind, Marker};
use serde::{Deserialize, Serialize};

/// Most disks of one machine.
pub const MAX_DISKS: usize = 256;
/// Most bytes of any name (host, disk, version).
pub const MAX_NAME_BYTES: usize = 255;
/// Most blocks that one [`AgentMessage::Hashes`] may ask for.
pub const MAX_HASH_BLOCKS: u64 = 8192;

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// First message of a session.
    Hello(Hello),
    /// The machine's disks, complete: sent after the welcome and whenever something about them changes. Registers
    /// new disks; a disk id that belongs to another machine is refused.
    Disks(Vec<DiskInfo>),
    /// Opens a delta. One is open at a time; earlier ones may still wait for `Stored`.
    DeltaBegin(DeltaId),
    /// Closes the open delta: everything sent since its begin becomes durable at once, or not at all.
    DeltaCommit(DeltaCommit),
    /// Throws the open delta away.
    DeltaAbort(DeltaId),
    /// Asks for the hashes of what the vault holds of a disk at its last commit.
    Hashes {
        /// One of this machine's disks.
        disk: DiskId,
        /// At most [`MAX_HASH_BLOCKS`].
        range: BlockRange,
    },
    /// Keeps the session alive; answered by a pong with the same number.
    Ping(u64),
    /// The agent closes the session on purpose.
    Goodbye,
    /// Asks for a new certificate for this machine. From version 2 on.
    Renew {
        /// Signing request for a new key. It names nobody, or this machine.
        csr_pem: String,
    },
    /// Where the other members of a group reach this machine. From version 3 on, as all that follow.
    Reachable(Reachable),
    /// A marker is kept as a recovery point of this machine, which is stored.
    Kept(Kept),
    /// This machine learnt that a marker came to nothing. If it is a point of the group already, it stays one.
    Withdrawn {
        /// Of this group.
        group: GroupId,
        /// Which.
        marker: Marker,
    },
    /// A marker that this machine coordinated has ended.
    MarkerEnded {
        /// Of this group.
        group: GroupId,
        /// Which.
        marker: Marker,
        /// What was to be frozen.
        kind: Kind,
        /// Why it came to nothing; none: every member keeps it.
        failed: Option<String>,
    },
    /// Answer to [`CollectorMessage::PointWanted`].
    Answer {
        /// Its number.
        request: u64,
        /// What came of it.
        answer: PointAnswer,
    },
}

/// See [`AgentMessage::Reachable`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reachable {
    /// Name or address; none: the one that the session comes from.
    pub host: Option<String>,
    /// The port.
    pub port: u16,
}

/// See [`AgentMessage::Kept`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Of this group.
    pub group: GroupId,
    /// Of this roster: every member of it must keep the marker.
    pub epoch: u64,
    /// Which.
    pub marker: Marker,
    /// What was to be frozen.
    pub kind: Kind,
    /// The machine's recovery point.
    pub commit: CommitId,
    /// When that was taken, by the machine's clock, in milliseconds since 1970: after a vault was restored, another point has its number.
    pub taken_at_ms: u64,
}

/// What came of a point that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PointAnswer {
    /// A recovery point of the machine.
    Point(CommitId),
    /// Every member keeps this marker.
    Marker(Marker),
    /// None.
    Failed(Refusal),
}

/// From the collector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CollectorMessage {
    /// Answer to the hello.
    Welcome(Welcome),
    /// So many chunks of this delta have been taken over; their bytes are given back to the window.
    Received {
        /// The delta.
        delta: DeltaId,
        /// Chunks since its begin, cumulative.
        chunks: u64,
    },
    /// The delta is durable in the vault.
    Stored {
        /// The delta.
        delta: DeltaId,
        /// Its commit.
        commit: CommitId,
    },
    /// Answer to [`AgentMessage::Hashes`].
    Hashes {
        /// The disk asked for.
        disk: DiskId,
        /// The range asked for.
        range: BlockRange,
        /// One entry a block, in order.
        blocks: Vec<StoredBlock>,
    },
    /// Answer to a ping.
    Pong(u64),
    /// Something was refused. A fatal one is followed by the end of the session.
    Refused(Refusal),
    /// Answer to [`AgentMessage::Renew`]. From version 2 on.
    Renewed {
        /// The machine's new certificate. The one of this session stays valid until it expires.
        cert_pem: String,
    },
    /// The other answer to [`AgentMessage::Renew`]; the session goes on. From version 2 on.
    NotRenewed(Refusal),
    /// The group that the machine belongs to, or none; after the welcome, and whenever it changes. From version 3 on, as all that follow.
    Group(Option<SignedRoster>),
    /// A recovery point is wanted now; answered by [`AgentMessage::Answer`].
    PointWanted {
        /// Chosen by the collector.
        request: u64,
        /// Of this group, or of the machine alone.
        group: Option<GroupId>,
        /// With the applications' hooks.
        application: bool,
    },
}

/// Who calls, and what it speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Must be the machine named by the client's certificate.
    pub machine: MachineId,
    /// Lowest protocol version spoken.
    pub version_min: u16,
    /// Highest protocol version spoken.
    pub version_max: u16,
    /// The agent's own version, for people.
    pub agent_version: String,
    /// For people.
    pub host_name: String,
    /// Bytes of the kernel release, for people.
    pub kernel: String,
}

/// What the collector grants and knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version both speak.
    pub version: u16,
    /// Whose vault stands behind it.
    pub vault: VaultId,
    /// Key for this machine's block hashes.
    pub hash_key: HashKey,
    /// Bytes of chunks that may be under way and not yet received.
    pub window_bytes: u64,
    /// The machine's last commit, [`CommitId::NONE`] if there is none.
    pub last_commit: CommitId,
    /// The disks that the vault knows of this machine.
    pub disks: Vec<DiskId>,
}

/// A disk as the agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Given at protection.
    pub disk: DiskId,
    /// For people: `sda`, `vg0/data`.
    pub name: String,
    /// Its size now.
    pub size_bytes: u64,
}

/// The end of a delta.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaCommit {
    /// The open delta.
    pub delta: DeltaId,
    /// Chunks sent since its begin; a different count at the collector refuses the commit.
    pub chunks: u64,
    /// What the state after this delta is.
    pub kind: CommitKind,
}

/// A refusal: a stable code, its cause, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Stable number, shown as `HW-1234`.
    pub code: u16,
    /// What is wrong, for people.
    pub cause: String,
    /// What to do about it.
    pub action: String,
    /// Whether trying again later, unchanged, can succeed.
    pub retry: bool,
    /// Whether the session ends with it.
    pub fatal: bool,
}
