//! `highwater-collector`: the command.

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use highwater_collector::config::LogFormat;
use highwater_collector::init::{CONFIG_FILE, init};
use highwater_collector::shared::now_ms;
use highwater_collector::{Collector, CollectorError, Config, authority, tokens};
use highwater_vault::{Vault, VaultKey, local_store};
use highwater_wire::identity::{fingerprint, hex};
use sd_notify::NotifyState;
use serde_json::json;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Receives the changes of many machines and keeps them in a vault.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a vault, its key, its certificate authority and a configuration.
    Init {
        /// Where configuration and key are kept.
        #[arg(long, default_value = "/etc/highwater")]
        dir: PathBuf,
        /// Directory of the new vault.
        #[arg(long, default_value = "/var/lib/highwater/vault")]
        vault: PathBuf,
        /// Host name or address under which agents reach this collector; may be repeated. The first is the main one.
        #[arg(long = "name", value_name = "HOST_OR_IP")]
        names: Vec<String>,
    },
    /// Run the collector.
    Run(ConfigFile),
    /// Enrolment tokens.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// The configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Args)]
struct ConfigFile {
    /// The configuration.
    #[arg(long, default_value_os_t = PathBuf::from("/etc/highwater").join(CONFIG_FILE))]
    config: PathBuf,
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Create a token with which one machine can enrol, once. Works while the collector runs.
    Create {
        #[command(flatten)]
        file: ConfigFile,
        /// How long it is valid.
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        ttl: Duration,
        /// The machine it is for; a note for people.
        #[arg(long, value_name = "HOST")]
        name: Option<String>,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check the configuration.
    Check(ConfigFile),
    /// Show the configuration.
    Show {
        #[command(flatten)]
        file: ConfigFile,
        /// With every default.
        #[arg(long)]
        effective: bool,
    },
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrapped: serde_json::Value = text.into();
    humantime_serde::deserialize(wrapped)
        .map_err(|_| format!("{text:?} is no duration; write it like 1h or 30m"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("highwater-collector: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(execute(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error, json);
            ExitCode::FAILURE
        }
    }
}

fn report(error: &anyhow::Error, json: bool) {
    let known = error.downcast_ref::<CollectorError>();
    let code = known.map(|error| format!("HW-{:04}", error.code()));
    let action = known.map(CollectorError::action);
    if json {
        println!("{}", json!({ "error": { "code": code, "cause": format!("{error:#}"), "action": action } }));
        return;
    }
    match (code, action) {
        (Some(code), Some(action)) => {
            eprintln!("highwater-collector: {code}: {error:#}\n  what to do: {action}")
        }
        _ => eprintln!("highwater-collector: {error:#}"),
    }
}

async fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Init { dir, vault, names } => make(&dir, &vault, names, cli.json).await,
        Command::Run(file) => run(&file.config).await,
        Command::Token { command: TokenCommand::Create { file, ttl, name } } => {
            create_token(&file.config, ttl, name, cli.json).await
        }
        Command::Config { command: ConfigCommand::Check(file) } => {
            Config::load(&file.config)?;
            if cli.json {
                println!("{}", json!({ "ok": true, "config": file.config }));
            } else {
                println!("{} is right", file.config.display());
            }
            Ok(())
        }
        Command::Config { command: ConfigCommand::Show { file, effective } } => {
            let config = Config::load(&file.config)?;
            if cli.json {
                println!("{}", serde_json::to_string_pretty(&config)?);
            } else if effective {
                print!("{}", toml::to_string(&config)?);
            } else {
                print!("{}", std::fs::read_to_string(&file.config)?);
            }
            Ok(())
        }
    }
}

async fn make(dir: &Path, vault: &Path, mut names: Vec<String>, json: bool) -> anyhow::Result<()> {
    if names.is_empty() {
        names.push(host_name()?);
    }
    let made = init(dir, vault, names).await?;
    let (config, key) = (made.config.display(), made.key_file.display());
    if json {
        println!(
            "{}",
            json!({ "config": made.config, "key-file": made.key_file, "vault": made.vault.to_string() })
        );
        return Ok(());
    }
    println!("created vault {} in {}", made.vault, vault.display());
    println!("created its key {key}: keep a copy elsewhere, without it nothing can be recovered");
    println!("created {config}\n\nnow:\n  highwater-collector run --config {config}");
    println!("  highwater-collector token create --config {config}");
    Ok(())
}

fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host's name")?;
    Ok(name.trim().to_owned())
}

async fn create_token(path: &Path, ttl: Duration, name: Option<String>, json: bool) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let key = VaultKey::load(&config.key_file).map_err(CollectorError::from)?;
    let store = local_store(&config.vault).map_err(CollectorError::from)?;
    let vault = Vault::open(store, &key).await.map_err(CollectorError::from)?;
    let authority = authority::load(&vault).await?;
    let token = tokens::create(&vault, fingerprint(authority.cert()), now_ms(), ttl, name).await?;
    let url = config.enrol_url();
    let command = format!("highwater-agent enroll {url} {token}");
    if json {
        let id = hex(&token.id);
        println!(
            "{}",
            json!({ "id": id, "token": token.to_string(), "url": url, "command": command, "ttl-seconds": ttl.as_secs() })
        );
    } else {
        println!(
            "{token}\n\nvalid once, for {} minutes; on the machine to be protected:\n\n  {command}",
            ttl.as_secs() / 60
        );
    }
    Ok(())
}

async fn run(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    log_to_stderr(&config)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let running = Collector::start(config).await?;
    notify(&[NotifyState::Ready]);
    // Half of what systemd allows, as it advises.
    let beat = sd_notify::watchdog_enabled().map_or(Duration::from_secs(5), |limit| limit / 2);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = tokio::time::sleep(beat) => {
                if running.has_failed() {
                    running.shutdown().await;
                    anyhow::bail!("a part of the collector has ended unexpectedly; see the log");
                }
                notify(&[NotifyState::Watchdog]);
            }
        }
    }
    tracing::info!("stopping");
    notify(&[NotifyState::Stopping]);
    running.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

fn notify(states: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(states);
}

fn log_to_stderr(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .or_else(|_| tracing_subscriber::EnvFilter::try_new(&config.log_level))
        .context("`log-level` cannot be understood")?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
