//! Of replication groups. There are as many as operators have made; those that are deleted go from here too.

use crate::lock::locked;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::Registry;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, atomic::AtomicU64};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabel {
    group: String,
}

/// See the module.
#[derive(Default)]
pub struct GroupMetrics {
    made: Family<GroupLabel, Counter>,
    revoked: Family<GroupLabel, Counter>,
    failed: Family<GroupLabel, Counter>,
    age: Family<GroupLabel, Gauge<f64, AtomicU64>>,
    newest_ms: Mutex<HashMap<String, u64>>,
    /// Groups of which something was told.
    told: Mutex<HashSet<String>>,
}

fn label(name: &str) -> GroupLabel {
    GroupLabel { group: name.to_owned() }
}

impl GroupMetrics {
    /// A point was made here, of this time if that is known.
    pub fn made(&self, group: &str, taken_at_ms: Option<u64>) {
        locked(&self.told).insert(group.to_owned());
        self.made.get_or_create(&label(group)).inc();
        if let Some(taken_at_ms) = taken_at_ms {
            self.newest(group, taken_at_ms);
        }
    }
    /// A marker came to nothing.
    pub fn revoked(&self, group: &str) {
        locked(&self.told).insert(group.to_owned());
        self.revoked.get_or_create(&label(group)).inc();
    }
    /// A coordinator says that a marker came to nothing.
    pub fn failed(&self, group: &str) {
        locked(&self.told).insert(group.to_owned());
        self.failed.get_or_create(&label(group)).inc();
    }
    /// The newest point is of this time, in milliseconds since 1970, or a later one.
    pub fn newest(&self, group: &str, taken_at_ms: u64) {
        locked(&self.told).insert(group.to_owned());
        let mut newest = locked(&self.newest_ms);
        let known = newest.entry(group.to_owned()).or_default();
        *known = taken_at_ms.max(*known);
    }
    /// There are only these.
    pub fn only(&self, groups: &[&str]) {
        locked(&self.told).retain(|name| {
            let is_there = groups.contains(&name.as_str());
            if !is_there {
                locked(&self.newest_ms).remove(name);
                self.age.remove(&label(name));
                self.made.remove(&label(name));
                self.revoked.remove(&label(name));
                self.failed.remove(&label(name));
            }
            is_there
        });
    }

    pub(super) fn render(&self, now_ms: u64) {
        for (group, taken_at_ms) in locked(&self.newest_ms).iter() {
            let age_ms = now_ms.saturating_sub(*taken_at_ms);
            self.age.get_or_create(&label(group)).set(age_ms as f64 / 1000.0);
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "group_points",
            "Points of groups that were made, by this collector",
            self.made.clone(),
        );
        registry.register(
            "group_markers_revoked",
            "Markers that some member had kept, or withdrew, and that came to nothing",
            self.revoked.clone(),
        );
        registry.register(
            "group_markers_failed",
            "Markers that came to nothing, as their coordinators say that have their sessions here",
            self.failed.clone(),
        );
        registry.register(
            "group_rpo_age_seconds",
            "Age of a group's latest point, by its marker; of one that never had a point, the group's own age",
            self.age.clone(),
        );
    }
}
