//! What is told of the group.

use highwater_delta::GroupId;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};

/// The machine's group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GroupStatus {
    /// Which.
    pub group: GroupId,
    /// For people.
    pub name: String,
    /// Of the membership.
    pub epoch: u64,
    /// How many machines belong to it.
    pub members: usize,
    /// To how many others there is a connection; there need be none between two markers.
    pub connected: usize,
    /// Where this machine listens; none: it cannot.
    pub listening: Option<String>,
    /// Where the others call it, as the collector says.
    #[serde(default)]
    pub address: Option<String>,
    /// The last marker that this machine kept as a point.
    pub last_kept: Option<MarkerStatus>,
    /// The last one that came to nothing: one that this machine coordinated, or did not do its part for.
    pub last_failed: Option<MarkerStatus>,
}

/// A marker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MarkerStatus {
    /// Which.
    pub marker: String,
    /// `crash` or `application`.
    pub kind: highwater_group::Kind,
    /// When, ms since 1970.
    pub at_ms: u64,
    /// Why it came to nothing.
    pub why: Option<String>,
}

/// Read by whoever tells the status.
#[derive(Clone, Debug, Default)]
pub struct SharedStatus(Arc<Mutex<Option<GroupStatus>>>);

impl SharedStatus {
    /// As it is now; none: the machine belongs to no group.
    #[must_use]
    pub fn get(&self) -> Option<GroupStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, status: Option<GroupStatus>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut GroupStatus)) {
        if let Some(status) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            change(status);
        }
    }
}
