//! Agreement on markers: one instant at which the disks of all machines of a replication group were frozen (pure: no I/O, no clock of its
//! own, no randomness). `docs/PROTOCOL.md` tells it as a protocol, and `tests/simulation.rs` tries to break it.
//!
//! **Two phases.** A coordinator asks whether all members are there, and has all of them prepare (applications, filesystems written out), then freeze. When it has heard of each that
//! it is frozen, it has them mark: whoever is still frozen by then, and was all the while, keeps its marker, thaws, and says so.
//!
//! **What that proves.** A member that keeps a marker was frozen from before it said so until the mark came. The mark was sent after all had
//! said so. So there is an instant, when the last word came in, at which every member that keeps the marker was frozen. No clock is
//! compared with another.
//!
//! **Trust.** That the mark comes after the last word is the coordinator's doing: a member that means harm can coordinate a marker that was no
//! instant. It can as well send false content of its own.
//!
//! **Who decides.** A marker is a point of the group when *every* member of its membership has told the vault that it keeps it. The vault is
//! one place, so it is so everywhere or nowhere. Who coordinates decides nothing: any member may, at any time, also two at once.
//!
//! **Nobody stays frozen.** A member thaws by its own clock at the latest, whatever it hears or does not hear, and keeps nothing then.
//!
//! **Nobody is frozen all the time.** After a marker a member takes part in no other for four times as long as it was frozen (and in none
//! with applications for four times as long as those were made to stand still), whatever a coordinator asks.
//!
//! **Old messages** do no harm: a member takes part in no marker that is not newer than the last one of that coordinator, and freezes and
//! marks only when told so in its present life.
//!
//! Time is in milliseconds of a steady clock of the machine's own. What is answered is to be done in its order.

mod coordinator;
mod machine;
mod member;
mod membership;
mod message;
mod step;
mod timing;

pub use machine::Machine;
pub use membership::{MEMBERS_MAX, Membership, MembershipError};
pub use message::{Kind, Life, Marker, Message, NoMarker, Refusal};
pub use step::{Failure, Input, Output};
pub use timing::{Tick, Timing};
