//! `highwater-collector`: the command.

mod machines;
mod relay;
mod say;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use highwater_collector::clock::now_ms;
use highwater_collector::config::LogFormat;
use highwater_collector::init::{CONFIG_FILE, Key, init};
use highwater_collector::tokens::{self, Returning};
use highwater_collector::{Collector, CollectorError, Config, authority, certificates};
use highwater_vault::{Location, Vault, keys::KeyCommand};
use highwater_wire::certificate::{fingerprint, hex};
use machines::until;
use relay::RelayCommand;
use say::say;
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
        /// Where the new vault is to lie: a directory, a bucket like s3://BUCKET/PREFIX?region=REGION, or another collector like
        /// highwater://HOST:9443?identity=DIR, which `relay join` has made.
        #[arg(long, value_name = "LOCATION", default_value = "/var/lib/highwater-collector/vault")]
        vault: Location,
        /// Host name or address under which agents reach this collector; may be repeated. The first is the main one.
        #[arg(long = "name", value_name = "HOST_OR_IP")]
        names: Vec<String>,
        #[command(flatten)]
        key: KeyChoice,
    },
    /// Run the collector.
    Run(ConfigFile),
    /// Enrolment tokens.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Enrolled machines.
    Machine {
        #[command(subcommand)]
        command: MachineCommand,
    },
    /// Other collectors that keep their vaults here, and this one's place at another.
    Relay {
        #[command(subcommand)]
        command: RelayCommand,
    },
    /// The configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Write a completion script.
    Completions {
        /// For which shell.
        shell: highwater_manual::Shell,
    },
    /// Write the man page.
    Man,
}

/// What is to open the new vault; a key file beside the configuration, if nothing else is said.
#[derive(Args)]
#[group(multiple = false)]
struct KeyChoice {
    /// Instead of a key file: a file with a passphrase of at least 12 characters, readable by its owner only.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Instead of a key file: a command that wraps and unwraps a key, as for a key management service; split at spaces.
    #[arg(long, value_name = "COMMAND")]
    key_command: Option<KeyCommand>,
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
        /// How long it is valid: 1min to 30days.
        #[arg(long, default_value = "1h", value_parser = parse_ttl)]
        ttl: Duration,
        /// The machine it is for; a note for people.
        #[arg(long, value_name = "HOST")]
        name: Option<String>,
        /// A machine of the vault that is to return as itself: one that was revoked, or whose certificate has expired.
        #[arg(long, value_name = "MACHINE")]
        machine: Option<String>,
    },
}

#[derive(Subcommand)]
enum MachineCommand {
    /// Show all machines of the vault, until when their certificates are valid, and which are revoked.
    List(ConfigFile),
    /// Lock a machine out: its certificates and unused tokens are refused from now on, and its session ends within seconds.
    /// Its recovery points stay. Works while the collector runs.
    Revoke {
        #[command(flatten)]
        file: ConfigFile,
        /// Its id, an unambiguous beginning of it, or its host's name.
        machine: String,
        /// Why; a note for people.
        #[arg(long)]
        reason: Option<String>,
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

/// Whoever finds a token that nobody used can enrol with it: it must not be valid for ever.
const TTL_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Somebody has to carry it to the machine.
const TTL_MIN: Duration = Duration::from_secs(60);

fn parse_ttl(text: &str) -> Result<Duration, String> {
    let ttl = humantime_serde::re::humantime::parse_duration(text)
        .map_err(|_| "no duration; write it like 1h or 30m".to_owned())?;
    if (TTL_MIN..=TTL_MAX).contains(&ttl) { Ok(ttl) } else { Err("must be 1min to 30days".to_owned()) }
}

fn main() -> ExitCode {
    let cli: Cli = highwater_manual::usage::parse();
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
    // The text of a known error has its causes in it already.
    let cause = known.map_or_else(|| format!("{error:#}"), ToString::to_string);
    if json {
        let mut error = json!({ "code": code, "cause": cause, "action": action });
        if let Some(CollectorError::Config { problems, .. }) = known {
            error["problems"] = json!(problems);
        }
        say!("{}", json!({ "error": error }));
        return;
    }
    match (code, action) {
        (Some(code), Some(action)) => {
            eprintln!("highwater-collector: {code}: {cause}\n  what to do: {action}")
        }
        _ => eprintln!("highwater-collector: {cause}"),
    }
}

async fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Init { dir, vault, names, key } => {
            let key = match (key.passphrase_file, key.key_command) {
                (Some(file), _) => Key::PassphraseFile(file),
                (None, Some(command)) => Key::Command(command),
                (None, None) => Key::NewFile,
            };
            make(&dir, &vault, names, key, cli.json).await
        }
        Command::Completions { shell } => {
            Ok(highwater_manual::completions(Cli::command(), shell, &mut std::io::stdout())?)
        }
        Command::Man => Ok(highwater_manual::man(Cli::command(), &mut std::io::stdout())?),
        Command::Run(file) => run(&file.config).await,
        Command::Token { command: TokenCommand::Create { file, ttl, name, machine } } => {
            create_token(&file.config, ttl, name, machine, cli.json).await
        }
        Command::Machine { command: MachineCommand::List(file) } => {
            machines::list(&file.config, cli.json).await
        }
        Command::Machine { command: MachineCommand::Revoke { file, machine, reason } } => {
            machines::revoke(&file.config, &machine, reason, cli.json).await
        }
        Command::Relay { command } => relay::execute(command, cli.json).await,
        Command::Config { command: ConfigCommand::Check(file) } => {
            let config = Config::check(&file.config)?;
            // As a start would; but a bucket may be out of reach from here, and a command is not asked for nothing.
            if matches!(config.vault, Location::Directory(_)) && config.key_command.is_none() {
                highwater_collector::authority::load(&config.open_vault().await?).await?;
            }
            if cli.json {
                say!("{}", json!({ "valid": true, "file": file.config }));
            } else {
                say!("{} is right", file.config.display());
            }
            Ok(())
        }
        Command::Config { command: ConfigCommand::Show { file, effective } } => {
            let config = Config::load(&file.config)?;
            if cli.json {
                say!("{}", serde_json::to_string_pretty(&config)?);
            } else if effective {
                say!("{}", toml::to_string(&config)?.trim_end());
                for (name, meaning) in config.unset() {
                    say!("# {name} is not set: {meaning}");
                }
            } else {
                say!("{}", std::fs::read_to_string(&file.config)?.trim_end());
            }
            Ok(())
        }
    }
}

async fn make(
    dir: &Path,
    vault: &Location,
    mut names: Vec<String>,
    key: Key,
    json: bool,
) -> anyhow::Result<()> {
    let by_default = names.is_empty();
    if by_default {
        names.push(host_name()?);
    }
    let name = names[0].clone();
    let passphrase = match &key {
        Key::PassphraseFile(file) => Some(file.clone()),
        _ => None,
    };
    let made = init(dir, vault, names, key).await?;
    let config = made.config.display();
    if json {
        say!(
            "{}",
            json!({ "config": made.config, "key-file": made.key_file, "vault": made.vault.to_string() })
        );
        return Ok(());
    }
    say!("created vault {} in {vault}", made.vault);
    let mut own = if let Some(key) = &made.key_file {
        let key = key.display();
        say!("created its key {key}: keep a copy elsewhere, without it nothing can be recovered");
        format!(" {key}")
    } else {
        say!("nothing but what was given opens it; add a second way with `highwater vault key add`");
        passphrase.map(|file| format!(" {}", file.display())).unwrap_or_default()
    };
    if by_default {
        say!(
            "machines are to reach it as {name:?}: if that is not its full name there, correct `names` in {config}"
        );
    }
    say!("created {config}\n\nnow, if the collector is to run as a user of its own:");
    if let Location::Directory(dir) = vault {
        own += &format!(" {}", dir.display());
    }
    say!("  chown -R highwater: {config}{own}");
    say!("and:\n  highwater-collector run --config {config}");
    say!("  highwater-collector token create --config {config}");
    Ok(())
}

fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host's name")?;
    Ok(name.trim().to_owned())
}

/// The configuration and its vault, for commands that work beside the running collector.
async fn open(path: &Path) -> anyhow::Result<(Config, Vault)> {
    let config = Config::load(path)?;
    let vault = config.open_vault().await?;
    Ok((config, vault))
}

async fn create_token(
    path: &Path,
    ttl: Duration,
    name: Option<String>,
    machine: Option<String>,
    json: bool,
) -> anyhow::Result<()> {
    let (config, vault) = open(path).await?;
    let returning = match machine {
        None => None,
        Some(text) => {
            let machine = certificates::find(&vault, &text).await?;
            let generation = certificates::next_generation(&vault, machine).await?;
            Some(Returning { machine, generation })
        }
    };
    let authority = authority::load(&vault).await?;
    let token = tokens::create(&vault, fingerprint(authority.cert()), now_ms(), ttl, name, returning).await?;
    let url = config.enrol_url();
    let machine = returning.map(|returning| returning.machine);
    let again = if machine.is_some() { "--again " } else { "" };
    // Everybody on the machine can read its command lines, so the token is not in it.
    let command = format!("highwater-agent enroll {again}{url} -");
    if json {
        let id = hex(&token.id);
        say!(
            "{}",
            json!({ "id": id, "token": token.to_string(), "url": url, "command": command, "ttl-seconds": ttl.as_secs(), "machine": machine })
        );
    } else {
        say!(
            "On the machine to be protected, run\n\n  {command}\n\nand paste this token, which is valid once, for {}:\n\n{token}",
            humantime_serde::re::humantime::format_duration(ttl)
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
        // A line that cannot be written is told on standard error, which is what could not be written: that ended the process.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
