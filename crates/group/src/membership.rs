//! Who belongs to a group.

use highwater_delta::MachineId;
use serde::{Deserialize, Serialize};

/// Most members of a group.
pub const MEMBERS_MAX: usize = 256;

/// Why a list of machines is none of members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembershipError {
    /// More than [`MEMBERS_MAX`], or none.
    Count(usize),
    /// One is in it twice.
    Twice(MachineId),
}

impl std::fmt::Display for MembershipError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count(count) => write!(f, "a group has 1 to {MEMBERS_MAX} members, not {count}"),
            Self::Twice(machine) => write!(f, "machine {machine} is in the group twice"),
        }
    }
}

impl std::error::Error for MembershipError {}

/// As it is sent: looked at when it is taken in.
#[derive(Deserialize)]
struct Sent {
    epoch: u64,
    members: Vec<MachineId>,
}

impl TryFrom<Sent> for Membership {
    type Error = MembershipError;
    fn try_from(sent: Sent) -> Result<Self, MembershipError> {
        Self::new(sent.epoch, sent.members)
    }
}

/// The members at one time. Whoever changes them raises the epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Sent")]
pub struct Membership {
    epoch: u64,
    /// Ascending.
    members: Vec<MachineId>,
}

impl Membership {
    /// These machines, in any order.
    ///
    /// # Errors
    /// Too many, none, or one twice.
    pub fn new(epoch: u64, mut members: Vec<MachineId>) -> Result<Self, MembershipError> {
        if members.is_empty() || members.len() > MEMBERS_MAX {
            return Err(MembershipError::Count(members.len()));
        }
        members.sort_unstable();
        if let Some(twice) = members.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(MembershipError::Twice(twice[0]));
        }
        Ok(Self { epoch, members })
    }
    /// Which.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
    /// All of them, ascending.
    #[must_use]
    pub fn members(&self) -> &[MachineId] {
        &self.members
    }
    /// Whether a machine is one.
    #[must_use]
    pub fn contains(&self, machine: MachineId) -> bool {
        self.members.binary_search(&machine).is_ok()
    }
    /// Which in line to coordinate.
    #[must_use]
    pub fn rank(&self, machine: MachineId) -> Option<usize> {
        self.members.binary_search(&machine).ok()
    }
}
