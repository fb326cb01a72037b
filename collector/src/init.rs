//! `highwater-collector init`: vault, key, authority and a configuration with comments.

use crate::{CollectorError, Config, authority};
use highwater_delta::VaultId;
use highwater_vault::{Vault, VaultKey, local_store};
use highwater_wire::files::write_secret;
use std::path::{Path, PathBuf};

/// Name of the configuration within its directory.
pub const CONFIG_FILE: &str = "collector.toml";
/// Name of the vault's key within the same directory.
pub const KEY_FILE: &str = "vault.key";

/// What was made.
#[derive(Debug)]
pub struct Made {
    /// The configuration.
    pub config: PathBuf,
    /// The vault's key: to be copied to a safe place.
    pub key_file: PathBuf,
    /// The vault.
    pub vault: VaultId,
}

/// Makes everything a collector needs. What exists is never overwritten; the configuration comes last, so that an
/// interrupted init leaves none.
pub async fn init(dir: &Path, vault_dir: &Path, names: Vec<String>) -> Result<Made, CollectorError> {
    let (config_file, key_file) = (dir.join(CONFIG_FILE), dir.join(KEY_FILE));
    for path in [&config_file, &key_file, &vault_dir.join("vault.json")] {
        if path.exists() {
            return Err(CollectorError::Exists(path.clone()));
        }
    }
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|e| CollectorError::Config { path: path.to_owned(), cause: e.to_string() })
    };
    let text = config_text(&names, &absolute(vault_dir)?, &absolute(&key_file)?);
    let bad = |cause: String| CollectorError::Config { path: config_file.clone(), cause };
    toml::from_str::<Config>(&text).map_err(|e| bad(e.to_string()))?;
    for dir in [dir, vault_dir] {
        std::fs::create_dir_all(dir).map_err(|e| bad(format!("{}: {e}", dir.display())))?;
    }
    let key = VaultKey::generate()?;
    key.save(&key_file)?;
    let vault = Vault::create(local_store(vault_dir)?, &key).await?;
    let authority = authority::create(&vault).await?;
    authority.issue_server(&names)?;
    write_secret(&config_file, text.as_bytes())?;
    Ok(Made { config: config_file, key_file, vault: vault.id() })
}

fn config_text(names: &[String], vault: &Path, key_file: &Path) -> String {
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    format!(
        r#"# Configuration of highwater-collector. Check it with `highwater-collector config check`.

# Names and addresses under which agents reach this collector. Its certificate is for these.
names = [{names}]

# Directory of the vault, and the key without which nothing in it can be read. Keep a copy of the key elsewhere.
vault = {vault}
key-file = {key_file}

# Where agents connect.
#listen = "0.0.0.0:9443"
# Where machines enrol.
#management-listen = "0.0.0.0:443"
# Where Prometheus reads metrics; without TLS, so keep it local or behind a proxy.
#metrics-listen = "127.0.0.1:9464"
# What enrolled machines are told to connect to, if it is not one of the names and the port above.
#endpoint = "dr.example.com:9443"

# Bytes that one machine, and all machines together, may have under way.
#window = "4MiB"
#memory = "1GiB"
# Sessions, and handshakes on each port, at once.
#sessions-max = 1024
#handshakes-max = 64
#handshake-timeout = "10s"
# A machine that is silent for so long is disconnected; agents say something every 30 s.
#idle-timeout = "90s"
#enrolments-per-second = 5

# "text" or "json"; and as in RUST_LOG.
#log-format = "text"
#log-level = "info"
"#,
        names = names.join(", "),
        vault = quoted(&vault.to_string_lossy()),
        key_file = quoted(&key_file.to_string_lossy()),
    )
}
