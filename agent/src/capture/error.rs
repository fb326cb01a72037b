//! Why writes cannot be captured. None of it endangers replication: the agent stays in bitmap mode, and says so.

use crate::error::Coded;

/// An error of capture.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The agent was built without the eBPF object.
    #[error("this agent was built without its capture programs")]
    NoObject,
    /// Something that the kernel must offer is missing.
    #[error("writes cannot be captured here: no support for {0}")]
    Unsupported(String),
    /// The kernel's memory could not be found, or what was found did not bear being tried.
    #[error("the kernel's memory cannot be read reliably: {0}")]
    Bases(String),
    /// A call into the kernel failed.
    #[error("could not {what}: {cause}")]
    Kernel {
        /// What was attempted.
        what: String,
        /// Why it failed.
        cause: String,
    },
}

impl CaptureError {
    pub(super) fn kernel(what: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self::Kernel { what: what.into(), cause: crate::error::with_sources(cause) }
    }
}

impl Coded for CaptureError {
    fn code(&self) -> u16 {
        match self {
            Self::NoObject => 1450,
            Self::Unsupported(_) => 1490,
            Self::Bases(_) => 1491,
            Self::Kernel { .. } => 1492,
        }
    }
    fn action(&self) -> String {
        match self {
            Self::NoObject => "build it with `cargo xtask build-ebpf` first, or install the packaged agent",
            Self::Unsupported(_) | Self::Bases(_) => {
                "nothing has to be done: replication goes on in bitmap mode; report the kernel's version if it is a stock one"
            }
            Self::Kernel { .. } => {
                "replication goes on in bitmap mode; check the kernel's log, and capture.memory if a ring was refused"
            }
        }
        .into()
    }
}
