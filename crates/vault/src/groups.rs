//! Replication groups: machines whose points are taken at one instant.
//!
//! # Contract
//!
//! - **Definitions** are one chain of documents for all groups, `groups/<n>`: each says what one group is from then on ([`Group`]), and is
//!   created if absent. So changes have one order, whoever makes them: two groups cannot both get a machine, or a name. Documents are never
//!   changed and never deleted, so that the members of each epoch can be told for ever ([`Groups::membership`]).
//! - **Reports.** A member that keeps a marker as a recovery point of its own, which is stored, says so: `group-kept/<group>/<marker>.<machine>`.
//! - **One decision.** A marker becomes a point of the group when every member of its epoch has reported, and it comes to nothing when a member
//!   says so first, or when one has not reported within [`PENDING_MAX`]. Either is `group-points/<group>/<marker>`, created if absent: it is one
//!   or the other everywhere and for ever. A point is decided only by whoever has read the reports of all members.
//! - **Who was taken out** has no say in what the others do afterwards: reports of an epoch that is over are taken for [`PENDING_MAX`], and count for that
//!   epoch only.
//! - **A crash** between a report and the decision, or between the decision and the deletion of the reports, is made good by whoever
//!   comes next: another report of the marker, or [`crate::Vault::sweep_groups`], which collectors do now and then.
//! - **Offered** is only what is whole: of a point of a group, each member's own point still exists ([`crate::Vault::group_points`]).
//! - **Kept together.** Maintenance of a machine keeps its points that belong to points of a group, as the policy says for the list of the group's
//!   points ([`Shared`]). The list is the same for all members; so what the policy keeps of it stays whole. When one member's point is gone, the
//!   document of the group's point goes.
//!
//! Limits: a machine has at most [`PENDING_OF_MACHINE_MAX`] reports that wait for a decision.

mod address;
mod cache;
mod decide;
mod define;
mod keep;
mod points;
mod register;
mod requests;
mod sweep;

pub(crate) use cache::Cache;
pub use decide::{Complete, Decision, MemberPoint, Outcome, Report, Revoked};
pub(crate) use keep::forget_points;
pub use keep::{Shared, SharedPoint};
pub use points::{GroupPoint, Health, Pending};
pub use register::{Group, Groups, NAME_CHARS_MAX, Times};
pub use requests::{Answer, Of, Request, RequestId, Taken};
pub use sweep::Swept;

use std::time::Duration;

/// So long a marker waits for the reports of its members: for as long as the slowest may need to send what it has written.
pub const PENDING_MAX: Duration = Duration::from_secs(6 * 3600);
/// So long it is remembered that a marker came to nothing: longer than a report of it would be taken.
const REVOKED_FOR: Duration = Duration::from_secs(12 * 3600);
/// Reports of one machine that wait for a decision. A member takes no part in a marker while it still sends the one before, so it
/// has one or two.
pub const PENDING_OF_MACHINE_MAX: usize = 64;
/// Documents that are read at once.
const READ_DEPTH: usize = 16;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
