//! What can go wrong with a vault, each with a stable code, a cause and what to do.

use crate::keys::WrappingId;
use highwater_delta::{ChunkError, CommitId, DiskId, GroupId, MachineId};
use highwater_group::Marker;
use std::path::{Path, PathBuf};

/// Why a vault refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The object store failed.
    #[error("the object store failed: {0}")]
    Store(#[source] object_store::Error),
    /// A vault exists where one should be created.
    #[error("there is a vault already")]
    Exists,
    /// There is no vault.
    #[error("there is no vault here (no vault.json)")]
    NotAVault,
    /// The key does not belong to the vault, or `vault.json` was altered.
    #[error("the key does not fit this vault")]
    WrongKey,
    /// A newer format.
    #[error("{object} has format {found}, which this program does not know")]
    Format {
        /// The object.
        object: String,
        /// What it says.
        found: u64,
    },
    /// An object is damaged or was altered.
    #[error("{object} is damaged: {cause}")]
    Corrupt {
        /// The object.
        object: String,
        /// What does not fit.
        cause: String,
    },
    /// An object that must be there is not.
    #[error("{object} is missing")]
    Missing {
        /// The object.
        object: String,
    },
    /// Another writer has taken over the machine.
    #[error("another collector writes for machine {0} now")]
    Fenced(MachineId),
    /// No such machine.
    #[error("machine {0} is not in this vault")]
    UnknownMachine(MachineId),
    /// No such disk.
    #[error("disk {0} is not known of this machine")]
    UnknownDisk(DiskId),
    /// A chunk writes behind the end of its disk.
    #[error("a chunk holds block {block} of disk {disk}, which has only {blocks} blocks")]
    BeyondDisk {
        /// The disk.
        disk: DiskId,
        /// The first block not on it.
        block: u64,
        /// Its size.
        blocks: u64,
    },
    /// A chunk was malformed.
    #[error("a chunk was refused: {0}")]
    Chunk(#[from] ChunkError),
    /// Calls out of order.
    #[error("out of order: {0}")]
    Order(&'static str),
    /// The writer failed before and does nothing any more.
    #[error("this writer failed earlier; whether its last commit was stored has to be read anew")]
    Dead,
    /// The key file.
    #[error("key file {path}: {cause}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// No such recovery point.
    #[error("there is no recovery point {0}")]
    UnknownPoint(CommitId),
    /// What should be recovered to is refused.
    #[error("{path} is refused as a target: {cause}")]
    Target {
        /// The target.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// A local file or device failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A name that cannot be one.
    #[error("bad name: {0}")]
    Name(String),
    /// The store cannot create if absent.
    #[error("the object store overwrites an existing object where it should refuse: {0}")]
    NoCreateIfAbsent(String),
    /// What is stored of a machine has become too much to be kept in memory.
    #[error("what is recorded of machine {machine} takes {bytes} bytes of memory; {bytes_max} are allowed")]
    StateFull {
        /// The machine.
        machine: MachineId,
        /// What it takes, or would take with the commit that was refused.
        bytes: u64,
        /// What it may take.
        bytes_max: u64,
    },
    /// Where a vault should lie.
    #[error("{location} can't be used: {cause}")]
    Location {
        /// As it was written, without what might be secret.
        location: String,
        /// Why.
        cause: String,
    },
    /// Somebody else changed the vault's keys at the same time.
    #[error(
        "the vault's keys were changed by somebody else at the same time; of this change nothing was done"
    )]
    KeysChanged,
    /// What was given is of a kind that opens this vault, but not it.
    #[error("this {0} does not open the vault")]
    WrongSecret(&'static str),
    /// What was given is of a kind that does not open this vault.
    #[error("this vault is not opened by a {wanted}, but by: {has}")]
    NotWrapped {
        /// What was given.
        wanted: &'static str,
        /// What opens it.
        has: String,
    },
    /// Nothing else would open the vault.
    #[error("nothing else opens the vault")]
    LastWrapping,
    /// No such key.
    #[error("no key of the vault has the id {0}")]
    UnknownWrapping(WrappingId),
    /// An external command.
    #[error("key command {command}: {cause}")]
    KeyCommand {
        /// The program, and what it was to do.
        command: String,
        /// What went wrong.
        cause: String,
    },
    /// Something that is no passphrase.
    #[error("the passphrase can't be used: {0}")]
    Passphrase(String),
    /// A vault that was begun.
    #[error(
        "a vault was begun here and not finished, or its vault.json was lost: there are keys, but no vault.json"
    )]
    Unfinished,
    /// Another maintainer has begun with the machine.
    #[error("machine {0} is maintained by another program now")]
    Maintained(MachineId),
    /// A policy, or what should be said of a point.
    #[error("refused: {0}")]
    Policy(String),
    /// The clock here and the store's differ.
    #[error(
        "the clock of this machine and that of the vault's storage are {0} s apart; nothing is expired or erased by such a clock"
    )]
    Clock(u64),
    /// The machine is no more.
    #[error("machine {0} was erased")]
    Erased(MachineId),
    /// The machine must be kept.
    #[error("machine {machine} cannot be erased: {cause}")]
    EraseRefused {
        /// The machine.
        machine: MachineId,
        /// What forbids it.
        cause: String,
    },
    /// What is to open the vault does already.
    #[error("what was given opens the vault already, as key {0}")]
    SameSecret(WrappingId),
    /// A legal hold is taken away by nothing but its release.
    #[error("point {0} is under legal hold already: this would take the place of what is said of that")]
    UnderHold(CommitId),
    /// The bucket is asked to lock objects, and does not.
    #[error("the bucket does not lock objects: {0}")]
    NoObjectLock(String),
    /// A file that should say how far a verification came.
    #[error("{path} does not say how far a verification came: {cause}")]
    ResumeFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// What a file says is of something else.
    #[error("{path} is of another verification: {cause}")]
    ResumeOther {
        /// The file.
        path: PathBuf,
        /// What differs.
        cause: &'static str,
    },
    /// A group that cannot be so.
    #[error("the group is refused: {0}")]
    Group(String),
    /// No such group.
    #[error("group {0} is not in this vault")]
    UnknownGroup(GroupId),
    /// A marker that a machine says it keeps, or learnt the end of.
    #[error("marker {marker} of machine {machine} is refused: {cause}")]
    Marker {
        /// The marker.
        marker: Marker,
        /// Who said so.
        machine: MachineId,
        /// Why.
        cause: &'static str,
    },
    /// Others change groups all the time.
    #[error("groups were changed by somebody else at the same time, again and again; nothing was done")]
    GroupsChanged,
    /// A limit.
    #[error("too many or too large: {0}")]
    Limit(&'static str),
    /// The random number generator or the cipher failed.
    #[error("cryptography failed: {0}")]
    Crypto(&'static str),
}

impl VaultError {
    /// Whether it says that something stored is damaged or missing, and nothing of the store, or of others who are at it.
    #[must_use]
    pub const fn is_damage(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::Missing { .. } | Self::Chunk(_))
    }
    /// Its stable number, shown as `HW-1201`.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Store(_) => 1201,
            Self::Exists => 1202,
            Self::NotAVault => 1203,
            Self::WrongKey => 1204,
            Self::Format { .. } => 1205,
            Self::Corrupt { .. } => 1206,
            Self::Missing { .. } => 1207,
            Self::Fenced(_) => 1208,
            Self::UnknownMachine(_) => 1209,
            Self::UnknownDisk(_) => 1210,
            Self::BeyondDisk { .. } => 1211,
            Self::Chunk(_) => 1212,
            Self::Order(_) => 1213,
            Self::Dead => 1214,
            Self::KeyFile { .. } => 1215,
            Self::UnknownPoint(_) => 1216,
            Self::Target { .. } => 1217,
            Self::Io { .. } => 1218,
            Self::Name(_) => 1219,
            Self::NoCreateIfAbsent(_) => 1220,
            Self::Limit(_) => 1221,
            Self::Crypto(_) => 1222,
            Self::StateFull { .. } => 1223,
            Self::Location { .. } => 1224,
            Self::KeysChanged => 1225,
            Self::WrongSecret(_) => 1226,
            Self::NotWrapped { .. } => 1227,
            Self::LastWrapping => 1228,
            Self::UnknownWrapping(_) => 1229,
            Self::KeyCommand { .. } => 1230,
            Self::Passphrase(_) => 1231,
            Self::Unfinished => 1232,
            Self::Erased(_) => 1233,
            Self::EraseRefused { .. } => 1234,
            Self::Maintained(_) => 1240,
            Self::Policy(_) => 1241,
            Self::Clock(_) => 1242,
            Self::SameSecret(_) => 1235,
            Self::UnderHold(_) => 1243,
            Self::NoObjectLock(_) => 1244,
            Self::ResumeFile { .. } => 1250,
            Self::ResumeOther { .. } => 1251,
            Self::Group(_) => 1260,
            Self::UnknownGroup(_) => 1261,
            Self::Marker { .. } => 1262,
            Self::GroupsChanged => 1263,
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn action(&self) -> &'static str {
        match self {
            Self::Store(_) => {
                "Check that the vault's storage is reachable, writable and not full, and for a bucket its region and credentials (docs/OPERATIONS.md, Where the vault lies); then try again."
            }
            Self::Exists => "Use the existing vault, or choose another place.",
            Self::NotAVault => {
                "Check the vault's address, or create a vault with `highwater-collector init`."
            }
            Self::WrongKey => "Give the key file made together with this vault, or another key of it.",
            Self::Format { .. } => "Upgrade this program to at least the release that wrote the vault.",
            Self::Corrupt { .. } | Self::Missing { .. } => {
                "Bring the object back from a copy of the vault; `highwater vault repair --dry-run` says what is affected, and what can be made anew."
            }
            Self::Fenced(_) => {
                "Nothing, if the machine was moved to another collector; otherwise stop one of both."
            }
            Self::UnknownMachine(_) => "List the machines with `highwater machines`.",
            Self::UnknownDisk(_) => "List the machine's disks with `highwater points MACHINE`.",
            Self::BeyondDisk { .. } | Self::Chunk(_) | Self::Order(_) => {
                "Report this as a defect of the sender, with both versions."
            }
            Self::Dead => "Open a new writer; it continues from what is stored.",
            Self::KeyFile { .. } => {
                "Give a key file made by `highwater-collector init` or `highwater vault key add`, readable by its owner only (chmod 600)."
            }
            Self::UnknownPoint(_) => "List the recovery points with `highwater points MACHINE`.",
            Self::Target { .. } => "Choose another target, or unmount and release this one.",
            Self::Io { .. } => "Check the path, its permissions and the free space.",
            Self::Name(_) => {
                "Use at most 255 bytes, of a key's label 64, without control characters; in names of documents only letters, digits, `.`, `-`, `_` and `/`."
            }
            Self::NoCreateIfAbsent(_) => "Use an object store with conditional puts (create if absent).",
            Self::Limit(_) => "Reduce the number or size; limits are listed in docs/FORMAT.md.",
            Self::StateFull { .. } => {
                "Raise `memory` in collector.toml; it goes on by itself then. What is stored can be recovered as before."
            }
            Self::Location { .. } => {
                "Give a directory, or an address like s3://BUCKET/PREFIX?region=REGION; docs/OPERATIONS.md tells them, and where credentials are looked for."
            }
            Self::KeysChanged => {
                "Look at them with `highwater vault key list`, and do it again if it is still wanted."
            }
            Self::WrongSecret(_) | Self::NotWrapped { .. } => {
                "Give another one that opens this vault: a key file, a passphrase or a key command; `highwater vault key list` tells whoever can open it which there are."
            }
            Self::LastWrapping => "Add another key first (`highwater vault key add`).",
            Self::UnknownWrapping(_) => "List the keys with `highwater vault key list`.",
            Self::KeyCommand { .. } => {
                "Run the command by hand, with `wrap` or `unwrap` behind its arguments; docs/OPERATIONS.md says what it must do."
            }
            Self::Passphrase(_) => {
                "Give one line of at least 12 characters; a file with it must be readable by its owner only (chmod 600)."
            }
            Self::Unfinished => {
                "Bring vault.json back if it was lost; if nothing was ever stored here, delete `keys/` and create the vault again."
            }
            Self::Maintained(_) => {
                "Nothing: what was done until then holds, and the other program goes on with the rest."
            }
            Self::Policy(_) => {
                "See `highwater vault policy show` for what holds now; each tier must be coarser and longer than the one before."
            }
            Self::Clock(_) => {
                "Set the clock of the machine that is wrong (NTP); maintenance goes on by itself then."
            }
            Self::ResumeFile { .. } => {
                "Delete the file, or name another one; the verification then begins anew."
            }
            Self::ResumeOther { .. } => {
                "Go on with what it is of, name another file, or delete it to begin anew."
            }
            Self::Group(_) => {
                "Give another name, machine or time, as the cause says; `highwater group list` shows the groups that there are."
            }
            Self::UnknownGroup(_) => "List the groups with `highwater group list`.",
            Self::Marker { .. } => {
                "Nothing, if the group's members changed just now or the machine was cut off for long; otherwise look at what this machine does."
            }
            Self::GroupsChanged => {
                "Look at them with `highwater group list`, and do it again if it is still wanted."
            }
            Self::Erased(_) => {
                "Enrol it anew, as another machine; what was stored of it cannot be brought back."
            }
            Self::SameSecret(_) => "Give another secret: a new file is made if it is not there.",
            Self::NoObjectLock(_) => {
                "Use a bucket that was made with Object Lock, allow s3:PutObjectRetention, s3:GetObjectRetention and s3:GetBucketObjectLockConfiguration, or take `lock=` out of the vault's address."
            }
            Self::UnderHold(_) => {
                "Nothing: the point is kept already. If the hold is to end, release it first."
            }
            Self::EraseRefused { .. } => "Wait until it may be erased, or have the hold released.",
            Self::Crypto(_) => "Check the system's random number generator, then report this as a defect.",
        }
    }

    /// Whether trying again later, unchanged, can succeed.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Dead | Self::StateFull { .. } | Self::GroupsChanged)
    }

    pub(crate) fn corrupt(object: impl ToString, cause: impl Into<String>) -> Self {
        Self::Corrupt { object: object.to_string(), cause: cause.into() }
    }
    /// The oldest records of a machine were deleted, and nothing says what stood in them.
    pub(crate) fn no_checkpoint(machine: MachineId) -> Self {
        let cause = "the machine's oldest records were deleted, and no checkpoint that replaces them can be read; put one back from a copy of the vault";
        Self::corrupt(crate::store::checkpoint_dir(machine), cause)
    }
    pub(crate) fn target(path: &Path, cause: impl Into<String>) -> Self {
        Self::Target { path: path.to_owned(), cause: cause.into() }
    }
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}

impl From<object_store::Error> for VaultError {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { path, .. } => Self::Missing { object: path },
            other => Self::Store(other),
        }
    }
}
