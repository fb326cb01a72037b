//! Where members are reached: `group-addresses/<machine>/<n>`, the last one counts. The earlier ones go when there is a later one.

use super::cache;
use crate::{Result, Vault, VaultError};
use highwater_delta::MachineId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    address: String,
    since_ms: u64,
}

fn name_of(machine: MachineId, number: u64) -> String {
    format!("group-addresses/{machine}/{number:08}")
}

fn parse(name: &str) -> Option<(MachineId, u64)> {
    let (machine, number) = name.strip_prefix("group-addresses/")?.split_once('/')?;
    Some((machine.parse().ok()?, number.parse().ok()?))
}

impl Vault {
    /// Where each machine is reached, as `host:port`, of those that have said it. Where that cannot be read, it has not been said.
    pub async fn group_addresses(&self) -> Result<HashMap<MachineId, String>> {
        let mut newest: HashMap<MachineId, u64> = HashMap::new();
        for name in self.control_list("group-addresses").await? {
            if let Some((machine, number)) = parse(&name) {
                let last = newest.entry(machine).or_default();
                *last = number.max(*last);
            }
        }
        let mut known = self.groups.addresses.lock().await;
        known.retain(|machine, _| newest.contains_key(machine));
        for (machine, number) in newest {
            if known.get(&machine).is_some_and(|(at, _)| *at == number) {
                continue;
            }
            match cache::find::<Document>(self, &name_of(machine, number)).await {
                Ok(Some(document)) => {
                    known.insert(machine, (number, document.address));
                }
                // A later one may have taken its place meanwhile: it is read the next time.
                Ok(None) => {}
                // The others are told all the same. Once the machine says it again, there is a later one.
                Err(error) if error.is_damage() => {
                    known.remove(&machine);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(known.iter().map(|(machine, (_, address))| (*machine, address.clone())).collect())
    }

    /// A machine is reached there from now on. Whoever else says something of it at the same time may be the one that counts.
    pub async fn set_group_address(&self, machine: MachineId, address: &str) -> Result<()> {
        let names = self.control_list(&format!("group-addresses/{machine}")).await?;
        let last = names.iter().filter_map(|name| Some(parse(name)?.1)).max().unwrap_or(0);
        let since_ms = self.stamp_ms().await?;
        let document = Document { address: address.to_owned(), since_ms };
        if !cache::create(self, &name_of(machine, last + 1), &document).await? {
            return Err(VaultError::GroupsChanged);
        }
        for name in names {
            self.control_forget(&name).await?;
        }
        Ok(())
    }

    pub(super) async fn tidy_addresses(&self, erased: &BTreeSet<MachineId>) -> Result<()> {
        for name in self.control_list("group-addresses").await? {
            if parse(&name).is_some_and(|(machine, _)| erased.contains(&machine)) {
                self.control_forget(&name).await?;
            }
        }
        Ok(())
    }
}
