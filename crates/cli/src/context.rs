//! Finding the vault, its key, and the machine that is meant.

use crate::{CliError, Console, args::Global, output::rfc3339, secret};
use highwater_delta::{Code, GroupId, MachineId};
use highwater_vault::{
    Index, KeyRing, KeySource, Location, MachineState, Store, Vault, VaultError, groups::Group,
    keys::KeyCommand,
};
use std::path::{Path, PathBuf};

/// Opens the vault that options, environment or the collector's configuration name.
pub(crate) async fn open(global: &Global, console: &mut Console<'_>) -> Result<Vault, CliError> {
    let vault = keys(global, console).await?.vault()?;
    Ok(match index(global) {
        Some(dir) => vault.with_index(Index::new(&dir)),
        None => vault,
    })
}

/// Where what was read of machines is kept. Without a home, nowhere.
fn index(global: &Global) -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    match &global.index {
        Some(dir) if dir.as_os_str() == "none" => None,
        Some(dir) => Some(dir.clone()),
        None => absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("highwater")),
    }
}

/// The same, with where it lies.
pub(crate) async fn open_at(
    global: &Global,
    console: &mut Console<'_>,
) -> Result<(Vault, Location), CliError> {
    let (ring, location) = find(global, console).await?;
    Ok((ring.vault()?, location))
}

/// The same, with what opens it.
pub(crate) async fn keys(global: &Global, console: &mut Console<'_>) -> Result<KeyRing, CliError> {
    Ok(find(global, console).await?.0)
}

async fn find(global: &Global, console: &mut Console<'_>) -> Result<(KeyRing, Location), CliError> {
    let given = given(global)?;
    let config = match (&global.vault, &given) {
        (Some(_), Some(_)) => toml::Table::new(),
        _ => read_config(global.config.as_deref())?,
    };
    let named = |name: &str| config.get(name).and_then(|value| value.as_str()).map(str::to_owned);
    let address = global.vault.clone().or_else(|| named("vault")).ok_or(CliError::NotGiven("vault"))?;
    let location: Location = address.parse()?;
    // A mistyped directory would be made.
    if let Location::Directory(dir) = &location
        && !dir.is_dir()
    {
        return Err(CliError::Address(address));
    }
    let source = match given {
        Some(Given::Source(source)) => source,
        Some(Given::Asked) => KeySource::Passphrase(secret::ask(console, "Passphrase of the vault: ")?),
        None => configured(&config, path_of(global.config.as_deref()))?.ok_or(CliError::NotGiven("key"))?,
    };
    let ring = KeyRing::open(Store::open(&location)?, &source).await?;
    Ok((ring, location))
}

/// What the options, or the environment, say that opens the vault.
enum Given {
    Source(KeySource),
    /// A passphrase that is asked for, after everything else that could be wrong.
    Asked,
}

fn given(global: &Global) -> Result<Option<Given>, CliError> {
    let asked = global.passphrase.then_some(Given::Asked);
    let text = global.passphrase_file.clone().map(|path| Given::Source(KeySource::PassphraseFile(path)));
    let command = global.key_command.clone().map(|command| Given::Source(KeySource::Command(command)));
    let mut all: Vec<Given> = asked.into_iter().chain(text).chain(command).collect();
    if all.len() > 1 {
        let cause = "only one of --passphrase, --passphrase-file and --key-command can be given";
        return Err(CliError::Usage(cause.to_owned()));
    }
    // A key file may come from the environment; what was said on the command line counts more.
    let file = || global.key.clone().map(|path| Given::Source(KeySource::File(path)));
    Ok(all.pop().or_else(file))
}

/// What the collector opens the vault with.
fn configured(config: &toml::Table, path: &Path) -> Result<Option<KeySource>, CliError> {
    let text = |name: &str| config.get(name).and_then(|value| value.as_str()).map(PathBuf::from);
    if let Some(path) = text("key-file") {
        return Ok(Some(KeySource::File(path)));
    }
    if let Some(path) = text("passphrase-file") {
        return Ok(Some(KeySource::PassphraseFile(path)));
    }
    let Some(words) = config.get("key-command") else { return Ok(None) };
    let words: Option<Vec<String>> =
        words.as_array().map(|all| all.iter().filter_map(|word| word.as_str().map(str::to_owned)).collect());
    let refuse = |cause| CliError::Config { path: path.display().to_string(), cause };
    let command = KeyCommand::try_from(words.unwrap_or_default());
    command.map(|command| Some(KeySource::Command(command))).map_err(refuse)
}

/// Where the collector's configuration is, if nobody says otherwise.
const CONFIG: &str = "/etc/highwater/collector.toml";

fn path_of(named: Option<&Path>) -> &Path {
    named.unwrap_or(Path::new(CONFIG))
}

/// One that is not there says nothing, unless it was named.
fn read_config(named: Option<&Path>) -> Result<toml::Table, CliError> {
    let path = path_of(named);
    let refuse = |cause: String| CliError::Config { path: path.display().to_string(), cause };
    match std::fs::read_to_string(path) {
        Ok(text) => text.parse().map_err(|e: toml::de::Error| refuse(e.message().to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => Ok(toml::Table::new()),
        Err(e) => Err(refuse(e.to_string())),
    }
}

/// The machine meant by an id, an unambiguous begin of one, or a host name.
pub(crate) async fn machine(vault: &Vault, text: &str) -> Result<MachineId, CliError> {
    let machines = vault.machines().await?;
    if let Ok(id) = text.parse::<MachineId>() {
        return match machines.contains(&id) {
            true => Ok(id),
            false if vault.is_erased(id).await? => Err(VaultError::Erased(id).into()),
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

/// The group meant by a name, an id, or an unambiguous begin of one. One that was deleted is meant by its id only, and only where it
/// may be.
pub(crate) async fn group(vault: &Vault, text: &str, deleted: bool) -> Result<Group, CliError> {
    let groups = vault.groups().await?;
    let may_be = |group: &&Group| deleted || !group.deleted;
    if let Ok(id) = text.parse::<GroupId>() {
        let found = groups.get(id).filter(may_be).cloned();
        return found.ok_or_else(|| VaultError::UnknownGroup(id).into());
    }
    // Whoever calls a group by its name does not mean one whose id begins so.
    if let Some(named) = groups.living().into_iter().find(|group| group.name == text) {
        return Ok(named.clone());
    }
    let wanted = text.to_ascii_lowercase();
    let begins = |group: &&Group| !wanted.is_empty() && group.id.to_string().starts_with(&wanted);
    let found: Vec<&Group> = groups.ever().filter(may_be).filter(begins).collect();
    match found.as_slice() {
        [] => Err(CliError::Group(format!("no group is named {text:?}"))),
        [one] => Ok((*one).clone()),
        several => {
            let list: Vec<String> =
                several.iter().map(|group| format!("{} ({})", group.id, group.name)).collect();
            Err(CliError::Group(format!("{text:?} may mean {}", list.join(" or "))))
        }
    }
}

/// What is known of a machine; with `before_damage`, up to the first record that is damaged, of which somebody is told.
pub(crate) async fn state(
    vault: &Vault,
    machine: MachineId,
    before_damage: bool,
    json: bool,
    console: &mut Console<'_>,
) -> Result<(MachineState, Option<VaultError>), CliError> {
    let error = match vault.machine(machine).await {
        Err(error) if error.is_damage() => error,
        state => return Ok((state?, None)),
    };
    let Ok((state, why)) = vault.machine_before_damage(machine).await else { return Err(error.into()) };
    if !json {
        let (code, newest) = (Code(why.code()), state.points.last());
        let newest = newest.map_or("none".to_owned(), |point| {
            format!("{} of {}", point.id, rfc3339(point.info.taken_at_ms))
        });
        writeln!(
            console.err,
            "{code}: {why}.\n  Behind that NOTHING is known of {machine}; the newest point before it is {newest}. Put the object back from a copy of the vault if there is one."
        )?;
        if !before_damage {
            writeln!(console.err, "  What was recorded before it is recovered with --skip-damaged.")?;
        }
    }
    if before_damage { Ok((state, Some(why))) } else { Err(error.into()) }
}

pub(crate) fn damage_document(error: &VaultError) -> serde_json::Value {
    serde_json::json!({ "code": Code(error.code()), "cause": error.to_string(), "action": error.action() })
}
