//! The freeze of a point: the operator's hook, guests, then the filesystems of this machine. Who is frozen first waits for the others.

use super::{Engine, point::PointError};
use crate::{
    freeze::{FreezeOptions, FrozenSet},
    guests::FrozenGuests,
    mounts::Survey,
};

impl Engine {
    /// Freezes all. On an error all of it goes on again, or will within its deadline.
    pub(super) fn freeze_all(&mut self, survey: &Survey) -> Result<(FrozenGuests, FrozenSet), PointError> {
        self.pulse.work();
        self.group_freeze_begins();
        self.hook("freeze")?;
        let limits = self.group.freeze_limits();
        let own = &self.options.freeze;
        // Of the group's, nobody has any use when the others have gone on.
        let deadline = limits.map_or(own.deadline, |limits| limits.hold.min(own.deadline));
        let options = FreezeOptions { deadline, ..own.clone() };
        // The guests have half of the time: the filesystems come after them.
        let guests = self.freeze_guests(deadline, limits.map(|limits| limits.within / 2));
        let frozen = if self.group_gave_up() {
            Err(PointError::GivenUp)
        } else {
            FrozenSet::freeze(&survey.filesystems, &self.guardian, &options).map_err(PointError::from)
        };
        if frozen.is_err() {
            let _ = self.hook("thaw");
        }
        Ok((guests, frozen?))
    }
}
