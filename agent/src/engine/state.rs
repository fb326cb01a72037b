//! The state of a disk, as operators see it (pure).

use crate::control::status::DiskState as Kind;
use std::time::{Duration, Instant};

/// What a disk is doing, and why where that needs saying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// Its content is being copied for the first time: no point covers it yet.
    InitialReplication,
    /// Its writes are captured in their order; each position of the stream is a point.
    WriteOrdered,
    /// Changed blocks are tracked and sent round by round; points cover it.
    Bitmap,
    /// The vault's copy is known to lack something, and nothing is done about it until an operator says so.
    ResyncRequired(String),
    /// Its content is compared with the vault's hashes, and only differences are sent.
    Resynchronizing(String),
    /// Writes may have been missed.
    Suspect(String),
    /// The device cannot be found or tracked.
    Error(String),
    /// The device is there and tracked, and cannot be read. What is written to it is marked; it is left out of points.
    Unreadable(String),
}

impl DiskState {
    /// The name alone.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::InitialReplication => Kind::InitialReplication,
            Self::WriteOrdered => Kind::WriteOrdered,
            Self::Bitmap => Kind::Bitmap,
            Self::ResyncRequired(_) => Kind::ResyncRequired,
            Self::Resynchronizing(_) => Kind::Resynchronizing,
            Self::Suspect(_) => Kind::Suspect,
            Self::Error(_) | Self::Unreadable(_) => Kind::Error,
        }
    }
    /// Why it is so, where there is something to say.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::InitialReplication | Self::WriteOrdered | Self::Bitmap => None,
            Self::ResyncRequired(r)
            | Self::Resynchronizing(r)
            | Self::Suspect(r)
            | Self::Error(r)
            | Self::Unreadable(r) => Some(r),
        }
    }
    /// Whether the machine can have a recovery point while a disk is in this state. A disk in its first copy is left out of
    /// points; one whose copy is in doubt stops them, because a point without it would not be the machine. One that cannot be
    /// read is left out too: while a disk fails, the others need their points most.
    #[must_use]
    pub fn allows_points(&self) -> bool {
        matches!(self, Self::InitialReplication | Self::WriteOrdered | Self::Bitmap | Self::Unreadable(_))
    }
}

/// A state and since when.
#[derive(Clone, Debug)]
pub struct Since {
    state: DiskState,
    since: Instant,
    spent: [Duration; Kind::ALL.len()],
}

impl Since {
    /// From now on.
    #[must_use]
    pub fn new(state: DiskState) -> Self {
        Self { state, since: Instant::now(), spent: Default::default() }
    }
    /// The state.
    #[must_use]
    pub fn state(&self) -> &DiskState {
        &self.state
    }
    /// How long it has lasted.
    #[must_use]
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }
    /// Time spent in each state, in the order of [`Kind::ALL`], the present one included.
    #[must_use]
    pub fn spent(&self) -> [Duration; Kind::ALL.len()] {
        let mut spent = self.spent;
        spent[index(&self.state)] += self.since.elapsed();
        spent
    }
    /// Changes it; false if it was the same.
    pub fn set(&mut self, state: DiskState) -> bool {
        if self.state == state {
            return false;
        }
        self.spent[index(&self.state)] += self.since.elapsed();
        self.state = state;
        self.since = Instant::now();
        true
    }
}

fn index(state: &DiskState) -> usize {
    Kind::ALL.iter().position(|kind| *kind == state.kind()).unwrap_or(0)
}
