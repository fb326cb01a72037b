//! Protocol versions. The variants are the protocol's changelog.

use crate::WireError;

/// A version of the protocol on port 9443.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Version {
    /// Deltas of chunks with two acknowledgements, block hashes, pings.
    V1 = 1,
    /// Certificates are renewed within a session.
    V2 = 2,
    /// Replication groups: rosters, markers that are kept, points that are asked for.
    V3 = 3,
}

impl Version {
    /// The oldest that this build speaks.
    pub const MIN: Self = Self::V1;
    /// The newest that this build speaks.
    pub const MAX: Self = Self::V3;

    /// Its number in the hello and the welcome.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The version with this number, if this build speaks it.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::V1),
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            _ => None,
        }
    }

    /// The newest version that both this build and a peer of versions `peer_min..=peer_max` speak.
    pub fn negotiate(peer_min: u16, peer_max: u16) -> Result<Self, WireError> {
        let newest = peer_max.min(Self::MAX.number());
        Self::from_number(newest).filter(|_| newest >= peer_min && peer_min <= peer_max).ok_or(
            WireError::NoCommonVersion {
                peer_min,
                peer_max,
                own_min: Self::MIN.number(),
                own_max: Self::MAX.number(),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn negotiation_takes_the_newest_common_version() {
        assert_eq!(Version::negotiate(1, 1).unwrap(), Version::V1);
        assert_eq!(Version::negotiate(1, 2).unwrap(), Version::V2);
        assert_eq!(Version::negotiate(0, 900).unwrap(), Version::V3);
        for (min, max) in [(4, 9), (0, 0), (1, 0), (u16::MAX, u16::MAX)] {
            assert_eq!(Version::negotiate(min, max).unwrap_err().code(), 1110, "{min}..={max}");
        }
    }
}
