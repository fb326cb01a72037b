//! Metrics of what makes points more than crash-consistent, or those of several machines one: markers of the group, guests of this host.

use crate::group::GroupStatus;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use std::sync::atomic::AtomicU64;

type Labels = Vec<(&'static str, String)>;

/// How far this machine's part in a marker came. Each is counted in all stages that it reached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MarkerStage {
    /// It was told to prepare.
    Begun,
    /// It was frozen until all others were.
    Kept,
    /// Its point is in the vault.
    Stored,
}

impl MarkerStage {
    const ALL: [Self; 3] = [Self::Begun, Self::Kept, Self::Stored];

    fn as_str(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Kept => "kept",
            Self::Stored => "stored",
        }
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Consistency {
    markers: Family<Labels, Counter>,
    members: Gauge,
    kept_at: Gauge<f64, AtomicU64>,
    guests: Family<Labels, Counter>,
}

impl Consistency {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "group_markers",
            "Markers of the group, by how far this machine's part came: begun, kept (frozen until all were), stored",
            self.markers.clone(),
        );
        for stage in MarkerStage::ALL {
            let _ = self.markers.get_or_create(&vec![("stage", stage.as_str().to_owned())]);
        }
        r.register(
            "group_members",
            "Machines of the group that this one belongs to; 0: to none",
            self.members.clone(),
        );
        r.register_with_unit(
            "group_kept_timestamp",
            "When this machine's part of the newest point of the group was stored, since 1970; 0: none since the agent began",
            Unit::Seconds,
            self.kept_at.clone(),
        );
        r.register(
            "guest_freezes",
            "Freezes for points, by guest of this host and whether it stood still until the end",
            self.guests.clone(),
        );
    }

    pub(super) fn marker(&self, stage: MarkerStage) {
        self.markers.get_or_create(&vec![("stage", stage.as_str().to_owned())]).inc();
    }

    pub(super) fn guest(&self, name: &str, stood_still: bool) {
        let result = if stood_still { "still" } else { "failed" };
        self.guests.get_or_create(&vec![("guest", name.to_owned()), ("result", result.to_owned())]).inc();
    }

    pub(super) fn publish(&self, group: Option<&GroupStatus>) {
        self.members.set(group.map_or(0, |group| group.members as i64));
        let kept = group.and_then(|group| group.last_kept.as_ref());
        self.kept_at.set(kept.map_or(0.0, |kept| kept.at_ms as f64 / 1000.0));
    }
}
