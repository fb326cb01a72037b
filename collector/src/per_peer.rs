//! Allowances kept for each peer, in a table of bounded size.
//!
//! A full table forgets the allowance that is nearest to whole: whoever it belonged to loses nothing, or next to nothing, and a
//! stranger who has used his up cannot get a new one by coming under many other names, which are fuller than his.

use crate::bucket::Bucket;
use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Instant;

/// Peers that are remembered.
const PEERS_MAX: usize = 1024;

/// Where a connection comes from, as far as one that comes from there can choose it: an IPv4 address, or the /64 of an
/// IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source(IpAddr);

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            IpAddr::V6(v6) => write!(f, "{v6}/64"),
            v4 => v4.fmt(f),
        }
    }
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(v6) => {
                let network = v6.to_bits() >> 64 << 64;
                IpAddr::V6(Ipv6Addr::from_bits(network))
            }
            v4 => v4,
        })
    }
}

/// What is kept for a peer: something around a bucket.
pub trait Kept {
    /// Which part of the bucket is there, 0 to 1.
    fn fullness(&self, now: Instant) -> f64;
}

impl Kept for Bucket {
    fn fullness(&self, now: Instant) -> f64 {
        Self::fullness(self, now)
    }
}

/// See the module.
#[derive(Debug)]
pub struct PerPeer<K, V> {
    kept: HashMap<K, V>,
}

impl<K: Copy + Eq + Hash, V: Kept> PerPeer<K, V> {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self { kept: HashMap::new() }
    }

    /// What is kept for a peer; `new` for one that is not remembered.
    pub fn of(&mut self, peer: K, now: Instant, new: impl FnOnce() -> V) -> &mut V {
        if self.kept.len() >= PEERS_MAX && !self.kept.contains_key(&peer) {
            let fullness = |kept: &V| kept.fullness(now);
            let fullest = self.kept.iter().max_by(|(_, a), (_, b)| fullness(a).total_cmp(&fullness(b)));
            if let Some(fullest) = fullest.map(|(peer, _)| *peer) {
                self.kept.remove(&fullest);
            }
        }
        self.kept.entry(peer).or_insert_with(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(address: &str) -> Source {
        Source::from(address.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn a_network_of_ipv6_is_one_source() {
        assert_eq!(source("2001:db8:1:2::1"), source("2001:db8:1:2:ffff::9"));
        assert_ne!(source("2001:db8:1:2::1"), source("2001:db8:1:3::1"));
        assert_eq!(source("::ffff:192.0.2.7"), source("192.0.2.7"));
        assert_ne!(source("192.0.2.8"), source("192.0.2.7"));
    }

    #[test]
    fn the_table_is_bounded_and_who_used_his_up_stays_in_it() {
        let now = Instant::now();
        let bucket = || Bucket::new(4.0, 1.0, now);
        let mut table = PerPeer::new();
        for _ in 0..4 {
            table.of(source("192.0.2.7"), now, bucket).take(now).unwrap();
        }
        for n in 0..5_000_u32 {
            let other = Source::from(IpAddr::from(n.to_be_bytes()));
            table.of(other, now, bucket).take(now).unwrap();
            assert!(table.kept.len() <= PEERS_MAX);
        }
        assert!(table.of(source("192.0.2.7"), now, bucket).take(now).is_err());
    }
}
