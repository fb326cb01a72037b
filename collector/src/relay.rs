//! `highwater-collector relay`: at both ends.

use crate::say::say;
use crate::{ConfigFile, open, parse_ttl, until};
use anyhow::Context;
use clap::Subcommand;
use highwater_collector::certificates::{self, State};
use highwater_collector::clock::now_ms;
use highwater_collector::tokens::{self, Returning};
use highwater_collector::{CollectorError, authority, relays};
use highwater_delta::RelayId;
use highwater_wire::certificate::{fingerprint, hex};
use highwater_wire::enroll::{Token, enroll_relay};
use highwater_wire::files::write_secret;
use highwater_wire::papers::IDENTITY_FILE;
use serde_json::json;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;
use zeroize::Zeroizing;

/// Bounds what a wrong file can make us read.
const TOKEN_BYTES_MAX: u64 = 4096;

#[derive(Subcommand)]
pub enum RelayCommand {
    /// Create a token with which another collector can join, once, to keep its vault here. Works while the collector runs.
    Token {
        #[command(flatten)]
        file: ConfigFile,
        /// How long it is valid: 1min to 30days.
        #[arg(long, default_value = "1h", value_parser = parse_ttl)]
        ttl: Duration,
        /// The collector it is for; a note for people.
        #[arg(long, value_name = "HOST")]
        name: Option<String>,
        /// A relay that is to return as itself: one that was revoked, or whose certificate has expired.
        #[arg(long, value_name = "RELAY")]
        relay: Option<String>,
    },
    /// Join another collector, so that this one's vault can be kept there.
    Join {
        /// The other collector's `management-listen`, like https://dr.example.com.
        url: String,
        /// As printed by `relay token`. Give `-` to have it read from standard input: everybody on this machine can read its command lines.
        #[arg(env = "HIGHWATER_TOKEN", hide_env_values = true, required_unless_present = "token_file")]
        token: Option<String>,
        /// Read the token from this file.
        #[arg(long, value_name = "FILE", conflicts_with = "token")]
        token_file: Option<PathBuf>,
        /// Directory for what this collector is known by there.
        #[arg(long, value_name = "DIR", default_value = "/var/lib/highwater-collector/relay")]
        identity: PathBuf,
        /// Join although there is an identity already: as itself with a token of `relay token --relay`, else as a new one.
        #[arg(long)]
        again: bool,
    },
    /// Show all relays, until when their certificates are valid, and which are revoked.
    List(ConfigFile),
    /// Lock a relay out: its certificates and unused tokens are refused from now on, and its connections end within seconds.
    /// Its objects stay. Works while the collector runs.
    Revoke {
        #[command(flatten)]
        file: ConfigFile,
        /// Its id, an unambiguous beginning of it, or its name.
        relay: String,
        /// Why; a note for people.
        #[arg(long)]
        reason: Option<String>,
    },
}

pub async fn execute(command: RelayCommand, json: bool) -> anyhow::Result<()> {
    match command {
        RelayCommand::Token { file, ttl, name, relay } => token(&file.config, ttl, name, relay, json).await,
        RelayCommand::Join { url, token, token_file, identity, again } => {
            join(&url, token.as_deref(), token_file.as_deref(), &identity, again, json).await
        }
        RelayCommand::List(file) => list(&file.config, json).await,
        RelayCommand::Revoke { file, relay, reason } => revoke(&file.config, &relay, reason, json).await,
    }
}

async fn token(
    path: &Path,
    ttl: Duration,
    name: Option<String>,
    relay: Option<String>,
    json: bool,
) -> anyhow::Result<()> {
    let (config, vault) = open(path).await?;
    let returning = match relay {
        None => None,
        Some(text) => {
            let relay = relays::find(&vault, &text).await?;
            let generation = certificates::next_generation(&vault, relay).await?;
            Some(Returning { machine: relay, generation })
        }
    };
    let authority = authority::load(&vault).await?;
    let authority = fingerprint(authority.cert());
    let token = tokens::create_for::<RelayId>(&vault, authority, now_ms(), ttl, name, returning).await?;
    let url = config.enrol_url();
    let relay = returning.map(|returning| returning.machine);
    let again = if relay.is_some() { "--again " } else { "" };
    let command = format!("highwater-collector relay join {again}{url} -");
    if json {
        let id = hex(&token.id);
        say!(
            "{}",
            json!({ "id": id, "token": token.to_string(), "url": url, "command": command, "ttl-seconds": ttl.as_secs(), "relay": relay })
        );
    } else {
        say!(
            "On the collector whose vault is to be kept here, run\n\n  {command}\n\nand paste this token, which is valid once, for {}:\n\n{token}",
            humantime_serde::re::humantime::format_duration(ttl)
        );
    }
    Ok(())
}

async fn join(
    url: &str,
    token: Option<&str>,
    token_file: Option<&Path>,
    identity: &Path,
    again: bool,
    json: bool,
) -> anyhow::Result<()> {
    let dir = std::path::absolute(identity).context("the identity's directory")?;
    let file = dir.join(IDENTITY_FILE);
    // First, so that no token is used in vain.
    if file.exists() && !again {
        return Err(CollectorError::Exists(file).into());
    }
    let trial = dir.join("trial");
    write_secret(&trial, b"").map_err(CollectorError::from)?;
    let _ = std::fs::remove_file(&trial);
    let token: Token = read_token(token, token_file)?.trim().parse().map_err(CollectorError::from)?;
    let joined = enroll_relay(url, &token, &crate::host_name()?).await.map_err(CollectorError::from)?;
    joined.identity.save(&dir).map_err(CollectorError::from)?;
    let location = format!("highwater://{}?identity={}", joined.endpoint, dir.display());
    if json {
        say!("{}", json!({ "relay": joined.identity.relay, "identity": dir, "location": location }));
        return Ok(());
    }
    say!("joined as relay {}; its identity lies in {}", joined.identity.relay, dir.display());
    say!("\nnow, if the collector is to run as a user of its own:\n  chown -R highwater: {}", dir.display());
    say!("and, for a new vault:\n  highwater-collector init --vault '{location}'");
    say!("or, for the one that lies there, in collector.toml:\n  vault = \"{location}\"");
    Ok(())
}

fn read_token(given: Option<&str>, file: Option<&Path>) -> Result<Zeroizing<String>, CollectorError> {
    let unreadable = |from: String| {
        move |error: std::io::Error| CollectorError::TokenUnreadable { from, cause: error.to_string() }
    };
    let mut text = Zeroizing::new(String::new());
    match (file, given) {
        (Some(path), _) => {
            let read = std::fs::File::open(path)
                .and_then(|file| file.take(TOKEN_BYTES_MAX).read_to_string(&mut text));
            read.map_err(unreadable(path.display().to_string()))?;
        }
        (None, None | Some("-")) => {
            let read = std::io::BufReader::new(std::io::stdin().take(TOKEN_BYTES_MAX)).read_line(&mut text);
            read.map_err(unreadable("standard input".to_owned()))?;
        }
        (None, Some(token)) => token.clone_into(&mut text),
    }
    Ok(text)
}

async fn list(path: &Path, json: bool) -> anyhow::Result<()> {
    let (_, vault) = open(path).await?;
    let relays = relays::list(&vault).await?;
    if json {
        say!("{}", json!({ "relays": relays }));
        return Ok(());
    }
    say!("{:<36}  {:<24}  {:<8}  certificate", "relay", "host", "state");
    for relay in &relays {
        let state = match relay.state {
            State::Enrolled => "joined",
            State::Expired => "expired",
            State::Revoked => "revoked",
        };
        say!("{:<36}  {:<24}  {state:<8}  {}", relay.relay, relay.name, until(relay.expires_ms));
    }
    Ok(())
}

async fn revoke(path: &Path, text: &str, reason: Option<String>, json: bool) -> anyhow::Result<()> {
    let (_, vault) = open(path).await?;
    let relay = relays::find(&vault, text).await?;
    let now = certificates::lock_out(&vault, relay, reason).await?;
    if json {
        say!("{}", json!({ "relay": relay, "revoked": true, "was-revoked": !now }));
    } else if now {
        say!("revoked relay {relay}: its connections end within seconds; its objects stay");
        say!("to let it return:\n  highwater-collector relay token --relay {relay}");
    } else {
        say!("relay {relay} was revoked already; tokens made for it since are void now");
    }
    Ok(())
}
