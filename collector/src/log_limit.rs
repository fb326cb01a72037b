//! Lines that peers can cause are said sparingly: for each peer some at once, then now and then, with the number of those left
//! out. An agent that comes back after its own back-off is always heard of. Whoever has many names or addresses meets
//! a limit for all together, so large that one peer alone never reaches it.

use crate::bucket::Bucket;
use crate::per_peer::{Kept, PerPeer};
use std::hash::Hash;
use std::time::Instant;

/// Lines of a peer said at once, and every minute afterwards.
const LINES: f64 = 20.0;
/// The same, of all peers together.
const LINES_OF_ALL: f64 = 1000.0;

/// Lines of peers, each known by a `K`.
#[derive(Debug)]
pub struct LogLimit<K> {
    peers: PerPeer<K, Peer>,
    all: Bucket,
}

#[derive(Debug)]
struct Peer {
    bucket: Bucket,
    left_out: u64,
}

impl Kept for Peer {
    fn fullness(&self, now: Instant) -> f64 {
        self.bucket.fullness(now)
    }
}

fn lines(number: f64, now: Instant) -> Bucket {
    Bucket::new(number, number / 60.0, now)
}

impl<K: Copy + Eq + Hash> LogLimit<K> {
    /// Nothing was said yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { peers: PerPeer::new(), all: lines(LINES_OF_ALL, now) }
    }

    /// Whether to say it: with how many of this peer were left out since its last one that was said.
    pub fn say(&mut self, peer: K, now: Instant) -> Option<u64> {
        let peer = self.peers.of(peer, now, || Peer { bucket: lines(LINES, now), left_out: 0 });
        // In this order: what one peer may not say takes nothing from the others.
        if peer.bucket.take(now).is_err() || self.all.take(now).is_err() {
            peer.left_out += 1;
            return None;
        }
        Some(std::mem::take(&mut peer.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_told_by_its_number_and_hides_nobody() {
        let start = Instant::now();
        let mut limit = LogLimit::new(start);
        let said = (0..1_000_000).filter(|_| limit.say("flood", start).is_some()).count();
        assert_eq!(said, 20);
        assert_eq!(limit.say("other", start), Some(0));
        assert_eq!(limit.say("flood", start + Duration::from_secs(3)), Some(999_980));
        assert_eq!(limit.say("flood", start + Duration::from_secs(6)), Some(0));
    }

    /// An agent that cannot stay: two lines each time, at the pace of its back-off.
    #[test]
    fn an_honest_agent_is_told_each_time() {
        let (start, mut at) = (Instant::now(), Duration::ZERO);
        let mut limit = LogLimit::new(start);
        for wait in [1, 2, 5, 10, 30].into_iter().chain([60; 100]) {
            at += Duration::from_secs(wait);
            assert_eq!((limit.say(1, start + at), limit.say(1, start + at)), (Some(0), Some(0)));
        }
    }

    #[test]
    fn many_names_fill_no_log() {
        let start = Instant::now();
        let mut limit = LogLimit::new(start);
        let said = (0..5_000).filter(|peer| limit.say(*peer, start).is_some()).count();
        assert_eq!(said, 1000);
    }
}
