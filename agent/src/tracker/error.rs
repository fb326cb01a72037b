//! What can go wrong with tracking, and what to do about it.

use super::btf::BtfError;
use crate::error::Coded;

/// An error of the tracker. Every variant has a stable code.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The agent was built without the eBPF object.
    #[error("this agent was built without its eBPF programs")]
    NoObject,
    /// Something that the kernel must offer is missing.
    #[error("this kernel cannot be tracked: it has no {0}")]
    Unsupported(String),
    /// The kernel's type information lacks a member.
    #[error("this kernel's layout is not understood: {0}")]
    Layout(#[from] BtfError),
    /// A call into the kernel failed.
    #[error("could not {what}: {cause}")]
    Kernel {
        /// What was attempted.
        what: String,
        /// Why it failed.
        cause: String,
    },
    /// The device has more blocks than a bitmap can have bits.
    #[error("the device is too large to track: {0} blocks")]
    TooLarge(u64),
    /// All slots, targets or ranges are taken.
    #[error("too many {0} are protected on this machine")]
    TooMany(&'static str),
    /// No such disk is tracked.
    #[error("disk {0} is not tracked")]
    Unknown(highwater_delta::DiskId),
    /// The record of what is tracked could not be kept.
    #[error("could not keep the tracker's record {path}: {cause}")]
    Record {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        cause: std::io::Error,
    },
}

impl TrackerError {
    pub(super) fn kernel(what: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self::Kernel { what: what.into(), cause: crate::error::with_sources(cause) }
    }
}

impl Coded for TrackerError {
    fn code(&self) -> u16 {
        match self {
            Self::NoObject => 1450,
            Self::Unsupported(_) => 1451,
            Self::Layout(_) => 1452,
            Self::Kernel { .. } => 1453,
            Self::TooLarge(_) => 1454,
            Self::TooMany(_) => 1455,
            Self::Unknown(_) => 1456,
            Self::Record { .. } => 1457,
        }
    }

    fn action(&self) -> String {
        match self {
            Self::NoObject => "build it with `cargo xtask build-ebpf` first, or install the packaged agent",
            Self::Unsupported(_) => {
                "use a kernel with BTF, ring buffers and bpf_loop (5.17 and later), not locked down to confidentiality"
            }
            Self::Layout(_) => "report the kernel's version; until then this machine cannot be protected",
            Self::Kernel { .. } => {
                "check that the agent runs as root, that the BPF filesystem is mounted, and the kernel's log"
            }
            Self::TooLarge(_) => "raise the bitmap memory in the configuration",
            Self::TooMany(_) => "unprotect disks that are not needed",
            Self::Unknown(_) => "see `highwater-agent status` for the protected disks",
            Self::Record { .. } => "check that the agent's run directory is writable",
        }
        .into()
    }
}
