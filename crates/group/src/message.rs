//! What members say to each other.

use highwater_delta::MachineId;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// One run of a machine's program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Life {
    /// A later one has a greater number: the time at which it began, in milliseconds since 1970. If a clock was set back, others tell.
    pub since: u64,
    /// Drawn at random, so that no two are the same.
    pub nonce: u64,
}

/// Names one attempt to freeze a group. Never used twice. Those of one coordinator are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Marker {
    /// Who began it.
    pub coordinator: MachineId,
    /// In which of its lives.
    pub life: Life,
    /// Its how manieth.
    pub number: u64,
}

/// As text, fit for a name: `<coordinator>.<since>.<nonce, 16 digits>.<number>`.
impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Life { since, nonce } = self.life;
        write!(f, "{}.{since}.{nonce:016x}.{}", self.coordinator, self.number)
    }
}

/// A text that names no marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMarker;

impl fmt::Display for NoMarker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it names no marker")
    }
}

impl std::error::Error for NoMarker {}

impl FromStr for Marker {
    type Err = NoMarker;
    /// Only what [`Marker`] is written as: of one marker there is one name.
    fn from_str(text: &str) -> Result<Self, NoMarker> {
        let mut parts = text.splitn(4, '.');
        let mut next = || parts.next().ok_or(NoMarker);
        let (coordinator, since, nonce, number) = (next()?, next()?, next()?, next()?);
        let marker = Self {
            coordinator: coordinator.parse().map_err(|_| NoMarker)?,
            life: Life {
                since: since.parse().map_err(|_| NoMarker)?,
                nonce: u64::from_str_radix(nonce, 16).map_err(|_| NoMarker)?,
            },
            number: number.parse().map_err(|_| NoMarker)?,
        };
        if marker.to_string() == text { Ok(marker) } else { Err(NoMarker) }
    }
}

/// What is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Filesystems.
    Crash,
    /// Applications by their hooks, then filesystems.
    Application,
}

/// Why a member takes no part, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// It takes part in another marker.
    Busy,
    /// It knows of a later or an earlier membership.
    OtherMembership {
        /// Its epoch.
        epoch: u64,
    },
    /// The marker is not newer than the last one that it heard of from this coordinator, which was of this life.
    Old {
        /// See [`Marker::life`].
        life: Life,
    },
    /// It could not prepare.
    Unprepared,
    /// It could not freeze.
    Unfrozen,
    /// It was frozen for as long as it may be, or waited for the word for too long.
    Late,
    /// It was not prepared in time.
    Unready,
    /// It was told to mark and found that it had been thawed.
    Thawed,
    /// It knows nothing of this marker any more.
    Unknown,
}

/// See the crate. From the coordinator: `Ask`, `Prepare`, `Freeze`, `Mark`, `Revoke`; to it: the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Would it take part? Nothing comes of the answer but an answer.
    Ask {
        /// In this.
        marker: Marker,
        /// What is frozen.
        kind: Kind,
        /// With these members.
        epoch: u64,
    },
    /// It is there, and would take part now.
    Here {
        /// See [`Message::Ask`].
        marker: Marker,
    },
    /// Prepare.
    Prepare {
        /// For this.
        marker: Marker,
        /// What is frozen.
        kind: Kind,
        /// With these members.
        epoch: u64,
    },
    /// It is prepared, in this life.
    Ready {
        /// See [`Message::Prepare`].
        marker: Marker,
        /// The member's.
        life: Life,
    },
    /// Freeze.
    Freeze {
        /// See [`Message::Prepare`].
        marker: Marker,
        /// The member's, as it told.
        life: Life,
    },
    /// It is frozen.
    Frozen {
        /// See [`Message::Prepare`].
        marker: Marker,
        /// The member's.
        life: Life,
    },
    /// All are frozen: keep the marker, and thaw.
    Mark {
        /// See [`Message::Prepare`].
        marker: Marker,
        /// The member's, as it told.
        life: Life,
    },
    /// It was frozen until the mark came, and keeps the marker.
    Marked {
        /// See [`Message::Prepare`].
        marker: Marker,
        /// The member's.
        life: Life,
    },
    /// It takes no part.
    Refuse {
        /// See [`Message::Prepare`].
        marker: Marker,
        /// Why.
        why: Refusal,
    },
    /// It came to nothing: thaw, keep nothing.
    Revoke {
        /// See [`Message::Prepare`].
        marker: Marker,
    },
}

impl Message {
    /// Which marker it is about.
    #[must_use]
    pub fn marker(&self) -> Marker {
        match self {
            Self::Ask { marker, .. }
            | Self::Here { marker }
            | Self::Prepare { marker, .. }
            | Self::Ready { marker, .. }
            | Self::Freeze { marker, .. }
            | Self::Frozen { marker, .. }
            | Self::Mark { marker, .. }
            | Self::Marked { marker, .. }
            | Self::Refuse { marker, .. }
            | Self::Revoke { marker } => *marker,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_has_one_name() {
        let coordinator = MachineId::from_bytes([7; 16]);
        let marker = Marker { coordinator, life: Life { since: 1_790_000_000_000, nonce: 0xab }, number: 12 };
        let name = marker.to_string();
        assert_eq!(name, "07070707-0707-0707-0707-070707070707.1790000000000.00000000000000ab.12");
        assert_eq!(name.parse(), Ok(marker));
        for other in [
            String::new(),
            name.to_uppercase(),
            name.replace(".12", ".012"),
            format!("{name}."),
            name.replace(".00000000000000ab", ".ab"),
            name.replace(".12", ""),
        ] {
            assert_eq!(other.parse::<Marker>(), Err(NoMarker), "{other}");
        }
    }
}
