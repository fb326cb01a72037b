//! What a machine takes in, and what it answers is to be done.

use crate::{
    membership::Membership,
    message::{Kind, Marker, Message, Refusal},
};
use highwater_delta::MachineId;

/// What happens to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Time has passed.
    Tick,
    /// A member says something. That it is one was proved by its certificate.
    Message {
        /// Who.
        from: MachineId,
        /// What.
        message: Message,
    },
    /// [`Output::Prepare`] was done, or could not be.
    Prepared {
        /// Of this marker.
        marker: Marker,
        /// Whether it was.
        done: bool,
    },
    /// [`Output::Freeze`] was done, or could not be (nothing is frozen then).
    Frozen {
        /// Of this marker.
        marker: Marker,
        /// Whether it was.
        done: bool,
    },
    /// [`Output::Keep`] was done.
    Kept {
        /// Of this marker.
        marker: Marker,
        /// Whether everything stood still until [`Output::Keep`].
        intact: bool,
    },
    /// The members are these now. Which of two memberships holds is known to who says it.
    Membership(Membership),
    /// A marker is wanted now, or as soon as this machine has rested.
    Wanted(Kind),
    /// There is no connection to this member any more: whatever it did not say, it may never say.
    Gone(MachineId),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Say this. It may be lost.
    Send {
        /// To this member.
        to: MachineId,
        /// This.
        message: Message,
    },
    /// Prepare to freeze; then [`Input::Prepared`].
    Prepare {
        /// For this marker.
        marker: Marker,
        /// What.
        kind: Kind,
    },
    /// Freeze; then [`Input::Frozen`].
    Freeze {
        /// For this marker.
        marker: Marker,
    },
    /// Thaw, and keep what the disks were; then [`Input::Kept`].
    Keep {
        /// As the point of this marker.
        marker: Marker,
    },
    /// End what is done for it, thaw if it is frozen, and keep nothing.
    Drop {
        /// For this marker.
        marker: Marker,
    },
    /// Tell the vault that this machine keeps the marker.
    Report {
        /// Which.
        marker: Marker,
        /// Of the membership, every member of which must keep it.
        epoch: u64,
        /// What was to be frozen.
        kind: Kind,
    },
    /// Tell the vault that the marker came to nothing. If it was complete before, it stays.
    Withdraw {
        /// Which.
        marker: Marker,
    },
    /// A marker that this machine coordinated has ended. `Ok`: every member keeps it.
    Ended {
        /// Which.
        marker: Marker,
        /// What was to be frozen.
        kind: Kind,
        /// How.
        result: Result<(), Failure>,
    },
}

/// Why a marker came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A member took no part.
    Refused(MachineId, Refusal),
    /// These did not answer in time, or are gone.
    Silent(Vec<MachineId>),
    /// These were not frozen in time.
    Slow(Vec<MachineId>),
    /// The members changed meanwhile.
    Changed,
}
