//! What can go wrong in a collector, each with a stable code, a cause and what to do.

use crate::access;
use crate::config::Problem;
use highwater_delta::{DeltaId, DiskId, MachineId};
use highwater_vault::VaultError;
use highwater_wire::{WireError, message::Refusal};
use std::io::ErrorKind;
use std::path::PathBuf;

/// Why a collector refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// Of the session or an identity.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Of the vault.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The hello names another machine than the certificate.
    #[error("the hello names machine {hello}, the certificate {certificate}")]
    OtherMachine {
        /// As the hello says.
        hello: MachineId,
        /// As the certificate says.
        certificate: MachineId,
    },
    /// A disk of another machine.
    #[error("disk {0} belongs to another machine")]
    OtherMachinesDisk(DiskId),
    /// More bytes under way than granted.
    #[error("more than the granted {0} bytes were under way")]
    Window(u64),
    /// A chunk or an end of a delta that is not open.
    #[error("delta {0} is not open")]
    NotOpen(DeltaId),
    /// A second delta before the first was closed.
    #[error("delta {0} is still open")]
    StillOpen(DeltaId),
    /// Chunks were lost.
    #[error("delta {delta}: {sent} chunks sent, {received} received")]
    Count {
        /// The delta.
        delta: DeltaId,
        /// As the agent says.
        sent: u64,
        /// As counted.
        received: u64,
    },
    /// Replaced by a newer session.
    #[error("a newer session of this machine has begun")]
    Replaced,
    /// The older session does not end.
    #[error("an older session of this machine is still writing")]
    Busy,
    /// Too much at once.
    #[error("the collector is at its limit: {0}")]
    Full(&'static str),
    /// Going down.
    #[error("the collector is shutting down")]
    ShuttingDown,
    /// Not a message for now.
    #[error("an unexpected message: {0}")]
    Unexpected(&'static str),
    /// A disk list that cannot be one.
    #[error("the list of disks is unusable: {0}")]
    Disks(&'static str),
    /// Configuration.
    #[error("{path}: {}", list(problems))]
    Config {
        /// The file.
        path: PathBuf,
        /// All that is wrong.
        problems: Vec<Problem>,
    },
    /// There is no configuration, or it cannot be read.
    #[error("cannot read {path}: {source}")]
    ConfigUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Under which nobody can be reached.
    #[error("{0}")]
    Name(String),
    /// Something is where a vault should be made.
    #[error("{0} is not empty")]
    NotEmpty(PathBuf),
    /// A port cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Something to be made exists.
    #[error("{0} exists already")]
    Exists(PathBuf),
    /// No or another token.
    #[error("the enrolment token is not valid")]
    TokenInvalid,
    /// Used.
    #[error("the enrolment token has been used")]
    TokenUsed,
    /// Expired.
    #[error("the enrolment token has expired")]
    TokenExpired,
    /// The enrolment request is malformed.
    #[error("the enrolment request is malformed: {0}")]
    BadRequest(String),
    /// A new certificate was asked for too early.
    #[error("more than half of the certificate's validity is left")]
    RenewalNotDue,
    /// A new certificate could not be valid for longer.
    #[error("the vault's authority expires with the certificate")]
    AuthorityExpires,
    /// The session's certificate is not valid any more.
    #[error("the machine's certificate has expired")]
    CertificateExpired,
    /// What an operator called a machine.
    #[error("{0:?} is no machine: {1}")]
    NoSuchMachine(String, &'static str),
    /// A relay's certificate is not valid any more.
    #[error("the relay's certificate has expired")]
    RelayExpired,
    /// What an operator called a relay.
    #[error("{0:?} is no relay: {1}")]
    NoSuchRelay(String, &'static str),
    /// A file with a token.
    #[error("the enrolment token cannot be read from {from}: {cause}")]
    TokenUnreadable {
        /// Where it should be.
        from: String,
        /// Why.
        cause: String,
    },
    /// More than a machine may do.
    #[error("the machine exceeds what it may do: {0}")]
    Quota(&'static str),
    /// Who is revoked has not been readable for too long.
    #[error("which machines are revoked cannot be read from the vault")]
    RevocationsUnknown,
    /// A comparison needs more memory than one machine may take.
    #[error("comparing the disk takes {bytes} bytes of memory; one machine may take {bytes_max}")]
    MapTooLarge {
        /// What it takes.
        bytes: u64,
        /// What it may take.
        bytes_max: u64,
    },
    /// An open delta that nothing was added to.
    #[error("delta {0} was open for too long without progress")]
    DeltaIdle(DeltaId),
    /// An open delta that hardly anything was added to.
    #[error("delta {0} grew too slowly while others waited for its memory")]
    DeltaSlow(DeltaId),
    /// Soon a machine's commits will be refused.
    #[error(
        "what is recorded of machine {machine} takes {bytes} of the {bytes_max} bytes of memory that it may"
    )]
    NearlyFull {
        /// The machine.
        machine: MachineId,
        /// What it takes.
        bytes: u64,
        /// What it may take.
        bytes_max: u64,
    },
    /// The cache cannot be had.
    #[error("the cache in {path} cannot be used: {source}")]
    CacheUnusable {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The cache's disk.
    #[error("the cache failed while {doing}: {source}")]
    CacheFailed {
        /// What was done.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Something else came back than was put there.
    #[error("the cache is damaged: {0}")]
    CacheDamaged(&'static str),
    /// A verification found damage.
    #[error("{0} problem(s) were found in the vault")]
    VaultDamaged(usize),
    /// What the next process would go on with.
    #[error("what the next start goes on with cannot be kept in `state-dir`: {0}")]
    StateNotKept(String),
    /// What a machine says of a marker.
    #[error(transparent)]
    Marker(VaultError),
    /// Where a machine says that it is reached.
    #[error("machine {0} says that it is reached where nothing can be")]
    Address(MachineId),
    /// A machine was to be asked for a point.
    #[error("machine {0} cannot be asked for a point now")]
    NotAsked(MachineId),
    /// The session ended meanwhile.
    #[error("the session of machine {0} ended before it answered")]
    SessionEnded(MachineId),
    /// No answer.
    #[error("machine {0} was asked, and did not say in time what came of it")]
    NoAnswer(MachineId),
    /// A control document of the vault is unusable.
    #[error("the vault's document {0} is missing or unusable")]
    Document(String),
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ")
}

impl CollectorError {
    /// Stable number, shown as `HW-1234`.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Wire(error) => error.code(),
            Self::Vault(error) => error.code(),
            Self::OtherMachine { .. } => 1301,
            Self::OtherMachinesDisk(_) => 1302,
            Self::Window(_) => 1303,
            Self::NotOpen(_) => 1304,
            Self::StillOpen(_) => 1305,
            Self::Count { .. } => 1306,
            Self::Replaced => 1307,
            Self::Busy => 1308,
            Self::Full(_) => 1309,
            Self::ShuttingDown => 1310,
            Self::Unexpected(_) => 1311,
            Self::Disks(_) => 1312,
            Self::Config { .. } => 1313,
            Self::Listen { .. } => 1314,
            Self::Exists(_) => 1315,
            Self::TokenInvalid => 1320,
            Self::TokenUsed => 1321,
            Self::TokenExpired => 1322,
            Self::BadRequest(_) => 1323,
            Self::Document(_) => 1324,
            Self::RenewalNotDue => 1325,
            Self::AuthorityExpires => 1326,
            Self::CertificateExpired => 1327,
            Self::NoSuchMachine(..) => 1328,
            Self::Quota(_) => 1329,
            Self::RevocationsUnknown => 1330,
            Self::Name(_) => 1331,
            Self::NotEmpty(_) => 1332,
            Self::ConfigUnreadable { .. } => 1333,
            Self::MapTooLarge { .. } => 1334,
            Self::DeltaIdle(_) => 1335,
            Self::DeltaSlow(_) => 1336,
            Self::NearlyFull { .. } => 1337,
            Self::NoSuchRelay(..) => 1338,
            Self::TokenUnreadable { .. } => 1339,
            Self::RelayExpired => 1340,
            Self::CacheUnusable { .. } => 1350,
            Self::CacheFailed { .. } => 1351,
            Self::CacheDamaged(_) => 1352,
            Self::VaultDamaged(_) => 1360,
            Self::StateNotKept(_) => 1361,
            Self::Marker(_) => 1370,
            Self::Address(_) => 1372,
            Self::NotAsked(_) => 1373,
            Self::SessionEnded(_) => 1374,
            Self::NoAnswer(_) => 1375,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn action(&self) -> String {
        match self {
            Self::Wire(error) => return error.action(),
            Self::Vault(VaultError::Io { path, source }) if source.kind() == ErrorKind::PermissionDenied => {
                return access::advice(path);
            }
            Self::Vault(VaultError::KeyFile { path, .. }) | Self::ConfigUnreadable { path, .. }
                if access::is_denied(path) =>
            {
                return access::advice(path);
            }
            Self::Vault(error) | Self::Marker(error) => return error.action().to_owned(),
            Self::ConfigUnreadable { source, .. } if source.kind() == ErrorKind::NotFound => {
                "make one with `highwater-collector init`, or say with --config where it is"
            }
            Self::ConfigUnreadable { .. } => "say with --config where the configuration is",
            Self::Name(_) => "give the name or address under which agents reach this collector, with --name",
            Self::NotEmpty(_) => "choose an empty directory for the vault, or one that does not exist yet",
            Self::OtherMachine { .. } => "enrol the machine again; do not copy identities between machines",
            Self::OtherMachinesDisk(_) => {
                "if the agent's state was copied from another machine, unprotect the disk here and protect it anew"
            }
            Self::Window(_) | Self::NotOpen(_) | Self::StillOpen(_) | Self::Unexpected(_) | Self::Disks(_) => {
                "check that agent and collector are releases that belong together"
            }
            Self::Count { .. } | Self::DeltaIdle(_) | Self::DeltaSlow(_) => "the delta is sent anew by itself",
            Self::MapTooLarge { .. } => "raise `memory` in collector.toml; the disk is compared by itself then",
            Self::NearlyFull { .. } => {
                "raise `memory` in collector.toml before it is all taken: then the machine's commits are refused (HW-1223)"
            }
            Self::Replaced => "nothing, if the agent was restarted; otherwise look for a second agent with this identity",
            Self::Busy | Self::ShuttingDown => "the connection is tried again by itself",
            Self::Full(_) => "raise the limits in collector.toml, or spread the machines over more collectors",
            Self::Config { .. } => "correct the file; `highwater-collector config check` tells all that is wrong with it",
            Self::Listen { .. } => "see what else uses the port, or choose another one in collector.toml",
            Self::Exists(_) => "nothing was changed; choose another place, or go on with what lies there",
            Self::TokenInvalid | Self::TokenUsed | Self::TokenExpired => {
                "create a new token with `highwater-collector token create`"
            }
            Self::BadRequest(_) => "check that agent and collector are releases that belong together",
            Self::RenewalNotDue => "check the clock of the machine; it is asked again by itself",
            Self::AuthorityExpires => "see docs/OPERATIONS.md, \"Certificates\"",
            Self::CertificateExpired => {
                "nothing, if the machine has a newer certificate; otherwise enrol it again with a token made by \
                 `highwater-collector token create --machine MACHINE`"
            }
            Self::RelayExpired => {
                "let the relay join again, with a token made by `highwater-collector relay token --relay RELAY`"
            }
            Self::NoSuchRelay(..) => "`highwater-collector relay list` shows all relays and their ids",
            Self::TokenUnreadable { .. } => "give it in a file (--token-file), on standard input (-) or in HIGHWATER_TOKEN",
            Self::NoSuchMachine(..) => "`highwater-collector machine list` shows all machines and their ids",
            Self::Quota(_) => {
                "look at what this machine does; if it is right, raise the limits in collector.toml"
            }
            Self::RevocationsUnknown => {
                "look into the collector's log: it names what it cannot read; agents come back by themselves"
            }
            Self::CacheUnusable { path, source } if source.kind() == ErrorKind::PermissionDenied => {
                return access::advice(path);
            }
            Self::CacheUnusable { .. } => "give another directory as `cache` in collector.toml, or none: it only makes a slow store bearable",
            Self::CacheFailed { .. } => {
                "make room or replace the disk of `cache`; nothing is lost, and machines wait for the store as without a cache"
            }
            Self::CacheDamaged(_) => {
                "replace the disk of `cache`; nothing of it came into the vault, and what was lost is sent again by itself"
            }
            Self::VaultDamaged(_) => {
                "`highwater vault repair --dry-run` says what is lost and what can be made anew; put damaged objects back from a copy of the vault, if there is one"
            }
            Self::StateNotKept(_) => {
                "make `state-dir` a directory of a local disk that the collector can write to; until then each start begins the verification of the vault anew, and leaves its maintenance for a quarter of an hour"
            }
            Self::Address(_) => "correct where the machine says that it is reached, in its agent.toml",
            Self::NoAnswer(_) => {
                "see with `highwater group show` who is waited for, that the agents run and are connected (`highwater-agent status`), and ask again"
            }
            Self::NotAsked(_) | Self::SessionEnded(_) => {
                "see that the machine's agent runs and is connected (`highwater-agent status`), and ask again"
            }
            Self::Document(_) => "bring the vault back from a copy, or create it anew with `highwater-collector init`",
        }
        .to_owned()
    }

    /// Whether trying again later, unchanged, can succeed.
    #[must_use]
    pub const fn retry(&self) -> bool {
        match self {
            Self::Wire(error) => error.retry(),
            Self::Vault(error) => error.is_retryable() || matches!(error, VaultError::Fenced(_)),
            Self::Count { .. }
            | Self::Busy
            | Self::Full(_)
            | Self::ShuttingDown
            | Self::RenewalNotDue
            | Self::CertificateExpired
            | Self::RelayExpired
            | Self::RevocationsUnknown
            | Self::MapTooLarge { .. }
            | Self::DeltaIdle(_)
            | Self::DeltaSlow(_)
            | Self::CacheFailed { .. }
            | Self::CacheDamaged(_)
            | Self::NotAsked(_)
            | Self::SessionEnded(_)
            | Self::NoAnswer(_)
            | Self::Quota(_) => true,
            _ => false,
        }
    }

    /// As a refusal that ends the session.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        // A cause may quote what the peer sent; it stays within the limit of a refusal.
        let cause: String = self.to_string().chars().take(1000).collect();
        Refusal { code: self.code(), cause, action: self.action(), retry: self.retry(), fatal: true }
    }
}
