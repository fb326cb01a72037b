//! `highwater-agent`: the daemon and the commands that talk to it.

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use highwater_agent::{
    config::{Bandwidth, Config, ConfigError, Problem},
    control::{self, Request, Response},
    daemon,
    error::{Coded, Fatal, OperatorError, chain},
    guests,
    hooks::Report,
    left::Left,
    metrics::Metrics,
    tracker,
};
use highwater_wire::{
    WireError,
    enroll::{Token, enroll},
};
use std::{
    io::{BufRead, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const DEFAULT_CONFIG: &str = "/etc/highwater/agent.toml";
/// A point is answered when it is stored.
const PATIENCE: Duration = Duration::from_secs(310);
/// A token has 200; bounds what a wrong file can make us read.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Replicates this machine's disks, block by block and continuously, to a Highwater collector.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    /// Configuration; without the default file, defaults count.
    #[arg(long, global = true, env = "HIGHWATER_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the agent (by systemd, as a rule).
    Run,
    /// Obtain this machine's certificate from a collector, with a one-time token.
    Enroll {
        /// The collector's management address, `https://HOST[:PORT]`.
        url: String,
        /// As printed by `highwater-collector token create`. Give `-` to have it read from standard input: everybody on
        /// this machine can read a command line.
        #[arg(env = "HIGHWATER_TOKEN", hide_env_values = true, required_unless_present = "token_file")]
        token: Option<String>,
        /// Read the token from this file.
        #[arg(long, value_name = "FILE", conflicts_with = "token")]
        token_file: Option<PathBuf>,
        /// Enrol although this machine is enrolled already: as itself with a token of `token create --machine`, else as
        /// another machine.
        #[arg(long)]
        again: bool,
    },
    /// Show how replication stands.
    Status,
    /// Protect a disk: any block device, by any path.
    Protect {
        /// The device: /dev/sdb, /dev/disk/by-id/…, /dev/vg0/data, a partition, a loop device.
        device: PathBuf,
        /// Its name in the vault and the console.
        #[arg(long)]
        name: Option<String>,
    },
    /// Stop protecting a disk. Its recovery points stay in the vault.
    Unprotect {
        /// Its id, name or path.
        disk: String,
    },
    /// Take a recovery point now, and wait until it is stored.
    Point {
        /// Have the applications' hooks called for it (see `[application]` of the configuration).
        #[arg(long)]
        application: bool,
    },
    /// Compare a disk with the vault, and send what differs.
    Resync {
        /// Its id, name or path.
        disk: String,
    },
    /// Change the bandwidth limit of the running agent.
    Bandwidth {
        /// `50MiB` (per second), or `unlimited`.
        limit: String,
    },
    /// List the guests of this KVM host, and which of their disks can be protected from here. Needs no running agent.
    Discover,
    /// Look at the configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Thaw whatever a dead agent left frozen (run by systemd after the agent has stopped).
    Thaw,
    /// End all tracking and remove the programs from the kernel. The disks must be compared with the vault afterwards.
    Detach {
        /// Without this, only say what would be done.
        #[arg(long)]
        yes: bool,
    },
    /// Print completions for a shell.
    Completions {
        /// Which.
        shell: highwater_manual::Shell,
    },
    /// Print the man page.
    Man,
}

#[derive(Subcommand)]
enum ConfigVerb {
    /// Tell every problem of the configuration file.
    Check,
    /// Print it.
    Show {
        /// With all defaults.
        #[arg(long)]
        effective: bool,
    },
}

/// Exit codes.
#[derive(Clone, Copy, ValueEnum)]
enum Exit {
    Done = 0,
    Failed = 1,
}

fn main() -> ExitCode {
    let args: Args = highwater_manual::usage::parse();
    match run(&args) {
        Ok(()) => ExitCode::from(Exit::Done as u8),
        Err(error) => {
            // Where even this cannot be written, the exit code still tells.
            let _ = if args.json {
                writeln!(std::io::stdout(), "{}", error.document())
            } else {
                writeln!(std::io::stderr(), "{}", error.error.report())
            };
            ExitCode::from(Exit::Failed as u8)
        }
    }
}

/// Why a command failed.
struct Failure {
    error: OperatorError,
    /// Of the configuration, one by one.
    problems: Vec<Problem>,
}

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Self {
        Self { error, problems: vec![] }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let told = error.operator();
        let problems = match error {
            ConfigError::Invalid { problems, .. } => problems,
            ConfigError::Read { .. } => vec![],
        };
        Self { error: told, problems }
    }
}

impl Failure {
    fn document(&self) -> serde_json::Value {
        let mut document = serde_json::json!({ "error": self.error });
        if !self.problems.is_empty() {
            document["error"]["problems"] = serde_json::json!(self.problems);
        }
        document
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    match &args.verb {
        Verb::Completions { shell } => {
            let written = highwater_manual::completions(Args::command(), *shell, &mut std::io::stdout());
            return Ok(written.or_else(broken_pipe_is_fine)?);
        }
        Verb::Man => {
            let written = highwater_manual::man(Args::command(), &mut std::io::stdout());
            return Ok(written.or_else(broken_pipe_is_fine)?);
        }
        Verb::Config { verb: ConfigVerb::Check } => return check_config(args),
        Verb::Discover => {
            let found = guests::discover::discover();
            let json = serde_json::to_value(&found).unwrap_or_default();
            return Ok(say(args, guests::discover::render(&found).trim_end(), &json)?);
        }
        _ => {}
    }
    Ok(execute(args, load_config(args)?)?)
}

fn check_config(args: &Args) -> Result<(), Failure> {
    let path = config_path(args);
    let text = match &path {
        Some(path) => {
            Config::check(path)?;
            "The configuration is valid.".to_owned()
        }
        None => format!("There is no {DEFAULT_CONFIG}: the defaults hold."),
    };
    let hooks = Report::of(&load_config(args)?.application.hooks_dir);
    let text = format!("{text}\n{}", hooks.lines().join("\n"));
    Ok(say(args, &text, &serde_json::json!({ "valid": true, "file": path, "hooks": hooks.json() }))?)
}

fn execute(args: &Args, config: Config) -> Result<(), OperatorError> {
    match &args.verb {
        Verb::Run => {
            let metrics = Arc::new(Metrics::new());
            let _log = daemon::start_logging(&config, metrics.clone());
            daemon::run(&config, metrics).map_err(|e| plain(&e))
        }
        Verb::Enroll { url, token, token_file, again } => {
            // First, so that nobody is asked for a token in vain.
            refuse_enrolled(&config, *again)?;
            daemon::check_state_dir(&config.state_dir)?;
            enrol(args, &config, url, &read_token(token.as_deref(), token_file.as_deref())?)
        }
        Verb::Config { verb: ConfigVerb::Show { effective } } => {
            let text = match (effective, config_path(args)) {
                (false, Some(path)) => std::fs::read_to_string(path).unwrap_or_default(),
                _ => config.effective(),
            };
            if args.json {
                print(&serde_json::to_string(&config).unwrap_or_default())
            } else {
                print(text.trim_end())
            }
        }
        Verb::Thaw => {
            let left = Left::thaw(&config).map_err(|e| e.operator())?;
            say(args, &left.text(), &left.document())?;
            left.trouble().map_or(Ok(()), Err)
        }
        Verb::Detach { yes } => detach(args, &config, *yes),
        Verb::Status => ask(args, &config, &Request::Status),
        Verb::Protect { device, name } => {
            let path = std::path::absolute(device).unwrap_or_else(|_| device.clone());
            ask(args, &config, &Request::Protect { path, name: name.clone() })
        }
        Verb::Unprotect { disk } => ask(args, &config, &Request::Unprotect { disk: disk.clone() }),
        Verb::Point { application } => ask(args, &config, &Request::Point { application: *application }),
        Verb::Resync { disk } => ask(args, &config, &Request::ResyncNow { disk: disk.clone() }),
        Verb::Bandwidth { limit } => {
            let bandwidth: Bandwidth = limit.parse().map_err(|e| OperatorError {
                code: 1479,
                cause: e,
                action: "Write `50MiB` (per second) or `unlimited`".into(),
            })?;
            ask(args, &config, &Request::SetBandwidth { bandwidth })
        }
        Verb::Completions { .. } | Verb::Man | Verb::Discover | Verb::Config { verb: ConfigVerb::Check } => {
            Ok(())
        }
    }
}

fn config_path(args: &Args) -> Option<PathBuf> {
    args.config.clone().or_else(|| Path::new(DEFAULT_CONFIG).exists().then(|| DEFAULT_CONFIG.into()))
}

fn load_config(args: &Args) -> Result<Config, Failure> {
    match config_path(args) {
        Some(path) => Ok(Config::load(&path)?),
        None => Ok(Config::default()),
    }
}

fn ask(args: &Args, config: &Config, request: &Request) -> Result<(), OperatorError> {
    let mut response = control::call(&config.run_dir, request, PATIENCE).map_err(|e| e.operator())?;
    if let Response::Error(error) = response {
        return Err(error);
    }
    if let (Response::Done { message, .. }, Some(why)) =
        (&mut response, why_without_applications(config, request))
    {
        message.push_str(&format!(" {why}."));
    }
    if args.json {
        let value = match &response {
            Response::Status(status) => serde_json::to_value(status),
            other => serde_json::to_value(other),
        };
        return print(&value.unwrap_or_default().to_string());
    }
    match response {
        Response::Status(status) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
            print(control::render(&status, now).trim_end())
        }
        Response::Protected { disk, name, size_bytes, identity, notes } => {
            print(&format!("Protected {name}, {size_bytes}, known by {identity}.\nDisk id: {disk}"))?;
            notes.iter().try_for_each(|note| print(&format!("Note: {note}.")))
        }
        Response::Done { message, .. } => print(&message),
        Response::Error(error) => Err(error),
    }
}

/// Why the point that was asked for could not be application-consistent, if so.
fn why_without_applications(config: &Config, request: &Request) -> Option<String> {
    if !matches!(request, Request::Point { application: true }) {
        return None;
    }
    if let Some(why) = Report::of(&config.application.hooks_dir).why_none() {
        return Some(why);
    }
    // It stands there until the next one.
    let Ok(Response::Status(status)) = control::call(&config.run_dir, &Request::Status, PATIENCE) else {
        return None;
    };
    status.notes.into_iter().find(|note| note.starts_with("HW-1498"))
}

fn refuse_enrolled(config: &Config, again: bool) -> Result<(), OperatorError> {
    if daemon::is_enrolled(&config.state_dir) && !again {
        return Err(OperatorError {
            code: 1480,
            cause: "this machine is enrolled already".into(),
            action: "Use --again, with a token of `highwater-collector token create --machine ID` to stay the same machine, or \
                     with any other to become another one"
                .into(),
        });
    }
    Ok(())
}

/// From the file, standard input (`-`), or as it is.
fn read_token(given: Option<&str>, file: Option<&Path>) -> Result<String, OperatorError> {
    let failed = |from: &str, error: std::io::Error| OperatorError {
        code: 1484,
        cause: format!("the enrolment token cannot be read from {from}: {error}"),
        action: "Give it in a file (--token-file), on standard input (-) or in HIGHWATER_TOKEN".into(),
    };
    let read = |from: &mut dyn Read| {
        let mut text = String::new();
        from.take(TOKEN_BYTES_MAX).read_to_string(&mut text)?;
        Ok(text)
    };
    match (file, given) {
        (Some(path), _) => std::fs::File::open(path)
            .and_then(|mut file| read(&mut file))
            .map_err(|e| failed(&path.display().to_string(), e)),
        (None, Some("-") | None) => {
            let mut line = String::new();
            // A line, not all of it: a terminal has no end.
            std::io::BufReader::new(std::io::stdin().take(TOKEN_BYTES_MAX))
                .read_line(&mut line)
                .map_err(|e| failed("standard input", e))?;
            Ok(line)
        }
        (None, Some(token)) => Ok(token.to_owned()),
    }
}

fn enrol(args: &Args, config: &Config, url: &str, token: &str) -> Result<(), OperatorError> {
    let wire = |e: WireError| {
        OperatorError {
        code: e.code(),
        cause: e.to_string(),
        action: match e {
            WireError::Io(_) | WireError::TimedOut { .. } | WireError::Truncated | WireError::Closed => {
                "Check that the collector runs and that its management address can be reached, then repeat the command"
                    .into()
            }
            _ => e.action(),
        },
    }
    };
    let token: Token = token.trim().parse().map_err(wire)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| plain(&e.into()))?;
    let enrolled = runtime.block_on(enroll(url, &token, host.trim())).map_err(wire)?;
    daemon::save_enrolment(&config.state_dir, &enrolled.identity, &enrolled.endpoint)
        .map_err(|e| OperatorError {
            action: format!(
                "The token is used up: correct the cause, and enrol with a new one, of `highwater-collector token create \
                 --machine {}`",
                enrolled.identity.machine
            ),
            ..plain(&e)
        })?;
    let text = format!(
        "Enrolled as machine {}; the collector is {}. Restart the agent if it is running.",
        enrolled.identity.machine, enrolled.endpoint
    );
    say(
        args,
        &text,
        &serde_json::json!({ "machine": enrolled.identity.machine, "endpoint": enrolled.endpoint }),
    )
}

fn detach(args: &Args, config: &Config, yes: bool) -> Result<(), OperatorError> {
    if control::call(&config.run_dir, &Request::Status, Duration::from_secs(5)).is_ok() {
        return Err(OperatorError {
            code: 1481,
            cause: "the agent is running".into(),
            action: "Stop it first with `systemctl stop highwater-agent`".into(),
        });
    }
    if !yes {
        let text = format!(
            "Would remove the tracking programs pinned in {}. Protected disks become suspect, and are compared with the vault \
             when the agent runs again. Repeat with --yes to do it.",
            config.bpf_dir.display()
        );
        return say(args, &text, &serde_json::json!({ "would-remove": config.bpf_dir }));
    }
    tracker::detach_all(&config.bpf_dir, &config.run_dir).map_err(|e| e.operator())?;
    say(args, "Nothing is tracked any more.", &serde_json::json!({ "removed": config.bpf_dir }))
}

fn say(args: &Args, text: &str, json: &serde_json::Value) -> Result<(), OperatorError> {
    if args.json { print(&json.to_string()) } else { print(text) }
}

fn print(text: &str) -> Result<(), OperatorError> {
    writeln!(std::io::stdout(), "{text}").or_else(broken_pipe_is_fine)
}

fn broken_pipe_is_fine(error: std::io::Error) -> Result<(), OperatorError> {
    if error.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(plain(&error.into())) }
}

/// An error whose text tells all that is known; with a code of its own if it has none in front.
fn plain(error: &anyhow::Error) -> OperatorError {
    if let Some(Fatal(told)) = error.downcast_ref() {
        return told.clone();
    }
    let action = "Correct the cause, then repeat the command".into();
    OperatorError { code: 1482, cause: chain(error.as_ref()), action }
}
