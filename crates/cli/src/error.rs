//! What a command can fail with, and its exit codes.

use highwater_vault::VaultError;
use std::{io, process::ExitCode};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// Failed.
    Failure = 1,
    /// Arguments that make no sense.
    Usage = 2,
    /// Something stored is damaged or missing.
    Damaged = 3,
    /// The operator did not confirm.
    NotConfirmed = 4,
    /// Stopped by a signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A point that was asked for was not made.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub struct Unmade {
    /// Of whoever found out.
    pub code: u16,
    /// Why not.
    pub cause: String,
    /// What to do about it.
    pub action: String,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Arguments that make no sense.
    #[error("{0}")]
    Usage(String),
    /// Neither option, environment nor configuration tell it.
    #[error("no {0} is given")]
    NotGiven(&'static str),
    /// An address that is none.
    #[error("{0} is no vault that this program can reach")]
    Address(String),
    /// The collector's configuration.
    #[error("{path}: {cause}")]
    Config {
        /// The file.
        path: String,
        /// What is wrong with it.
        cause: String,
    },
    /// No machine, or more than one.
    #[error("{0}")]
    Machine(String),
    /// No such disk at this point, or a choice is needed.
    #[error("{0}")]
    Disk(String),
    /// No such point.
    #[error("{0}")]
    Point(String),
    /// No group, or more than one.
    #[error("{0}")]
    Group(String),
    /// No point.
    #[error("the point was not made: {0}")]
    Unmade(#[from] Unmade),
    /// The operator did not confirm.
    #[error("{0}")]
    NotConfirmed(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Some machine could not be read.
    #[error("{0} of the machines failed, or cannot be read")]
    Unreadable(usize),
    /// Standard output or a file.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The vault.
    #[error("{0}")]
    Vault(#[from] VaultError),
}

impl CliError {
    /// Its stable number.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Usage(_) => 1501,
            Self::NotGiven(_) => 1502,
            Self::Address(_) => 1503,
            Self::Config { .. } => 1504,
            Self::Machine(_) => 1505,
            Self::Disk(_) => 1506,
            Self::Point(_) => 1507,
            Self::NotConfirmed(_) => 1508,
            Self::Interrupted => 1509,
            Self::Unreadable(_) => 1510,
            Self::Io(_) => 1511,
            Self::Unmade(unmade) => unmade.code,
            Self::Group(_) => 1516,
            Self::Vault(error) => error.code(),
        }
    }
    /// What to do about it.
    #[must_use]
    pub fn action(&self) -> &str {
        match self {
            Self::Usage(_) => "See `highwater --help`.",
            Self::NotGiven(_) => {
                "Give --vault and one of --key-file, --passphrase, --passphrase-file and --key-command, or HIGHWATER_VAULT and HIGHWATER_KEY, or run it on the collector."
            }
            Self::Address(_) => "Give the path of an existing vault directory, or the address of a bucket.",
            Self::Config { .. } => "Correct the file, or give --vault and --key-file.",
            Self::Machine(_) => {
                "List the machines with `highwater machines`; give an id or more of its digits."
            }
            Self::Disk(_) => "List the points and their disks with `highwater points MACHINE`.",
            Self::Point(_) => "List the recovery points with `highwater points MACHINE`.",
            Self::NotConfirmed(_) => "Give --yes if the plan is right.",
            Self::Interrupted => {
                "Run it again: what was done holds. Of a recovery, a file begins anew and a device gets what it lacks; a verification goes on with --resume."
            }
            Self::Unreadable(_) => "Run `highwater verify` to see what is damaged.",
            Self::Io(_) => "Check the path, its permissions and the free space.",
            Self::Group(_) => {
                "List the groups with `highwater group list`; give an id or more of its digits."
            }
            Self::Unmade(unmade) => &unmade.action,
            Self::Vault(error) => error.action(),
        }
    }
    /// How a command that failed so ends.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) | Self::NotGiven(_) => Exit::Usage,
            Self::NotConfirmed(_) => Exit::NotConfirmed,
            Self::Interrupted => Exit::Interrupted,
            Self::Vault(error) if error.is_damage() => Exit::Damaged,
            _ => Exit::Failure,
        }
    }
    /// Whether the reader of the output went away.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
