//! What groups there are, as their members are told: read again and again, signed when something has changed.
//!
//! Of two rosters of a group the later one holds. So the time that stands in one rises with each that this collector signs, and is that of the
//! vault's store where the clock here is wrong. Collectors of one vault sign rosters of the same content each for itself.

use crate::shared::Shared;
use highwater_delta::{GroupId, MachineId};
use highwater_vault::VaultError;
use highwater_vault::groups::{Group, Times};
use highwater_wire::printable::printable;
use highwater_wire::{Roster, RosterMember, SignedRoster};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Bytes of a host's name in a roster: with all members' it stays within what a roster may have.
const NAME_BYTES_MAX: usize = 64;

/// What was signed, and the names of hosts.
#[derive(Default)]
pub struct Signed {
    rosters: Mutex<HashMap<GroupId, (Roster, Arc<SignedRoster>)>>,
    names: Mutex<HashMap<MachineId, String>>,
}

/// Reads what groups there are, and tells each session what has changed for its machine.
pub async fn refresh(shared: &Shared) -> Result<(), VaultError> {
    let groups = shared.vault.groups().await?;
    let living = groups.living();
    let mut addresses = HashMap::new();
    if !living.is_empty() {
        addresses = shared.vault.group_addresses().await?;
        for (machine, address) in shared.desk.reachable() {
            let is_new = addresses.get(&machine) != Some(&address) && groups.of_machine(machine).is_some();
            if is_new && shared.allow_address(machine) {
                shared.vault.set_group_address(machine, &address).await?;
                addresses.insert(machine, address);
            }
        }
    }
    let mut signed = shared.signed.rosters.lock().await;
    signed.retain(|id, _| living.iter().any(|group| group.id == *id));
    let mut rosters = HashMap::new();
    for group in living {
        let before = signed.get(&group.id);
        let issued_ms = before.map_or(0, |(roster, _)| roster.issued_ms);
        let mut roster = roster(shared, group, &addresses, issued_ms).await?;
        let one = match before {
            Some((known, one)) if *known == roster => one.clone(),
            _ => {
                roster.issued_ms = shared.vault.stamp_ms().await?.max(issued_ms + 1);
                match roster.sign(&shared.authority) {
                    Ok(one) => Arc::new(one),
                    // Nothing that the vault takes for a group; the others' members are told.
                    Err(error) => {
                        tracing::error!(group = %group.id, code = %highwater_delta::Code(error.code()), %error, "a roster cannot be signed");
                        continue;
                    }
                }
            }
        };
        signed.insert(group.id, (roster, one.clone()));
        rosters.extend(group.members.iter().map(|machine| (*machine, one.clone())));
    }
    shared.desk.tell(rosters);
    Ok(())
}

async fn roster(
    shared: &Shared,
    group: &Group,
    addresses: &HashMap<MachineId, String>,
    issued_ms: u64,
) -> Result<Roster, VaultError> {
    let mut members = Vec::with_capacity(group.members.len());
    for machine in group.members.iter().copied() {
        members.push(RosterMember {
            machine,
            host_name: host_name(shared, machine).await?,
            address: addresses.get(&machine).cloned(),
            generation_min: shared.generation_min(machine),
        });
    }
    let Times { crash_every, application_every, prepare_max, hold_max } = group.times;
    Ok(Roster {
        group: group.id,
        name: group.name.clone(),
        epoch: group.epoch,
        issued_ms,
        members,
        crash_every_ms: crash_every.map(millis),
        application_every_ms: application_every.map(millis),
        prepare_max_ms: millis(prepare_max),
        hold_max_ms: millis(hold_max),
    })
}

/// A machine keeps its name; one that was erased has none.
async fn host_name(shared: &Shared, machine: MachineId) -> Result<String, VaultError> {
    let mut names = shared.signed.names.lock().await;
    if let Some(name) = names.get(&machine) {
        return Ok(name.clone());
    }
    let name = match shared.vault.host_name(machine).await {
        Err(VaultError::Erased(_) | VaultError::UnknownMachine(_)) => String::new(),
        Err(error) if error.is_damage() => String::new(),
        name => name?,
    };
    let name = printable(&name, NAME_BYTES_MAX);
    names.insert(machine, name.clone());
    Ok(name)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
