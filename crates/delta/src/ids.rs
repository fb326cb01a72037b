//! Identities. Each is a newtype, so that a disk can never be passed where a machine is meant.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new identity, time-ordered (UUID version 7).
            #[must_use]
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
            /// The identity with these 16 bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
            /// Its 16 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0.hyphenated())
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

uuid_id!(
    /// A protected machine.
    MachineId
);
uuid_id!(
    /// A protected disk, given at protection and kept for the disk's whole life.
    DiskId
);
uuid_id!(
    /// A vault.
    VaultId
);
uuid_id!(
    /// A collector that keeps its vault at another one: what it is known by there.
    RelayId
);
uuid_id!(
    /// A replication group: machines whose points are taken at one instant.
    GroupId
);
uuid_id!(
    /// A segment of a vault. Time-ordered: a later segment of one writer sorts after an earlier one.
    SegmentId
);
uuid_id!(
    /// One attempt of an agent to ship a delta. A delta that is built anew gets a new id.
    DeltaId
);

impl SegmentId {
    /// A new identity of a moment, in milliseconds since 1970. Of one moment it sorts after those with a smaller `sequence`, of which
    /// twelve bits count.
    #[must_use]
    pub fn at_ms(ms: u64, sequence: u16) -> Self {
        let mut bits = [0; 10];
        bits.copy_from_slice(&Uuid::new_v4().as_bytes()[6..]);
        // What is behind version and variant of the other kind is random.
        bits[2] = Uuid::new_v4().as_bytes()[0];
        bits[..2].copy_from_slice(&sequence.to_be_bytes());
        Self(uuid::Builder::from_unix_timestamp_millis(ms, &bits).into_uuid())
    }
}

/// The number of a commit of one machine, from 1. A recovery point is named by the commit that made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CommitId(pub u64);

impl CommitId {
    /// Before the first commit.
    pub const NONE: Self = Self(0);
    /// The commit after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
impl fmt::Display for CommitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl FromStr for CommitId {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}
