//! Recovery points as the agent logs them when they are stored.
//!
//! Times are milliseconds since 1970 by this machine's clock, which agent and benchmark share.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use highwater_tests::{Arena, Site};

use crate::agent;
use crate::results::Series;

/// A point that is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StoredPoint {
    /// Its number.
    pub number: u64,
    /// Of its freeze; 0 if there was none.
    pub freeze_us: f64,
    /// From its marker to its being stored.
    pub stored_after_ms: u64,
}

/// Those in the agent's log from a place in it on.
pub fn points(arena: &Arena, log_from: usize) -> Vec<StoredPoint> {
    agent::log(arena).get(log_from..).unwrap_or_default().lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<StoredPoint> {
    let (_, fields) = line.split_once("recovery point stored ")?;
    let of = |name: &str| {
        let mut values = fields.split_whitespace().filter_map(|field| field.split_once('='));
        values.find_map(|(key, value)| (key == name).then_some(value))
    };
    Some(StoredPoint {
        number: of("point")?.parse().ok()?,
        freeze_us: of("freeze_us")?.parse().ok()?,
        stored_after_ms: of("stored_after_ms")?.parse().ok()?,
    })
}

/// Waits until the agent has logged that this point is stored: its log is written behind its back.
pub fn wait_logged(arena: &Arena, log_from: usize, number: u64) -> Result<Vec<StoredPoint>> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let points = points(arena, log_from);
        if points.iter().any(|point| point.number == number) {
            return Ok(points);
        }
        ensure!(Instant::now() < until, "the agent has not logged that point {number} is stored");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The age, in seconds, that the oldest write not stored yet had reached whenever a point was stored: from the marker before it, or the
/// begin of the load, to its being stored. Only points taken since `begin_ms` count.
pub fn ages(site: &Site, stored: &[StoredPoint], begin_ms: u64) -> Result<Series> {
    let mut points = site.points()?;
    points.sort_unstable();
    Ok(ages_of(&points, stored, begin_ms))
}

fn ages_of(points: &[(u64, u64)], stored: &[StoredPoint], begin_ms: u64) -> Series {
    let mut ages = Series::default();
    let mut oldest_ms = begin_ms;
    for (number, taken_at_ms) in points.iter().filter(|(_, taken_at_ms)| *taken_at_ms >= begin_ms) {
        if let Some(point) = stored.iter().find(|point| point.number == *number) {
            let stored_at_ms = taken_at_ms + point.stored_after_ms;
            ages.push(stored_at_ms.saturating_sub(oldest_ms) as f64 / 1e3);
            oldest_ms = *taken_at_ms;
        }
    }
    ages
}

/// Now.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_is_read() {
        let line = "2026-01-01T00:00:00.5Z  INFO highwater_agent::engine::session: recovery point stored \
                    point=7 consistency=Crash freeze_us=12 stored_after_ms=34";
        assert_eq!(parse(line), Some(StoredPoint { number: 7, freeze_us: 12.0, stored_after_ms: 34 }));
        assert_eq!(parse("INFO highwater_agent: connected point=7"), None);
    }

    #[test]
    fn ages_reach_from_the_marker_before() {
        let stored = |number, stored_after_ms| StoredPoint { number, freeze_us: 0.0, stored_after_ms };
        let points = [(1, 500), (2, 1500), (3, 2500)];
        let ages = ages_of(&points, &[stored(1, 9), stored(2, 100), stored(3, 200)], 1000);
        assert_eq!(ages.values(), [0.6, 1.2]);
    }
}
