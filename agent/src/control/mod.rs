//! Local control: `highwater-agent status` and its sisters speak to the running agent over a unix socket.
//!
//! One JSON document a line, a request and its response in turn. Only root (and the agent's own user) may connect: the
//! socket is 0600 in a directory of the agent's, and the peer's credentials are checked as well. A request line is at
//! most 64 KiB; connections are few and time out, so that a stuck client costs nothing.

mod client;
mod desk;
mod render;
mod server;
pub mod status;

pub use client::call;
pub use desk::{Ask, Board, Desk, Work};
pub use render::render;
pub use server::{bind, is_served, serve};
pub use status::StatusReport;

use crate::{
    error::{Coded, OperatorError},
    units::{Bandwidth, ByteSize},
};
use highwater_delta::CommitId;
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf};

/// The socket's name in the run directory.
pub const SOCKET_NAME: &str = "control.sock";
/// Longest request line.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// Longest response line; a status of 256 disks is a tenth of it.
pub const RESPONSE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How everything stands.
    Status,
    /// Protect a disk.
    Protect {
        /// Any path that leads to it.
        path: PathBuf,
        /// For people; by default the kernel's name for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Stop protecting a disk. Its recovery points stay.
    Unprotect {
        /// Its id, its name or a path.
        disk: String,
    },
    /// Take a recovery point now.
    Point {
        /// Hooks make the applications stand still for it.
        #[serde(default)]
        application: bool,
    },
    /// Change the bandwidth limit until the next restart.
    SetBandwidth {
        /// Per second.
        bandwidth: Bandwidth,
    },
    /// Compare a disk with the vault and send what differs.
    ResyncNow {
        /// Its id, its name or a path.
        disk: String,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Response {
    /// To `Status`.
    Status(Box<StatusReport>),
    /// To `Protect`.
    Protected {
        /// The disk's id from now on.
        disk: String,
        /// Its name.
        name: String,
        /// Its size.
        size_bytes: ByteSize,
        /// What it will be known by.
        identity: String,
        /// What the operator should know about it (a weak identity, no filesystem, …).
        #[serde(default)]
        notes: Vec<String>,
    },
    /// To anything else that was done or begun.
    Done {
        /// What, as a sentence.
        message: String,
        /// The recovery point that was stored, if that was asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        point: Option<CommitId>,
    },
    /// It was not done.
    Error(OperatorError),
}

fn refused(cause: &str) -> Response {
    let action = "Use `highwater-agent` of the agent's own version, and look into its log.".into();
    Response::Error(OperatorError { code: 1444, cause: cause.into(), action })
}

/// Why the agent cannot be controlled.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no agent answers at {path}")]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another agent has the socket.
    #[error("another agent is running: it answers at {path}")]
    AlreadyRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen at {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the agent broke off the conversation")]
    Broken(#[source] io::Error),
    /// It said something else than a response.
    #[error("the agent's answer is not understood: {0}")]
    Garbled(String),
}

impl Coded for ControlError {
    fn code(&self) -> u16 {
        match self {
            Self::NotRunning { .. } => 1440,
            Self::AlreadyRunning { .. } => 1441,
            Self::Listen { .. } => 1442,
            Self::Broken(_) => 1443,
            Self::Garbled(_) => 1444,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::NotRunning { .. } => {
                "Start it with `systemctl start highwater-agent`, and run this as root.".into()
            }
            Self::AlreadyRunning { .. } => "Stop it first, or give this one another run-dir.".into(),
            Self::Listen { .. } => "Check the run-dir of the configuration.".into(),
            Self::Broken(_) => "Look into its log with `journalctl -u highwater-agent`.".into(),
            Self::Garbled(_) => "Use the command of the agent's own version.".into(),
        }
    }
}
