//! Finding the vault, its key, and the machine that is meant.

use crate::{CliError, args::Global};
use highwater_delta::MachineId;
use highwater_vault::{Location, Store, Vault, VaultKey};
use std::path::{Path, PathBuf};

/// Opens the vault that options, environment or the collector's configuration name.
pub(crate) async fn open(global: &Global) -> Result<Vault, CliError> {
    let config = if global.vault.is_none() || global.key.is_none() {
        read_config(&global.config)?
    } else {
        toml::Table::new()
    };
    let named = |name: &str| config.get(name).and_then(|value| value.as_str()).map(str::to_owned);
    let address = global.vault.clone().or_else(|| named("vault")).ok_or(CliError::NotGiven("vault"))?;
    let key = global.key.clone().or_else(|| named("key-file").map(PathBuf::from));
    let key = VaultKey::load(&key.ok_or(CliError::NotGiven("key file"))?)?;
    let location: Location = address.parse()?;
    // A mistyped directory would be made.
    if let Location::Directory(dir) = &location
        && !dir.is_dir()
    {
        return Err(CliError::Address(address));
    }
    Ok(Vault::open(Store::open(&location)?, &key).await?)
}

fn read_config(path: &Path) -> Result<toml::Table, CliError> {
    let refuse = |cause: String| CliError::Config { path: path.display().to_string(), cause };
    match std::fs::read_to_string(path) {
        Ok(text) => text.parse().map_err(|e: toml::de::Error| refuse(e.message().to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(toml::Table::new()),
        Err(e) => Err(refuse(e.to_string())),
    }
}

/// The machine meant by an id, an unambiguous begin of one, or a host name.
pub(crate) async fn machine(vault: &Vault, text: &str) -> Result<MachineId, CliError> {
    let machines = vault.machines().await?;
    if let Ok(id) = text.parse::<MachineId>() {
        return match machines.contains(&id) {
            true => Ok(id),
            false => Err(CliError::Machine(format!("machine {id} is not in this vault"))),
        };
    }
    let wanted = text.to_ascii_lowercase();
    let mut found = Vec::new();
    for id in machines {
        // A machine whose key object is damaged can still be named by its id.
        let host = vault.host_name(id).await.unwrap_or_default();
        if (!wanted.is_empty() && id.to_string().starts_with(&wanted)) || host == text {
            found.push((id, host));
        }
    }
    match found.as_slice() {
        [] => Err(CliError::Machine(format!("no machine is named {text:?}"))),
        [(id, _)] => Ok(*id),
        several => {
            let list: Vec<String> = several.iter().map(|(id, host)| format!("{id} ({host})")).collect();
            Err(CliError::Machine(format!("{text:?} may mean {}", list.join(" or "))))
        }
    }
}
