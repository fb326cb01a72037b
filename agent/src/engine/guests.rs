//! Guests of this host around a freeze, and how consistent a point is with them.

use super::{Engine, disk::Disk};
use crate::{
    control::status::GuestStatus,
    device::{BlockDevice, DevNumber},
    error::Coded,
    guests::{FrozenGuests, GuestOptions},
};
use highwater_delta::{Consistency, DiskId};
use std::time::{Duration, SystemTime};

/// How consistent a guest left its disks.
#[derive(Debug)]
pub(super) struct GuestRank {
    disks: Vec<DevNumber>,
    consistency: Consistency,
}

/// What is told of a guest before its first freeze.
pub(super) fn never_frozen(guest: &GuestOptions) -> GuestStatus {
    GuestStatus { name: guest.name.clone(), frozen_at_ms: None, trouble: None }
}

impl Engine {
    /// Freezes the guests, right before the host's own filesystems. Those that fail are no obstacle. `deadline`: how long they may stand still; `most`: how
    /// long they are waited for, if not as long as each may take.
    pub(super) fn freeze_guests(&mut self, deadline: Duration, most: Option<Duration>) -> FrozenGuests {
        if self.guests.is_empty() {
            return FrozenGuests::none();
        }
        self.pulse.work();
        // A guest may wait for what is written out for the host's freeze, too.
        self.guests.freeze(deadline, most)
    }

    /// Thaws them, and answers how they left their disks. Those that did not stand still are told.
    pub(super) fn thaw_guests(&mut self, guests: FrozenGuests) -> Vec<GuestRank> {
        let (stood, failed) = guests.thaw();
        let rank = |application| if application { Consistency::Application } else { Consistency::Filesystem };
        let mut ranks = vec![];
        for guest in stood {
            self.note_guest(&guest.name, None);
            ranks.push(GuestRank { disks: guest.disks, consistency: rank(guest.application) });
        }
        for failed in failed {
            let code = format!("HW-{}", failed.error.code());
            let (error, action) = (crate::error::chain(&failed.error), failed.error.action());
            self.note_guest(&failed.name, Some(format!("{code}: {error}. {action}")));
            tracing::warn!(
                code,
                error,
                action,
                "a guest did not stand still: its disks are only crash-consistent"
            );
            ranks.push(GuestRank { disks: failed.disks, consistency: Consistency::Crash });
        }
        ranks
    }

    fn note_guest(&mut self, name: &str, trouble: Option<String>) {
        self.metrics.guest(name, trouble.is_none());
        if let Some(status) = self.guest_statuses.iter_mut().find(|status| status.name == name) {
            (status.frozen_at_ms, status.trouble) = (Some(super::status::ms(SystemTime::now())), trouble);
        }
    }

    /// How consistent a point of these disks is, all of the host's filesystems having been frozen. `application`: the host's own
    /// applications stood still.
    pub(super) fn consistency(
        &self,
        members: &[DiskId],
        application: bool,
        guests: &[GuestRank],
    ) -> Consistency {
        let hook = self.options.freeze_hook.is_some();
        let own = |disk: &Disk| match (disk.has_filesystem || hook, application) {
            (true, true) => Consistency::Application,
            (true, false) => Consistency::Filesystem,
            (false, _) => Consistency::Crash,
        };
        let of = |disk: &Disk| {
            disk.device.as_ref().and_then(|device| of_guests(device, guests)).unwrap_or_else(|| own(disk))
        };
        let members = self.disks.iter().filter(|disk| members.contains(&disk.id()));
        members.map(of).min().unwrap_or(Consistency::Crash)
    }
}

/// How consistent a disk is by what its guest did; `None`: it is no guest's.
fn of_guests(device: &BlockDevice, guests: &[GuestRank]) -> Option<Consistency> {
    let own = guests.iter().filter(|g| g.disks.iter().any(|disk| is_of(device.dev, device.whole, *disk)));
    own.map(|guest| guest.consistency).min()
}

/// Whether a protected device is a guest's disk, or a partition of one. (The other way round it holds more than the guest.)
fn is_of(dev: DevNumber, whole: DevNumber, disk: DevNumber) -> bool {
    disk == dev || disk == whole
}
