//! Making, changing and deleting groups.

use super::{Group, Groups, cache};
use crate::{Result, Vault, VaultError};

/// Times that it is tried after somebody else's change.
const TRIES: usize = 16;

impl Vault {
    /// Makes a group what `change` answers, given what groups there are; asked again if somebody else changed one meanwhile. The epoch and the
    /// time are set here. Answers the group as it is then; one that stays as it is is not written.
    ///
    /// # Errors
    /// [`VaultError::Group`]: it may not be so; [`VaultError::UnknownMachine`]; what `change` fails with. Nothing is changed then.
    pub async fn change_groups(&self, mut change: impl FnMut(&Groups) -> Result<Group>) -> Result<Group> {
        for _ in 0..TRIES {
            let groups = self.groups().await?;
            let mut group = groups.next(change(&groups)?)?;
            let before = groups.get(group.id);
            if let Some(before) = before {
                group.since_ms = before.since_ms;
                if *before == group {
                    return Ok(group);
                }
            }
            if !group.deleted {
                let was = |machine| before.is_some_and(|before| before.members.contains(machine));
                for machine in group.members.iter().filter(|machine| !was(machine)) {
                    // One that nobody knows is a slip of the pen.
                    self.host_name(*machine).await?;
                }
            }
            group.since_ms = self.stamp_ms().await?;
            if cache::create(self, &cache::name_of(groups.next_number()), &group).await? {
                return Ok(group);
            }
        }
        Err(VaultError::GroupsChanged)
    }
}
